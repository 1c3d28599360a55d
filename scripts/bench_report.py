"""What bench_kernels.py measured: its rows, the file that holds them over several runs, tables and plots."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CIRCUMSTANCES = ("machine", "torch", "triton", "dtype", "threads", "cpu_time", "seed", "MPT_KERNELS")
INPUTS = "inputs"  # the name of a row that says why a problem could not be posed
PASSES = ("forward", "backward", "both")


@dataclass
class Result:
    """One contender on one problem; seconds by pass, each a list. host_seconds: what the host took to launch a pass on
    a GPU. flops, moved: of the dense forward and backward. peak: the rate of a matrix product or of a copy, measured in
    the same run. split: False where the forward computes the gradients, so that neither pass has a rate of its own.
    implementation: of ours. note: why something is missing, and remarks.
    """

    op: str
    sizes: dict[str, Any]
    name: str
    bound: bool = False
    executed: float = 1.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    host_seconds: dict[str, list[float]] = field(default_factory=dict)
    memory_mib: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    flops: tuple[float, float] | None = None
    moved: tuple[float, float] | None = None
    peak: float | None = None
    split: bool = True
    implementation: str = ""
    note: str = ""

    @property
    def problem(self) -> str:
        return f"{self.op}: {', '.join(f'{k} {v}' for k, v in self.sizes.items())}"

    def median(self, which: str) -> float | None:
        """Seconds: of "forward" and "both" as measured; "backward" is the difference, None where noise is larger."""
        if which == "backward":
            forward, both = self.median("forward"), self.median("both")
            return None if forward is None or both is None or both <= forward else both - forward
        return statistics.median(self.seconds[which]) if self.seconds.get(which) else None

    def rate(self, which: str) -> float | None:
        """Of the dense work, per second."""
        seconds, work = self.median(which), self.flops or self.moved
        if seconds is None or work is None or not (self.split or which == "both"):
            return None
        return {"forward": work[0], "backward": work[1], "both": sum(work)}[which] / seconds

    def share(self, which: str) -> float | None:
        """The rate of what is executed, of the peak."""
        rate = self.rate(which)
        return None if rate is None or self.peak is None else rate * self.executed / self.peak


# ---- the file --------------------------------------------------------------------------------------------------------


def load(folder: Path, about: dict[str, Any]) -> list[Result]:
    """The rows that the folder's kernels.json holds; none without one. ValueError if they are of other circumstances,
    with which new ones would not compare.
    """
    path = folder / "kernels.json"
    if not path.exists():
        return []
    saved = json.loads(path.read_text())
    other = [f"{key} {saved.get(key)}, now {about[key]}" for key in CIRCUMSTANCES if saved.get(key) != about[key]]
    if other:
        raise ValueError(f"{path} was measured otherwise ({'; '.join(other)}): give another folder with --out")
    return [Result(**row) for row in saved["results"]]


def merged(old: Sequence[Result], new: Sequence[Result]) -> list[Result]:
    """The new rows in place of old ones of the same operation, sizes and name, or after them."""
    problems = {r.problem for r in new}
    kept = [r for r in old if r.name != INPUTS or r.problem not in problems]
    return list({(r.problem, r.name): r for r in [*kept, *new]}.values())


def save(results: Sequence[Result], about: dict[str, Any], folder: Path) -> None:
    """kernels.json, replaced as a whole (a run may be killed at any moment), and its tables, kernels.md."""
    unfinished = folder / "kernels.json.tmp"
    unfinished.write_text(json.dumps(about | {"results": [asdict(r) for r in results]}, indent=1) + "\n")
    unfinished.replace(folder / "kernels.json")
    words = [f"{key} {about[key]}" for key in CIRCUMSTANCES if about[key] is not None]
    (folder / "kernels.md").write_text(f"{', '.join(words)}\n\n{as_markdown(results)}")


# ---- tables ----------------------------------------------------------------------------------------------------------


def as_markdown(results: Sequence[Result]) -> str:
    """A table for each problem."""
    out = []
    for title, group in grouped(results, lambda r: r.problem).items():
        by_flops = any(r.flops for r in group)
        unit, peak = ("TFLOP/s", "a matmul") if by_flops else ("GB/s", "a copy")
        heads = ["", *(f"{w}, ms" for w in PASSES), f"dense {unit}: forward", "backward", "both"]
        heads += ["executed", f"{unit} executed", f"of {peak}: forward", "backward", "both"]
        heads += ["host, ms", "memory, MiB", "error", "of gradients", "remarks"]
        out += [f"### {title}\n", row(heads), row(["---"] * len(heads))]
        out += [row(cells(r, 1e12 if by_flops else 1e9)) for r in group]
        out.append("")
    return "\n".join(out)


def grouped(results: Iterable[Result], key: Callable[[Result], str]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(key(r), []).append(r)
    return groups


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells(r: Result, unit: float) -> list[str]:
    def shown(x: float | None, form: str, unit: float = 1.0) -> str:
        return "" if x is None else format(x / unit, form)

    which = "both" if r.seconds.get("both") else "forward"
    rate, host = r.rate(which), r.host_seconds.get(which)
    remarks = [f"in {r.implementation}" if r.implementation else "", "does less: no ALiBi" if r.bound else "", r.note]
    remarks.append("" if r.split else "its forward computes the gradients")
    return [
        r.name,
        *(shown(r.median(w), ".3f", 1e-3) for w in PASSES),
        *(shown(r.rate(w), ".3g", unit) for w in PASSES),
        shown(r.executed if r.seconds else None, ".0%"),
        shown(None if rate is None else rate * r.executed, ".3g", unit),
        *(shown(r.share(w), ".0%") for w in PASSES),
        shown(statistics.median(host) if host else None, ".2f", 1e-3),
        shown(r.memory_mib, ".0f"),
        shown(r.error, ".1e"),
        shown(r.gradient_error, ".1e"),
        "; ".join(filter(None, remarks)).replace("|", " "),
    ]


# ---- plots -----------------------------------------------------------------------------------------------------------


def plot(results: Sequence[Result], folder: Path) -> list[Path]:
    """Milliseconds over the length, a picture for each operation and what else differs; single lengths give none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def curve(r: Result) -> str:
        rest = [f"{k}-{v:g}" if isinstance(v, float) else f"{k}-{v}" for k, v in r.sizes.items()]
        return "-".join([r.op, *rest[1:]])

    written = []
    for name, group in grouped((r for r in results if r.seconds), curve).items():
        length = next(iter(group[0].sizes))
        if len({r.sizes[length] for r in group}) < 2:
            continue
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        for axis, which in zip(axes, ("forward", "both")):
            for contender in dict.fromkeys(r.name for r in group):
                points = [(r.sizes[length], r.median(which)) for r in group if r.name == contender]
                drawn = sorted((x, y * 1e3) for x, y in points if y is not None)
                if drawn:
                    axis.plot(*zip(*drawn), marker="o", label=contender)
            axis.set(xscale="log", yscale="log", xlabel=length, ylabel="ms", title=f"{which} (both: with backward)")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
        figure.suptitle(name)
        path = folder / f"kernels-{name}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        written.append(path)
    return written

"""One training step on this CPU, ours against transformers' MPT: time, memory, the floor, where the time goes.

A step is forward with loss, backward and AdamW. Both models have the same weights and data and take turns in one
process, medians are compared: ours with fused AdamW, transformers' MptForCausalLM with its own loss and torch's AdamW
as it comes. Peak memory is that of a process which runs one model only, less what it was before the model was made.
The floor is the matrix products with the weights, forward and backward, each by the faster of torch.mm and our own
product, and fused AdamW: no attention, norms, softmax.
Example: python scripts/bench_train.py --case 125m --repeat 5
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from kernels.product import product
from mpt import MptConfig, MptForCausalLM
from mpt.initialize import init_weights


@dataclass(frozen=True)
class Case:
    """A shape, and the ratios to reach: speed per precision and memory, both against transformers."""

    d_model: int
    n_heads: int
    n_layers: int
    vocab_size: int
    seq_len: int
    batch: int
    speed: dict[str, float]
    memory: float


CASES = {
    "125m": Case(768, 12, 12, 50368, 1024, 1, {"fp32": 1.7, "bf16": 2.2}, 0.75),
    "4096": Case(768, 12, 4, 50368, 4096, 1, {"fp32": 2.0, "bf16": 3.0}, 0.5),
}


def main() -> int:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = {
        k: v for k in ("d_model", "n_heads", "n_layers", "vocab_size", "seq_len", "batch") if (v := getattr(args, k))
    }
    if args.only:
        print(json.dumps(peak_memory(args.only, replace(CASES[args.case[0]], **sizes), args.precision[0])))
        return 0
    results = []
    for name in args.case:
        case = replace(CASES[name], **sizes)
        for precision in args.precision:
            result = {"case": name, "precision": precision, "shape": asdict(case)} | measure(case, precision, args)
            if not args.no_memory:
                result["memory"] = {who: memory_of(who, name, precision, sizes, args) for who in ("ours", "theirs")}
            report(result, case)
            results.append(result)
    if args.json:
        about = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "cpu_time": args.cpu_time,
        }
        args.json.write_text(json.dumps(about | {"torch": torch.__version__, "results": results}, indent=2) + "\n")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="shapes (default: all)")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--repeat", type=int, default=5, help="timed steps of each model, after one untimed")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds: for a machine that is not idle, with --threads 1"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--no-theirs", action="store_true", help="time our model and the floor only")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    for name in ("d-model", "n-heads", "n-layers", "vocab-size", "seq-len", "batch"):
        parser.add_argument(f"--{name}", type=int, help="instead of the case's")
    parser.add_argument("--only", choices=["ours", "theirs"], help=argparse.SUPPRESS)  # a process that measures memory
    return parser.parse_args()


# ---- the two models
# ---------------------------------------------------------------------------------------------------


def build_ours(case: Case) -> MptForCausalLM:
    shape = {k: getattr(case, k) for k in ("d_model", "n_heads", "n_layers", "vocab_size")}
    with torch.device("meta"):
        model = MptForCausalLM(MptConfig(**shape, max_seq_len=case.seq_len))
    model = model.to_empty(device="cpu")
    init_weights(model, seed=0)
    return model.train()


def build_theirs(case: Case, weights: dict[str, Tensor]) -> nn.Module:
    from transformers import MptConfig as TheirConfig
    from transformers import MptForCausalLM as TheirModel

    shape = {k: getattr(case, k) for k in ("d_model", "n_heads", "n_layers", "vocab_size")}
    model = TheirModel(TheirConfig(**shape, max_seq_len=case.seq_len, use_cache=False))
    model.load_state_dict(weights, strict=False)
    return model.train()


def autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, precision: str) -> Callable[[], float]:
    """A function that does one step and returns the loss."""

    def step() -> float:
        with autocast(precision):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def tokens(case: Case) -> Tensor:
    return torch.randint(case.vocab_size, (case.batch, case.seq_len), generator=torch.Generator().manual_seed(0))


# ---- time
# -------------------------------------------------------------------------------------------------------------


def measure(case: Case, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    ours = build_ours(case)
    fused = torch.optim.AdamW(ours.parameters(), lr=1e-5, fused=True)
    steps = {"ours": make_step(ours, fused, tokens(case), precision)}
    if not args.no_theirs:
        theirs = build_theirs(case, ours.state_dict())
        plain = torch.optim.AdamW(theirs.parameters(), lr=1e-5)
        steps["theirs"] = make_step(theirs, plain, tokens(case), precision)
    clock = time.process_time if args.cpu_time else time.perf_counter
    losses = {who: step() for who, step in steps.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.repeat):
        for who, step in steps.items():
            times[who].append(timed(step, clock))
    parts = operations(steps["ours"], statistics.median(times["ours"]))
    floor = floor_parts(case, precision, args.repeat, clock)
    return {"first_loss": losses, "seconds": dict(times), "operations": parts, "floor": floor}


def timed(step: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


def floor_parts(case: Case, precision: str, repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of the weights' matrix products (once forward, twice backward) and of fused AdamW, by part of the
    model.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    d, n = case.d_model, case.batch * case.seq_len
    weights = {"linear": [(3 * d, d), (d, d)], "mlp": [(4 * d, d), (d, 4 * d)]}
    parts = {name: [shape for _ in range(case.n_layers) for shape in shapes] for name, shapes in weights.items()}
    parts["linear_cross_entropy"] = [(case.vocab_size, d)]
    out = {
        name: min(
            statistics.median(timed(run, clock) for run in [products(shapes, n, dtype, multiply)] * repeat)
            for multiply in (lambda a, b: torch.mm(a, b.T), product)
        )
        for name, shapes in parts.items()
    }
    model = build_ours(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    out["optimizer"] = statistics.median(timed(optimizer.step, clock) for _ in range(repeat))
    return out


def products(
    shapes: list[tuple[int, int]], n: int, dtype: torch.dtype, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], None]:
    """y = x w^T, dx = dy w, dw = dy^T x, for each (out, in), by multiply(a, b) = a b^T; equal shapes share tensors."""
    tensors = {}
    for rows, columns in set(shapes):
        sizes = ((n, columns), (rows, columns), (n, rows))
        tensors[rows, columns] = [torch.randn(size).to(dtype) for size in sizes]

    def run() -> None:
        for shape in shapes:
            x, w, dy = tensors[shape]
            multiply(x, w)
            multiply(dy, w.T)
            multiply(dy.T, x.T)

    run()
    return run


# ---- where the time goes
# ----------------------------------------------------------------------------------------------


def operations(step: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Seconds by operation, forward and backward of kernels' operations together, the rest by torch's names.

    From one profiled step, scaled to the `seconds` of a step without the profiler.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    out: dict[str, float] = defaultdict(float)
    for event in profile.events():
        out[operation_of(event)] += event.self_cpu_time_total / 1e6
    scale = seconds / sum(out.values())
    return {name: spent * scale for name, spent in sorted(out.items(), key=lambda item: -item[1])}


def operation_of(event: Any) -> str:
    """Which operation an event is part of: the outermost one that has a name of ours, else its own."""
    chain = [event.name]
    while (event := event.cpu_parent) is not None:
        chain.append(event.name)
    for name in reversed(chain):
        if found := re.search(r"GeneratedBackwardFor_mpt_(\w+)_default", name):
            return found[1].removesuffix("_backward")
        if name.startswith("mpt::"):
            return name.removeprefix("mpt::").removesuffix("_backward")
        if name.startswith("Optimizer."):
            return "optimizer"
    for name in chain:
        if "MmBackward" in name or name in ("aten::linear", "aten::mm", "aten::addmm"):
            return "linear"
        if "embedding" in name.lower():
            return "embedding"
        if name in ("aten::copy_", "aten::to", "aten::_to_copy"):
            return "casts and copies"
        if "AccumulateGrad" in name:
            return "accumulating gradients"
    return chain[0].removeprefix("autograd::engine::evaluate_function: ")


# ---- memory
# -----------------------------------------------------------------------------------------------------------


def memory_of(who: str, case: str, precision: str, sizes: dict[str, int], args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", who, "--case", case, "--precision", precision]
    for name, value in (sizes | ({"threads": args.threads} if args.threads else {})).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak_memory(who: str, case: Case, precision: str) -> dict[str, float]:
    """GiB at the peak of two steps in this process, and after the imports."""
    if who == "theirs":
        import transformers.models.mpt.modeling_mpt

        assert transformers.models.mpt.modeling_mpt is not None
    torch.randn(64, 64) @ torch.randn(64, 64)
    imports = peak_gib()
    if who == "ours":
        model: nn.Module = build_ours(case)
    else:
        model = build_theirs(case, {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True if who == "ours" else None)
    step = make_step(model, optimizer, tokens(case), precision)
    step()
    step()
    return {"peak": peak_gib(), "imports": imports}


def peak_gib() -> float:
    """Of this process's resident memory. (getrusage's ru_maxrss would begin with that of the parent process.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


# ---- the report
# -------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any], case: Case) -> None:
    median = {who: statistics.median(times) for who, times in result["seconds"].items()}
    floor, parts, precision = result["floor"], result["operations"], result["precision"]
    shape = f"{case.d_model}/{case.n_heads}/{case.n_layers}, V {case.vocab_size}, S {case.seq_len}, batch {case.batch}"
    print(f"\n{result['case']} {precision}: {shape}, {torch.get_num_threads()} threads")
    for who, seconds in median.items():
        times = " ".join(f"{t:.2f}" for t in result["seconds"][who])
        print(f"  {who:8} {seconds:8.3f} s   first loss {result['first_loss'][who]:.4f}   steps {times}")
    print(f"  {'floor':8} {sum(floor.values()):8.3f} s   the weights' products and fused AdamW")
    if "theirs" in median:
        print(f"  speed    {median['theirs'] / median['ours']:8.2f} x   (to reach: {case.speed[precision]})")
    if "memory" in result:
        ours, theirs = result["memory"]["ours"], result["memory"]["theirs"]
        ratio = (ours["peak"] - ours["imports"]) / (theirs["peak"] - theirs["imports"])
        whole = ours["peak"] / theirs["peak"]
        print(f"  memory   {ratio:8.2f} x   (to reach: {case.memory}; less the imports; with them {whole:.2f} x)")
        for who, m in result["memory"].items():
            print(f"           {who}: peak {m['peak']:.2f} GiB, of which imports {m['imports']:.2f}")
    print(f"  {'ours, by operation':28} {'s':>8} {'floor':>8} {'above':>8}")
    shown = {name: seconds for name, seconds in parts.items() if seconds > 0.004 * median["ours"] or name in floor}
    for name, seconds in shown.items():
        least = floor.get(name, 0.0)
        print(f"  {name:28} {seconds:8.3f} {least:8.3f} {seconds - least:8.3f}")
    rest = sum(parts.values()) - sum(shown.values())
    print(f"  {'everything else':28} {rest:8.3f} {0.0:8.3f} {rest:8.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""metrics.jsonl read back: cut to the step that a run resumes from, summed up, drawn as loss.png."""

import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


def plain(value: Any) -> Any:
    """`value` as strict JSON has it: numbers that are not finite become null, foreign scalars and paths plain ones."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.ndim == 0):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file such that no reader, and no crash, ever sees half of it."""
    temporary = _temporary(path)
    with temporary.open("xb") as new:
        new.write(content)
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    """The name to write under first, free: a link left there is removed, and what it leads to stays as it is."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    return temporary


def drop_rows(path: Path, resume_step: int) -> int:
    """Rewrite `path` without rows past resume_step and without lines that are no rows; returns how many those were."""
    temporary, dropped = _temporary(path), 0
    with path.open("rb") as old, temporary.open("xb") as new:
        for line in old:
            row = _parse(line)
            if row is not None and row["step"] <= resume_step:
                new.write(line)
            else:
                dropped += 1
        new.flush()
        os.fsync(new.fileno())
    if dropped:
        temporary.replace(path)
    else:
        temporary.unlink()
    return dropped


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl as a row; None for one that a crash tore."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


@dataclass
class History:
    """What metrics.jsonl tells: (step, loss) points, the throughput of this process's rows, the last tokens."""

    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    tokens_per_s: list[float]
    tokens_per_step: float

    @classmethod
    def read(cls, path: Path, resume_step: int) -> "History":
        history = cls([], [], [], 0.0)
        for row in _rows(path):
            if row.get("eval_loss") is not None:
                history.validation.append((row["step"], row["eval_loss"]))
            if row.get("loss") is not None:
                history.train.append((row["step"], row["loss"]))
            if row.get("tokens_per_s") is not None and row["step"] > resume_step:
                history.tokens_per_s.append(row["tokens_per_s"])
            if row.get("tokens") and row["step"]:
                history.tokens_per_step = row["tokens"] / row["step"]
        return history

    def summary(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if self.train:
            out["loss"] = self.train[-1][1]
            out["perplexity"] = _perplexity(self.train[-1][1])
        if self.validation:
            out["eval_loss"] = self.validation[-1][1]
            out["eval_perplexity"] = _perplexity(self.validation[-1][1])
            out["best_eval_step"], out["best_eval_loss"] = min(self.validation, key=lambda point: point[1])
        if self.tokens_per_s:
            out["tokens_per_s"] = statistics.median(self.tokens_per_s)
        return out

    def plot(self, path: Path, title: str, unigram_entropy: float | None) -> None:
        """Draw training and validation loss over the steps; nothing if there is no point yet."""
        if not self.train and not self.validation:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if self.train:
            steps, losses = _thinned(self.train, 2000)
            axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training")
            steps, losses = _thinned(self.train, 60)
            axes.plot(steps, losses, color="tab:blue", linewidth=2, label="training, mean of neighbours")
        if self.validation:
            steps, losses = _thinned(self.validation, 2000)
            label = f"validation, {self.validation[-1][1]:.3f} at the end"
            axes.plot(steps, losses, color="tab:orange", marker="o", markersize=4, label=label)
        if unigram_entropy is not None:
            label = f"unigram entropy, {unigram_entropy:.3f}"
            axes.axhline(unigram_entropy, color="tab:gray", linestyle="--", label=label)
        axes.set_title(title)
        axes.set_xlabel(f"step ({self.tokens_per_step:,.0f} tokens each)")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        temporary = _temporary(path)
        with temporary.open("xb") as new:
            figure.savefig(new, dpi=120, format="png")
        temporary.replace(path)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for line in lines:
            row = _parse(line)
            if row is not None:
                yield row


def _thinned(points: list[tuple[int, float]], limit: int) -> tuple[list[float], list[float]]:
    """At most `limit` points, each the mean of as many neighbours."""
    blocks = np.array_split(np.array(points, dtype=np.float64), min(limit, len(points)))
    means = [block.mean(axis=0) for block in blocks]
    return [float(m[0]) for m in means], [float(m[1]) for m in means]


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def versions() -> dict[str, str | None]:
    """Versions of what computed: Python, this package, torch and CUDA, triton, numpy."""
    out: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("mpt-train", "torch", "triton", "numpy"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = None
    out["cuda"] = torch.version.cuda
    return out

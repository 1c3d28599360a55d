"""What a run measures of itself: FLOPs, the device's peak, time per part of a step, memory, a profiler trace."""

import contextlib
import re
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mpt import MptForCausalLM
from mpt.config import MptConfig
from mpt.context import ContextSplit
from mpt.heads import shift_labels
from mpt.outputs import BaseModelOutputWithPastAndCrossAttentions
from trainer.errors import InputError

Part = Literal["data", "forward", "backward", "optimizer", "save"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "optimizer", "save")

# Dense bf16 tensor-core peak in FLOP/s of one torch device, by the name that torch reports for it (matched whole).
# Vendors' data sheets; where they print the figure with 2:4 sparsity, half of it. docs/metrics.md lists the sources.
BF16_PEAKS: tuple[tuple[str, float], ...] = (
    (r"(NVIDIA )?A100[- ].*", 312e12),
    (r"NVIDIA H100 PCIe", 756.5e12),
    (r"NVIDIA H100 NVL", 835.5e12),
    (r"NVIDIA H100( SXM.*| 80GB HBM3)", 989.5e12),
    (r"NVIDIA H200 NVL", 835.5e12),
    (r"NVIDIA H200( SXM.*)?", 989.5e12),
    (r"NVIDIA GH200.*", 989.5e12),
    (r"NVIDIA B200( SXM.*)?", 2250e12),
    (r"NVIDIA GB200.*", 2500e12),
    (r"NVIDIA L40S", 362.05e12),
    (r"NVIDIA A10G", 70e12),
    (r"NVIDIA GeForce RTX 4090", 165.2e12),
    (r"NVIDIA GeForce RTX 3090", 71.2e12),
    # The card's 383 TFLOP/s belong to two chips, and torch shows each chip as a device.
    (r"AMD Instinct MI250X", 191.5e12),
    (r"AMD Instinct MI300X.*", 1307.4e12),
)


@dataclass(frozen=True)
class ProfileConfig:
    """A torch profiler trace of rank 0. start: steps to leave out, counted from where this process began (the first
    ones compile and allocate). steps: how many to record.
    """

    start: int = 10
    steps: int = 3

    def __post_init__(self) -> None:
        if self.start < 0:
            raise InputError(f"profile.start={self.start} is a number of steps to leave out, at least 0")
        if self.steps < 1:
            raise InputError(f"profile.steps={self.steps} is a number of steps to record, at least 1")


def flops_per_token(model_config: MptConfig, seq_len: int, adapters: int | None = None) -> float:
    """FLOPs that training on one token takes, forward and backward, at sequences of seq_len tokens.

    6 per weight of every matrix that multiplies (2 forward, 4 backward; lm_head counts, tied or not, the embedding
    lookup does not), plus attention 12 * n_layers * d_model * seq_len: two products, each with seq_len keys per query.
    As is the field's convention (PaLM, arXiv:2204.02311, appendix B) attention counts the whole S x S square although
    half of it is masked, and recomputation by activation checkpointing counts nothing.

    adapters: parameters of LoRA's, where these train alone: 6 for each, and 4 per weight of the frozen base, which
    needs no gradient.
    """
    c = model_config
    per_layer = c.d_model * (c.n_heads + 2 * c.kv_heads) * c.d_head  # Wqkv
    per_layer += c.d_model * c.d_model + 2 * c.d_model * c.d_ffn  # out_proj, up_proj, down_proj
    matrices = c.n_layers * per_layer + c.vocab_size * c.d_model
    own = 6.0 * matrices if adapters is None else 4.0 * matrices + 6.0 * adapters
    return own + 12.0 * c.n_layers * c.d_model * seq_len


def peak_of_name(name: str, dtype: torch.dtype) -> float | None:
    """The dense peak in FLOP/s for a name as torch.cuda.get_device_name gives it; None for one that is not listed.

    Only bf16 and fp16 have one (the same figure). Slices (MIG), laptop and cut-down variants are not their namesakes.
    """
    if dtype not in (torch.bfloat16, torch.float16) or "MIG" in name:
        return None
    return next((peak for pattern, peak in BF16_PEAKS if re.fullmatch(pattern, name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's dense peak in FLOP/s at `dtype`, by its name; None where it is not known, as for every CPU."""
    return peak_of_name(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def memory_gib(device: torch.device) -> float:
    """The most memory that this process has held so far, in GiB: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


class TokenAccuracy:
    """How many labels are the model's likeliest next token, counted in the forwards inside `with`.

    `expect` says the labels of each forward before it. The head is applied to the counted positions only, a chunk at a
    time, and inside the forward, where a sharded model's weights are whole.
    """

    CHUNK = 2**25  # logits at once

    def __init__(self, model: MptForCausalLM) -> None:
        self._model = model
        self._labels: torch.Tensor | None = None
        self.correct = 0

    def expect(self, labels: torch.Tensor, context: ContextSplit | None = None) -> None:
        """Labels (B, S), whole and not shifted, of the next forward; `context` as the model's."""
        labels = shift_labels(labels)
        self._labels = labels if context is None else context.take(labels)

    def __enter__(self) -> "TokenAccuracy":
        self._handle = self._model.transformer.register_forward_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _count(self, _: torch.nn.Module, __: object, output: BaseModelOutputWithPastAndCrossAttentions) -> None:
        assert self._labels is not None and output.last_hidden_state is not None
        labels = self._labels.to(output.last_hidden_state.device)
        counted = labels != -100
        hidden, labels = output.last_hidden_state[counted], labels[counted]
        weight = self._model.get_output_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        size = max(1, self.CHUNK // weight.shape[0])
        for part, wanted in zip(hidden.split(size), labels.split(size)):
            likeliest = torch.nn.functional.linear(part, weight.to(part.dtype)).argmax(-1)
            self.correct += int((likeliest == wanted).sum())


@dataclass(frozen=True)
class Window:
    """What happened since the last window. steps: uses of the "optimizer" part. seconds: wall time. parts: seconds."""

    steps: int
    seconds: float
    parts: dict[Part, float]


class StepTimer:
    """Seconds that each part of a step takes: `with timer("forward"): ...`; parts must not contain one another.

    On a GPU forward, backward and optimizer are measured on its stream, with events that are read only when a window
    is taken: no step waits. Data and save are the host's time everywhere.
    """

    def __init__(self, device: torch.device) -> None:
        on_stream = ("forward", "backward", "optimizer") if device.type == "cuda" else ()
        self._spans: dict[Part, _HostSpan | _StreamSpan] = {
            part: _StreamSpan() if part in on_stream else _HostSpan() for part in PARTS
        }
        self._reported: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._steps = 0
        self._excluded = 0.0
        self._started = self._mark = time.perf_counter()

    def __call__(self, part: Part) -> "_HostSpan | _StreamSpan":
        return self._spans[part]

    def skip(self) -> None:
        """Leave the time since the last part out of the window: evaluation, say, is no training."""
        last_end = max(span.ended for span in self._spans.values())
        now = time.perf_counter()
        self._excluded += now - max(self._mark, last_end)
        self._mark = now

    def window(self) -> Window:
        """What happened since the last window, or since the start; begins the next one. Waits for the GPU."""
        totals = self.totals()
        parts: dict[Part, float] = {part: totals[part] - self._reported[part] for part in PARTS}
        steps = self._spans["optimizer"].uses - self._steps
        now = time.perf_counter()
        seconds = now - self._started - self._excluded
        self._reported, self._steps, self._excluded = totals, self._steps + steps, 0.0
        self._started = self._mark = now
        return Window(steps, seconds, parts)

    def totals(self) -> dict[Part, float]:
        """Seconds per part since the start. Waits for the GPU."""
        return {part: span.read() for part, span in self._spans.items()}


class _HostSpan:
    """Time on this thread's clock between entry and exit, added up."""

    def __init__(self) -> None:
        self.uses = 0
        self.ended = 0.0
        self._total = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.ended = time.perf_counter()
        self._total += self.ended - self._began
        self.uses += 1

    def read(self) -> float:
        return self._total


class _StreamSpan:
    """Time on the current CUDA stream between entry and exit, added up when it is read."""

    def __init__(self) -> None:
        self.uses = 0
        self.ended = 0.0
        self._total = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        self._pairs.append(pair)

    def __exit__(self, *_: object) -> None:
        self._pairs[-1][1].record()
        self.ended = time.perf_counter()
        self.uses += 1

    def read(self) -> float:
        if self._pairs:
            self._pairs[-1][1].synchronize()
            self._total += sum(start.elapsed_time(end) for start, end in self._pairs) / 1000
            self._pairs.clear()
        return self._total


@contextlib.contextmanager
def profiler(config: ProfileConfig | None, folder: Path, *, rank: int) -> Iterator[Callable[[], None]]:
    """Record a torch profiler trace of the configured steps on rank 0; call what it yields after every step.

    The trace, with shapes and memory, is `folder`/trace-START-END.json.gz (for chrome://tracing or Perfetto), written
    once its last step is done or the block is left. Without a configuration, or on another rank, nothing happens.
    """
    if config is None or rank != 0:
        yield lambda: None
        return
    recording = _Recording(config, folder)
    try:
        yield recording.step
    finally:
        recording.stop()


class _Recording:
    """One profile: started before step `config.start` of this process, stopped `config.steps` later."""

    def __init__(self, config: ProfileConfig, folder: Path) -> None:
        self._config, self._folder, self._done = config, folder, 0
        self._profile: torch.profiler.profile | None = None
        self._start_if_due()

    def step(self) -> None:
        self._done += 1
        if self._done == self._config.start + self._config.steps:
            self.stop()
        self._start_if_due()

    def _start_if_due(self) -> None:
        if self._done == self._config.start:
            self._profile = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profile.start()

    def stop(self) -> None:
        """End the recording, if there is one, and write it."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"trace-{self._config.start}-{self._done}.json.gz"
        temporary = path.with_name("unfinished-" + path.name)
        profile.export_chrome_trace(str(temporary))
        temporary.replace(path)

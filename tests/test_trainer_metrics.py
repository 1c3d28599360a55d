"""FLOPs counted by hand and by torch, the table of peaks, the step timer, and the profiler's trace."""

import gzip
import json
import resource
import time
from dataclasses import dataclass

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from mpt.config import MptConfig
from trainer import metrics
from trainer.errors import InputError
from trainer.metrics import (
    PARTS,
    ProfileConfig,
    StepTimer,
    flops_per_token,
    memory_gib,
    peak_flops,
    peak_of_name,
    profiler,
)

CPU = torch.device("cpu")


def test_flops_of_mpt_7b_by_hand():
    config = MptConfig(d_model=4096, n_heads=32, n_layers=32, vocab_size=50432, max_seq_len=2048)
    # 12 d^2 per layer and the head: 6,649,286,656 parameters less the norms' 65 * 4096.
    matrices = 32 * 12 * 4096**2 + 50432 * 4096
    assert matrices == 6_649_286_656 - 65 * 4096
    assert flops_per_token(config, 2048) == 6 * matrices + 12 * 32 * 4096 * 2048


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"attn_type": "multiquery_attention"},
        {"attn_type": "grouped_query_attention", "kv_n_heads": 2},
    ],
)
def test_flops_equal_those_that_torch_counts(attention):
    """A forward and backward written as plain products, counted by torch: the same number, exactly."""
    seq, config = (
        24,
        MptConfig(
            d_model=32,
            n_heads=4,
            n_layers=3,
            vocab_size=48,
            expansion_ratio=3,
            attn_config={"alibi": True, **attention},
        ),
    )
    d, heads, head_dim = 32, 4, 8
    groups = config.kv_heads
    layers = [
        [torch.randn(out, inp, requires_grad=True) for out, inp in
         (((heads + 2 * groups) * head_dim, d), (d, d), (3 * d, d), (d, 3 * d))]
        for _ in range(3)
    ]  # fmt: skip
    head = torch.randn(48, d, requires_grad=True)
    x = torch.randn(seq, d, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = x
        for wqkv, out_proj, up, down in layers:
            q, k, v = (y @ wqkv.T).split([d, groups * head_dim, groups * head_dim], dim=1)
            q, k, v = (t.reshape(seq, -1, head_dim).transpose(0, 1) for t in (q, k, v))
            k, v = (t.repeat_interleave(heads // groups, dim=0) for t in (k, v))
            y = ((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(0, 1).reshape(seq, d) @ out_proj.T
            y = (y @ up.T) @ down.T
        (y @ head.T).sum().backward()
    assert flops_per_token(config, seq) * seq == counter.get_total_flops()


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71.2),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A10", None),
        ("NVIDIA H100 of the future", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks(name, teraflops):
    expected = teraflops and pytest.approx(teraflops * 1e12)
    assert peak_of_name(name, torch.bfloat16) == expected
    assert peak_of_name(name, torch.float16) == expected
    assert peak_of_name(name, torch.float32) is None


def test_a_cpu_has_no_peak():
    assert peak_flops(CPU, torch.bfloat16) is None


def test_memory_is_the_resident_peak():
    before = memory_gib(CPU)
    block = torch.ones(64 * 2**20)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    assert memory_gib(CPU) == pytest.approx(used, rel=0.01)
    del block
    assert memory_gib(CPU) >= max(before, 64 * 4 / 1024)


class Clock:
    """Stands in for time.perf_counter: moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    return clock


def test_timer_windows_parts_and_totals(clock):
    timer = StepTimer(CPU)
    for _ in range(2):
        for part, seconds in (("data", 1.0), ("forward", 2.0), ("forward", 2.0), ("backward", 5.0), ("optimizer", 0.5)):
            with timer(part):
                clock.now += seconds
        clock.now += 0.25
    window = timer.window()
    assert (window.steps, window.seconds) == (2, 21.5)
    assert window.parts == {"data": 2.0, "forward": 8.0, "backward": 10.0, "optimizer": 1.0, "save": 0.0}
    with timer("optimizer"):
        clock.now += 1
    with timer("save"):
        clock.now += 3
    window = timer.window()
    assert (window.steps, window.seconds) == (1, 4.0)
    assert window.parts == {"data": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 1.0, "save": 3.0}
    assert timer.totals() == {"data": 2.0, "forward": 8.0, "backward": 10.0, "optimizer": 2.0, "save": 3.0}
    assert tuple(window.parts) == PARTS


def test_timer_skips_what_is_no_training(clock):
    timer = StepTimer(CPU)
    with timer("optimizer"):
        clock.now += 2
    clock.now += 50
    timer.skip()
    clock.now += 30
    timer.skip()
    with timer("save"):
        clock.now += 1
    assert timer.window().seconds == 3.0
    clock.now += 7
    timer.skip()
    with timer("optimizer"):
        clock.now += 1
    assert timer.window().seconds == 1.0


def test_timer_counts_a_part_that_raises(clock):
    timer = StepTimer(CPU)
    with pytest.raises(RuntimeError), timer("forward"):
        clock.now += 2
        raise RuntimeError
    assert timer.totals()["forward"] == 2.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_timer_reads_the_stream_on_a_gpu():
    device = torch.device("cuda")
    timer = StepTimer(device)
    a = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    began = time.perf_counter()
    with timer("forward"):
        for _ in range(50):
            a = (a @ a).clamp(-1, 1)
    queued = time.perf_counter() - began
    with timer("optimizer"):
        a.add_(1)
    window = timer.window()
    assert window.parts["forward"] > queued and window.steps == 1
    assert window.parts["forward"] + window.parts["optimizer"] <= window.seconds * 1.05


@pytest.mark.parametrize("values, words", [({"start": -1}, "profile.start=-1"), ({"steps": 0}, "profile.steps=0")])
def test_bad_profile_values(values, words):
    with pytest.raises(InputError, match=words):
        ProfileConfig(**values)


def test_profile_is_a_structured_configuration():
    @dataclass(frozen=True)
    class Outer:
        profile: ProfileConfig | None = None

    merged = OmegaConf.merge(OmegaConf.structured(Outer), {"profile": {"start": 3}})
    assert OmegaConf.to_object(merged).profile == ProfileConfig(start=3, steps=3)


def _steps(config, folder, steps, rank=0):
    with profiler(config, folder, rank=rank) as after_step:
        for i in range(steps):
            with torch.profiler.record_function(f"step number {i}"):
                torch.ones(3) + 1
            after_step()


def test_profiler_records_the_asked_steps(tmp_path):
    _steps(ProfileConfig(start=1, steps=2), tmp_path / "profile", steps=5)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "trace-1-3.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"step number 1", "step number 2"} <= names
    assert not names & {"step number 0", "step number 3"}


def test_profiler_keeps_what_a_short_run_gave(tmp_path):
    _steps(ProfileConfig(start=0, steps=100), tmp_path, steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["trace-0-2.json.gz"]


def test_profiler_does_nothing_unasked(tmp_path):
    _steps(None, tmp_path, steps=3)
    _steps(ProfileConfig(start=0, steps=1), tmp_path, steps=3, rank=1)
    _steps(ProfileConfig(start=9, steps=1), tmp_path, steps=3)
    assert not list(tmp_path.iterdir())

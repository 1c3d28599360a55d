"""The benchmark of kernels: what its figures mean, what it does when something fails, and small runs."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from scripts import bench_kernels, bench_report
from scripts.bench_kernels import FLEX_BLOCK, HEAD_START, Absent, BrokenDevice, Contender, Exact, Problem, Way
from scripts.bench_report import Result

SMALL = "--head-dim 16 --heads 2 --d-model 32 --vocab-size 64 --repeat 1"
PEAKS = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e9}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """Kernels are interpreted in these tests. And a garbage collection takes a third of a second."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_kernels, "gc", SimpleNamespace(collect=lambda: 0))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], int]:
    """A run into tmp_path, without what takes seconds."""
    monkeypatch.setattr(bench_kernels, "measure_peaks", lambda args: PEAKS)
    monkeypatch.setattr(bench_kernels, "plot", lambda results, folder: [folder / f"a plot of {len(results)}"])

    def run(options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *options.split(), "--out", str(tmp_path)])
        return bench_kernels.main()

    return run


def saved(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "kernels.json").read_text())["results"]


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures():
    seconds = {"forward": [0.3, 0.1, 0.2], "both": [0.5, 0.7, 0.6]}
    result = Result("op", {"s": 1}, "ours", executed=0.25, seconds=seconds, flops=(1.0, 2.5), peak=100.0)
    assert [result.median(w) for w in ("forward", "backward", "both")] == pytest.approx([0.2, 0.4, 0.6])
    assert [result.rate(w) for w in ("forward", "backward", "both")] == pytest.approx([5.0, 6.25, 3.5 / 0.6])
    assert result.share("backward") == pytest.approx(6.25 * 0.25 / 100)
    result.host_seconds, result.implementation = {"both": [0.003, 0.001, 0.002]}, "triton"
    cells = bench_report.cells(result, unit=1.0)
    assert cells[:4] == ["ours", "200.000", "400.000", "600.000"]
    assert cells[4:13] == ["5", "6.25", "5.83", "25%", "1.46", "1%", "2%", "1%", "2.00"]
    assert cells[-1] == "in triton"


def test_a_row_without_figures():
    empty = Result("op", {"s": 1}, "ours", note="OutOfMemoryError: no")
    assert bench_report.cells(empty, 1.0) == ["ours", *[""] * 15, "OutOfMemoryError: no"]
    noise = Result("op", {"s": 1}, "ours", seconds={"forward": [0.2], "both": [0.1]}, flops=(1.0, 1.0))
    assert noise.median("backward") is None and noise.rate("backward") is None


def test_a_forward_that_computes_gradients_has_one_rate():
    result = Result("op", {"s": 1}, "ours", seconds={"forward": [0.2], "both": [0.25]}, flops=(1.0, 1.5), split=False)
    assert [result.rate(w) for w in ("forward", "backward", "both")] == [None, None, 10.0]
    assert bench_report.cells(result, 1.0)[-1] == "its forward computes the gradients"


def test_peaks(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    assert min(bench_kernels.measure_peaks(bench_kernels.parse_args()).values()) > 0


def test_a_loss_gets_the_gradient_one():
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    both = bench_kernels.make_passes(Way(lambda: (x * x).sum()), [x], True)["both"]
    assert torch.equal(both()[0], torch.tensor([2.0, 6.0]))


def test_a_gpu_sleeps_while_the_host_launches(monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return 2.0  # milliseconds

    def note(word: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: done.append(word if word != "sleep" else f"sleep {args[0]}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", note("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", note("synchronize"))
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: SimpleNamespace(zero_=note("zero")))
    bench_kernels.head_start_cycles.cache_clear()
    cycles = bench_kernels.head_start_cycles()
    bench_kernels.head_start_cycles.cache_clear()
    assert cycles == int(1_000_000 * HEAD_START / 2e-3)
    monkeypatch.setattr(bench_kernels, "head_start_cycles", lambda: cycles)
    done.clear()
    seconds, host = bench_kernels.timed(note("run"), argparse.Namespace(device=torch.device("cuda")))
    assert done == ["zero", f"sleep {cycles}", "record", "run", "record", "synchronize"]
    assert seconds == pytest.approx(2e-3) and host is not None and host < HEAD_START


# ---- blocks ----------------------------------------------------------------------------------------------------------


def masks_of(form: str) -> dict[str, Tensor]:
    s = 5 * FLEX_BLOCK
    if form == "documents":
        ids = torch.zeros(2, s, dtype=torch.long)
        for row, starts in enumerate([(128, 300, 301), (1, 512)]):
            ids[row, list(starts)] = 1
        return {"sequence_id": ids.cumsum(1)}
    if form == "padded":
        return {"attention_mask": torch.arange(s) < torch.tensor([[300], [256]])}
    return {}


@pytest.mark.parametrize("form", ["causal", "documents", "padded"])
def test_blocks_are_those_that_torch_finds(form: str):
    masks = masks_of(form)
    s, see = 5 * FLEX_BLOCK, bench_kernels.visible(5 * FLEX_BLOCK, masks_of(form), torch.device("cpu"))

    def mask(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return see[batch if len(see) > 1 else 0, i, j]

    some, every = bench_kernels.visible_blocks(s, masks, torch.device("cpu"))
    ours = bench_kernels.block_mask(some, every, mask)
    theirs = create_block_mask(mask, len(see), 1, s, s, device="cpu", BLOCK_SIZE=FLEX_BLOCK)
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)


def test_flex_attention(bench, monkeypatch, tmp_path):
    """Uncompiled, which takes no compiler; with fewer blocks from our bound, and the same result."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(bench_kernels, "compiled", lambda run: run)
    forms = "--op attention --form causal documents padded --norm 11 --alibi-bias-max 2"
    assert bench(f"{SMALL} {forms} --seq-len 96 512 --contender flex") == 0
    rows = saved(tmp_path)
    assert len(rows) == 12
    for r in rows:
        if r["sizes"]["s"] == 96:
            assert not r["seconds"] and r["note"] == "its blocks are made here for multiples of 128 only"
        else:
            assert list(r["seconds"]) == ["forward"] and r["error"] < 1e-4 and r["note"] == "no backward on a CPU"
    shares = {(r["sizes"]["form"], r["name"]): r["executed"] for r in rows if r["seconds"]}
    assert shares["causal", "FlexAttention"] == 1.0
    assert shares["causal", "FlexAttention, our blocks"] < 1.0
    assert shares["padded", "FlexAttention"] == pytest.approx(9 / 10)  # the fourth block of keys is padding


# ---- failures --------------------------------------------------------------------------------------------------------


def out_of_memory() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")


class Failing:
    """A forward that works so many times."""

    def __init__(self, x: Tensor, times: int) -> None:
        self.x, self.left = x, times

    def __call__(self) -> Tensor:
        if self.left == 0:
            out_of_memory()
        self.left -= 1
        return self.x * 2


def absent() -> Way:
    raise Absent("needs a GPU")


def posed(x: Tensor, exact: Callable[[], Exact]) -> Problem:
    return Problem(
        [x],
        [
            Contender("works", lambda: Way(lambda: x * 2)),
            Contender("never built", out_of_memory),
            Contender("not here", absent),
            Contender("fails at once", lambda: Way(Failing(x, 0))),
            Contender("fails in its turn", lambda: Way(Failing(x, 6))),
            Contender("works too", lambda: Way(lambda: x + x, remark="slowly")),
        ],
        exact,
        moved=(1.0, 1.0),
    )


def options() -> argparse.Namespace:
    return argparse.Namespace(device=torch.device("cpu"), repeat=3, no_compile=True, no_backward=False, cpu_time=False)


def test_who_fails_is_reported_and_the_others_go_on():
    x = torch.randn(8, requires_grad=True)

    def exact() -> Exact:
        return Exact(None, [(2 * x.detach().double(), lambda out: out), (torch.full((8,), 2.0).double(), lambda g: g)])

    rows = {r.name: r for r in bench_kernels.measure("op", {"n": 8}, posed(x, exact), options(), PEAKS)}
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert {name: r.note for name, r in rows.items()} == {
        "works": "",
        "never built": reason,
        "not here": "needs a GPU",
        "fails at once": reason,
        "fails in its turn": reason,
        "works too": "slowly",
    }
    for name, r in rows.items():
        works = name.startswith("works")
        assert {which: len(s) for which, s in r.seconds.items()} == ({"forward": 3, "both": 3} if works else {})
        assert (r.error == 0) == (works or name == "fails in its turn")


def test_without_a_float64_reference_times_are_still_measured():
    x = torch.randn(8, requires_grad=True)
    rows = bench_kernels.measure("op", {"n": 8}, posed(x, out_of_memory), options(), PEAKS)
    assert [r.note.partition("no float64")[2][:18] for r in (rows[0], rows[-1])] == [": OutOfMemoryError"] * 2
    assert rows[-1].note.startswith("slowly; ")
    assert all(len(r.seconds["both"]) == 3 and r.error is None for r in (rows[0], rows[-1]))


@pytest.mark.parametrize(
    ("host", "note"), [(HEAD_START / 3, ""), (HEAD_START, "the host is slow or waits for the GPU")]
)
def test_host_time_in_a_time_is_said(monkeypatch, host, note):
    monkeypatch.setattr(bench_kernels, "timed", lambda run, args: (1e-3, host))
    x = torch.randn(8, requires_grad=True)
    first, *_ = bench_kernels.measure("op", {"n": 8}, posed(x, out_of_memory), options(), PEAKS)
    assert first.host_seconds == {"forward": [host] * 3, "both": [host] * 3}
    assert first.note.rpartition("; ")[2].startswith(note) and ("(forward, both)" in first.note) == bool(note)


def test_a_problem_that_cannot_be_posed(bench, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setitem(bench_kernels.PROBLEMS, "layer_norm", lambda args, **sizes: out_of_memory())
        assert bench(f"{SMALL} --op layer_norm --seq-len 8 --no-compile") == 0
    (row,) = saved(tmp_path)
    assert row["name"] == "inputs" and row["note"].startswith("OutOfMemoryError")
    assert bench(f"{SMALL} --op layer_norm --seq-len 8 --no-compile") == 0
    assert [r["name"] for r in saved(tmp_path)] == ["ours", "torch", "Liger"]


def test_a_gpu_that_refuses_all_work_ends_the_run(bench, monkeypatch, tmp_path, capsys):
    def fault() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand advice")

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    result = Result("mlp", {"tokens": 8, "d": 32}, "ours, fused", note="RuntimeError: first seen here")
    with pytest.raises(BrokenDevice) as broken:
        bench_kernels.release(result, torch.device("cuda"))

    def measure(op: str, *rest: Any) -> list[Result]:
        if op == "mlp":
            raise broken.value
        return [Result(op, {"tokens": 8, "d": 32}, "ours")]

    monkeypatch.setattr(bench_kernels, "measure", measure)
    assert bench(f"{SMALL} --op layer_norm mlp linear_cross_entropy --seq-len 8 --no-compile") == 1
    assert [(r["op"], r["name"]) for r in saved(tmp_path)] == [("layer_norm", "ours"), ("mlp", "ours, fused")]
    assert "start again without this contender" in capsys.readouterr().err


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run(bench, tmp_path, capsys):
    assert bench(f"{SMALL} --seq-len 96 --form causal documents padded --no-compile") == 0
    about = json.loads((tmp_path / "kernels.json").read_text())
    assert about["copy_bytes_per_s"] and about["triton"] and about["MPT_KERNELS"] is None
    results = about["results"]
    assert {r["op"] for r in results} == set(bench_kernels.OPERATIONS) == set(bench_kernels.PROBLEMS)
    assert {r["sizes"]["form"] for r in results if r["op"] == "attention"} == {"causal", "documents", "padded"}
    missing = {(r["name"], r["note"]) for r in results if not r["seconds"]}
    assert missing == {
        ("SDPA flash, no ALiBi", "it takes no masks"),
        ("SDPA cuDNN, no ALiBi", "it takes no masks"),
        ("SDPA cuDNN, no ALiBi", "needs a GPU"),
        ("Liger", "needs a GPU"),
        ("ours, fused", "a form of the Triton kernels; torch runs here"),
        ("ours, pointwise", "a form of the Triton kernels; torch runs here"),
    }
    for r in filter(lambda r: r["seconds"], results):
        backward = r["op"] != "decode_attention"
        assert {which: len(seconds) for which, seconds in r["seconds"].items()} == dict.fromkeys(
            ["forward", "both"] if backward else ["forward"], 1
        ), r
        assert r["bound"] == (r["error"] is None) and (r["bound"] or not backward) == (r["gradient_error"] is None)
        for error in (r["error"], r["gradient_error"]):
            assert error is None or error < 1e-4, r
        assert r["implementation"] == ("torch" if r["name"].startswith("ours") else "")
        assert r["split"] == ((r["op"], r["name"]) != ("linear_cross_entropy", "ours"))
    assert "SDPA with a bias" in capsys.readouterr().out
    assert "### attention: s 96" in (tmp_path / "kernels.md").read_text()


def test_scores_that_are_too_large_have_a_row(bench, tmp_path):
    assert (
        bench(f"{SMALL} --op attention --form causal --seq-len 96 --no-compile --memory-gib 1e-5 --contender bias") == 0
    )
    (row,) = saved(tmp_path)
    assert row["note"] == "its scores take 6.87e-05 GiB, and --memory-gib is 1e-05"


def test_both_forms_of_the_mlp(bench, monkeypatch, tmp_path):
    """In Triton's interpreter: each runs in its own form, backward too."""
    mlp = sys.modules["kernels.mlp"]
    calls: list[str] = []
    for kernel in ("_mlp_fwd_kernel", "_mlp_bwd_kernel", "_mlp_gelu_fwd_kernel", "_mlp_gelu_bwd_kernel"):
        launcher = getattr(mlp, kernel)

        class Spy:
            def __init__(self, launcher: Any, kernel: str) -> None:
                self.launcher, self.kernel = launcher, kernel

            def __getitem__(self, grid: Any) -> Any:
                calls.append(self.kernel)
                return self.launcher[grid]

        monkeypatch.setattr(mlp, kernel, Spy(launcher, kernel))
    monkeypatch.setenv("MPT_KERNELS", "triton")
    for form, used in (
        ("fused", ["_mlp_bwd_kernel", "_mlp_fwd_kernel"]),
        ("pointwise", ["_mlp_gelu_bwd_kernel", "_mlp_gelu_fwd_kernel"]),
    ):
        calls.clear()
        assert bench(f"{SMALL} --op mlp --seq-len 8 --no-compile --contender {form}") == 0
        assert sorted(set(calls)) == used
    for r, name in zip(saved(tmp_path), ["ours, fused", "ours, pointwise"], strict=True):
        assert r["name"] == name and r["implementation"] == "triton" and max(r["error"], r["gradient_error"]) < 1e-4


def test_runs_add_to_their_folder(bench, tmp_path, capsys):
    few = f"{SMALL} --op mlp --no-compile"
    assert bench(f"{few} --seq-len 8 16") == 0
    before = saved(tmp_path)
    assert bench(f"{few} --seq-len 16 24 --contender OURS") == 0
    after = saved(tmp_path)
    assert [r["name"] for r in after if r["sizes"]["tokens"] == 24] == ["ours", "ours, fused", "ours, pointwise"]
    for old, new in zip(before, after):
        assert (old["op"], old["sizes"], old["name"]) == (new["op"], new["sizes"], new["name"])
        measured_again = "ours" in new["name"] and new["sizes"]["tokens"] == 16 and new["seconds"]
        assert (old == new) != bool(measured_again)
        assert old["error"] == new["error"]  # of the same inputs
    tables = (tmp_path / "kernels.md").read_text()
    assert [tables.count(f"tokens {n}, d 32\n") for n in (8, 16, 24)] == [1, 1, 1]
    capsys.readouterr()
    assert bench(f"{few} --seq-len 16 24 --resume") == 0
    assert capsys.readouterr().out.count("| ours") == 0  # the others only
    assert [r["name"] for r in saved(tmp_path)[len(after) :]] == ["torch"]
    with pytest.raises(SystemExit, match=r"kernels.json was measured otherwise \(dtype fp32, now bf16\).*--out"):
        bench(f"{few} --seq-len 8 --dtype bf16")
    with pytest.raises(SystemExit, match="--contender cudnn: there are ours, ours, fused, ours, pointwise, torch"):
        bench(f"{few} --seq-len 8 --contender cudnn")


def test_the_end_of_a_slice(bench, monkeypatch, tmp_path, capsys):
    """After --minutes nothing more begins; an interrupted run has its tables and plots."""
    assert bench(f"{SMALL} --op layer_norm --seq-len 8 16 --minutes 0") == 0
    assert "2 of 2 problems left" in capsys.readouterr().err
    measure = bench_kernels.measure

    def interrupted(op: str, sizes: dict[str, Any], *rest: Any) -> list[Result]:
        if sizes["tokens"] == 24:
            raise KeyboardInterrupt
        return measure(op, sizes, *rest)

    monkeypatch.setattr(bench_kernels, "measure", interrupted)
    assert bench(f"{SMALL} --op layer_norm --seq-len 8 16 24 --no-compile") == 130
    assert {r["sizes"]["tokens"] for r in saved(tmp_path)} == {8, 16}
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.md"}
    assert "a plot of 6" in capsys.readouterr().err


def test_attention_is_varied_one_thing_at_a_time(monkeypatch):
    def cases(options: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *options.split()])
        return bench_kernels.cases(bench_kernels.parse_args())

    usual = {"form": "causal", "norm": 25.0, "alibi_bias_max": 8.0}
    assert cases("") == [
        usual,
        usual | {"form": "documents"},
        usual | {"form": "padded"},
        usual | {"norm": 11.0},
        usual | {"norm": 45.0},
        usual | {"alibi_bias_max": 16.0},
    ]
    assert cases("--norm 8 11") == [usual | {"norm": 8.0}, usual | {"norm": 11.0}]
    assert len(cases("--norm 8 11 --form causal padded --alibi-bias-max 8 16")) == 8


def test_plot(tmp_path):
    results = [
        Result("mlp", {"tokens": tokens, "d": 8}, name, seconds={"forward": [tokens / 1e6]})
        for tokens in (64, 128)
        for name in ("ours", "torch")
    ]
    results.append(Result("layer_norm", {"tokens": 64, "d": 8}, "Liger", note="not installed"))
    (path,) = bench_report.plot(results, tmp_path)  # one length is no curve
    assert path.name == "kernels-mlp-d-8.png"
    assert path.read_bytes().startswith(b"\x89PNG")

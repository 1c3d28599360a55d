"""The benchmark of kernels: what its figures mean, and one small run."""

import json
import sys

import pytest
import torch

from scripts import bench_kernels
from scripts.bench_kernels import FLEX_BLOCK, Result


def test_figures():
    seconds = {"forward": [0.3, 0.1, 0.2], "both": [0.5, 0.7, 0.6]}
    result = Result("op", {"s": 1}, "ours", bound=False, executed=0.25, seconds=seconds)
    assert [result.median(w) for w in ("forward", "backward", "both")] == pytest.approx([0.2, 0.4, 0.6])
    rates = [result.rate(w, (1.0, 2.5)) for w in ("forward", "backward", "both")]
    assert rates == pytest.approx([5.0, 6.25, 3.5 / 0.6])
    cells = bench_kernels.cells(result, peak=100.0, unit=1.0)
    assert cells[:4] == ["ours", "200.000", "400.000", "600.000"]
    empty = Result("op", {"s": 1}, "ours", bound=False, executed=1.0, note="OutOfMemoryError: no")
    assert bench_kernels.cells(empty, 100.0, 1.0)[-1] == "OutOfMemoryError: no"
    assert empty.median("backward") is None


@pytest.mark.parametrize("all_partial", [False, True])
def test_block_mask(all_partial):
    """Blocks from `first` to the diagonal, each once; the diagonal one, or all, with the mask."""
    first = torch.tensor([[[0, 0, 1, 3], [0, 1, 2, 0]]], dtype=torch.int32)

    def causal(batch, head, i, j):
        return i >= j

    mask = bench_kernels.block_mask(first, causal, all_partial)
    block = torch.arange(4)
    kept = (block[:, None] >= block) & (block >= first[..., None])
    assert torch.equal(mask.to_dense().bool(), kept)
    assert mask.shape == (1, 2, 4 * FLEX_BLOCK, 4 * FLEX_BLOCK)
    assert (mask.full_kv_num_blocks is None) == all_partial
    partial = mask.kv_num_blocks
    assert torch.equal(partial, kept.sum(-1).int() if all_partial else torch.ones_like(partial))


def test_a_run(monkeypatch, tmp_path, capsys):
    sizes = "--seq-len 96 --head-dim 16 --heads 2 --d-model 32 --vocab-size 64 --repeat 1"
    forms = "--form causal documents padded --no-compile"
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *sizes.split(), *forms.split(), "--out", str(tmp_path)])
    assert bench_kernels.main() == 0
    saved = json.loads((tmp_path / "kernels.json").read_text())
    assert saved["copy_bytes_per_s"] > 0
    results = saved["results"]
    assert {r["op"] for r in results} == set(bench_kernels.OPERATIONS)
    assert {r["sizes"]["form"] for r in results if r["op"] == "attention"} == {"causal", "documents", "padded"}
    for r in results:
        backward = r["op"] != "decode_attention"
        assert {which: len(seconds) for which, seconds in r["seconds"].items()} == dict.fromkeys(
            ["forward", "both"] if backward else ["forward"], 1
        ), r
        assert r["bound"] == (r["error"] is None) and (r["bound"] or not backward) == (r["gradient_error"] is None)
        for error in (r["error"], r["gradient_error"]):
            assert error is None or error < (0.05 if saved["dtype"] == "bf16" else 1e-4), r
    assert "SDPA with a bias" in capsys.readouterr().out
    assert "### attention: s 96" in (tmp_path / "kernels.md").read_text()
    assert not list(tmp_path.glob("*.png"))  # one length is no curve


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
        Result("mlp", {"tokens": tokens, "d": 8}, name, False, 1.0, {"forward": [tokens / 1e6]})
        for tokens in (64, 128)
        for name in ("ours", "torch")
    ]
    (path,) = bench_kernels.plot(results, tmp_path)
    assert path.name == "kernels-mlp-d-8.png"
    assert path.read_bytes().startswith(b"\x89PNG")

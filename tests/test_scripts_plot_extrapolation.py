"""Perplexity by position against transformers' loss, token by token, and what the script refuses."""

import json

import numpy as np
import pytest
import torch
import transformers
from data_files import edit_manifest, write_shards

from mpt import MptConfig, MptForCausalLM
from scripts import plot_extrapolation
from trainer import InputError


@pytest.fixture
def model(tmp_path):
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=100)
    MptForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    ids = np.random.default_rng(0).integers(1, 64, 1000)
    return write_shards(tmp_path / "data", {"val": [ids]}, vocab_size=64)


def test_losses_are_each_tokens_own(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(model), "--data", str(data), "--length", "301", "--sequences", "2", "--out", str(out)]
    assert plot_extrapolation.main(command) == 0
    assert "within its 100 tokens" in capsys.readouterr().out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    (result,) = json.loads((tmp_path / "out.json").read_text()).values()

    # transformers' MPT goes no further than its max_seq_len: given as long as what is read.
    theirs = transformers.MptForCausalLM.from_pretrained(model, max_seq_len=400).double()
    ids = torch.from_numpy(np.fromfile(data / "val" / "shard-00000.bin", "<u2")[:602].astype(np.int64)).view(2, 301)
    with torch.no_grad():
        logits = theirs(ids[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(0)  # of positions 1..300
    assert result["loss_within"] == pytest.approx(losses[:99].mean().item(), rel=1e-5)
    assert result["loss_beyond"] == pytest.approx(losses[99:].mean().item(), rel=1e-5)
    rows = result["by_position"]
    assert [(row["from"], row["to"]) for row in rows] == [(1, 63), (64, 127), (128, 255), (256, 300)]
    for row in rows:
        expected = losses[row["from"] - 1 : row["to"]].mean()
        assert row["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--length", "1001"], "no shard of split 'val' has 1001 tokens, the longest has 1000; lower --length"),
        (["--split", "train"], "no split 'train'"),
        (["--data", "nowhere"], "there is no such folder"),
    ],
)
def test_refused(model, data, tmp_path, capsys, change, message):
    assert plot_extrapolation.main([str(model), "--data", str(data), "--out", str(tmp_path / "x"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_ids_that_the_model_does_not_know(model, tmp_path, capsys):
    data = write_shards(tmp_path / "wide", {"val": [[5, 64] * 100]})
    command = [str(model), "--data", str(data), "--length", "50", "--out", str(tmp_path / "x")]
    assert plot_extrapolation.main(command) == 2
    assert "vocab_size 64 is too small for the ids" in capsys.readouterr().err


def test_excerpts_are_read_from_their_beginnings(tmp_path):
    """Those that padding fills up are left out."""
    rows = [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0], [5, 6, 7, 8, 0], [5, 0, 0, 0, 0], [9, 8, 7, 6, 5]]
    folder = write_shards(tmp_path, {"val": [[i for row in rows for i in row]]}, vocab_size=64)
    edit_manifest(folder, lambda manifest: manifest.update(excerpt_tokens=5))

    def read(length, most=9):
        return [ids.tolist() for ids in plot_extrapolation.read_sequences(folder, "val", length, most)]

    assert read(4) == [[5, 6, 7, 8], [5, 6, 7, 8], [9, 8, 7, 6]]
    assert read(5, most=2) == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 0]]
    with pytest.raises(InputError, match="no excerpt of split 'val' has 6 tokens, the longest has 5"):
        read(6)

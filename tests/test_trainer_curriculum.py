"""The length curriculum: the same tokens in shorter pieces, at the right steps, resumed exactly, refused where odd."""

import json
import signal
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import edit_manifest, write_shards
from launch import launch

from mpt import MptForCausalLM
from trainer import InputError, load_config, run
from trainer.config import validate
from trainer.curriculum import length_at
from trainer.plan import plan

run_module = import_module("trainer.run")

RECIPE = """
run_name: toy
max_seq_len: 32
max_duration: 6ba
length_curriculum:
  - {max_seq_len: 8, until: 2ba}
  - {max_seq_len: 16, until: 256tok}
global_train_batch_size: 2
device_train_microbatch_size: 1
precision: fp32
device: cpu
log_interval: 1
export: false
model: {d_model: 16, n_heads: 2, n_layers: 1, vocab_size: 32, no_bias: true, resid_pdrop: 0.1}
train_loader: {dataset: {local: DATA}}
optimizer: {name: decoupled_adamw, lr: 1.0e-2}
loggers: {progress: false}
"""


@pytest.fixture
def recipe(tmp_path):
    ids = np.random.default_rng(0).integers(1, 32, 1000)
    write_shards(tmp_path / "data", {"train": [ids]}, vocab_size=32)
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE.replace("DATA", str(tmp_path / "data")))
    return path


def test_length_at():
    stages = ((2, 8), (4, 16))
    assert [length_at(step, stages, 32) for step in range(6)] == [8, 8, 16, 16, 32, 32]
    assert length_at(0, (), 32) == 32


def losses(folder: Path):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["tokens"]) for row in rows if "loss" in row]


def test_a_step_reads_the_same_tokens_in_shorter_pieces(recipe, tmp_path, monkeypatch):
    seen = []
    forward = MptForCausalLM.forward

    def remember(self, input_ids=None, **kwargs):
        assert kwargs["labels"].shape == input_ids.shape
        seen.append(input_ids.numpy().copy())
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(MptForCausalLM, "forward", remember)
    config = load_config(recipe, [f"save_folder={tmp_path / 'run'}"])
    assert run(config) == 0
    assert [x.shape for x in seen] == 4 * [(4, 8)] + 4 * [(2, 16)] + 4 * [(1, 32)]
    data = validate(config, 1).train_data
    for i, x in enumerate(seen):
        assert np.array_equal(x.reshape(1, -1), data.batch(i // 2, [i % 2]))
    assert [tokens for _, _, tokens in losses(tmp_path / "run")] == [64 * step for step in range(1, 7)]


def test_padding_is_counted_no_more_often_in_pieces(recipe, tmp_path):
    books = [row for n in (5, 17, 32, 1) for row in [7] * (n - 1) + [0] * (33 - n)]
    write_shards(tmp_path / "data", {"train": [books]}, vocab_size=32)
    edit_manifest(tmp_path / "data", lambda manifest: manifest.update(excerpt_tokens=32))
    assert run(load_config(recipe, [f"save_folder={tmp_path / 'run'}"])) == 0
    assert [tokens for _, _, tokens in losses(tmp_path / "run")][1::2] == [55, 110, 165]


@pytest.mark.parametrize("cut", [2, 3])  # where one stage ends, and inside of another
def test_a_resumed_run_is_the_run_that_never_stopped(request, recipe, tmp_path, cut):
    """Whether or not the optimizer's state waits in host memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the launched runs have it: another number may round otherwise
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    assert run(load_config(recipe, [f"save_folder={tmp_path / 'whole'}"])) == 0
    overrides = [f"save_folder={tmp_path / 'cut'}"]
    runs = [
        {"overrides": [*overrides, "optimizer.offload=true"], "signal": signal.SIGTERM, "after": cut},
        {"overrides": [*overrides, f"optimizer.offload={'true' if cut == 2 else 'false'}"]},
    ]
    (codes,) = launch(1, [{"recipe": str(recipe), **kind} for kind in runs], tmp_path / "log")
    assert codes == [143, 0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_plan_shows_it(recipe):
    config = load_config(recipe)
    resolved = validate(config, 1)
    assert resolved.stages == ((2, 8), (4, 16))
    assert "in pieces of so many tokens: 8 to step 2, 16 to step 4, then 32" in str(plan(config, resolved, 1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("length_curriculum=[{max_seq_len: 12, until: 2ba}]", r"length_curriculum\[0\].max_seq_len=12 does not divide"),
        ("length_curriculum=[{max_seq_len: 1, until: 2ba}]", r"max_seq_len=1: a sequence of one token has none"),
        ("length_curriculum=[{max_seq_len: 32, until: 2ba}]", r"max_seq_len=32 is not below 32"),
        ("length_curriculum=[{max_seq_len: 16, until: 1}, {max_seq_len: 8, until: 2}]", "16 is not below 8"),
        ("length_curriculum=[{max_seq_len: 16, until: 2}, {max_seq_len: 8, until: 3}]", "list the stages from short"),
        ("length_curriculum=[{max_seq_len: 8, until: 2x}]", r"length_curriculum\[0\].until=.2x. is not a duration"),
        ("length_curriculum=[{max_seq_len: 8, until: 6}]", "is step 6 and the run ends with step 6"),
        ("length_curriculum=[{max_seq_len: 8, until: 0}]", "is step 0, not after the first step"),
        ("length_curriculum=[{max_seq_len: 8, until: 3}, {max_seq_len: 16, until: 3}]", "not after step 3, where"),
        ("activation_offload=true", "set activation_checkpointing to full or selective"),
        ("mlp_chunk_size=0", "mlp_chunk_size=0; expected a number of tokens"),
        ("optimizer.state_dtype=bf16", "use fp32, perhaps with optimizer.offload=true, or"),
    ],
)
def test_refused(recipe, override, message):
    with pytest.raises(InputError, match=message):
        validate(load_config(recipe, [override]), 1)

"""The memory of training on long sequences: what is predicted is what is measured, and nothing is quadratic."""

import json

import numpy as np
import pytest
from data_files import write_shards

from mpt import MptForCausalLM
from scripts import bench_memory
from scripts.demo_corpus import standard_library
from trainer.config import build_model_config, load_config

GIB = 2**30
RECIPE = """
run_name: long
max_seq_len: 65536
max_duration: 1ba
global_train_batch_size: 1
device_train_microbatch_size: 1
precision: fp32
device: cpu
activation_checkpointing: full
model:
  d_model: 128
  n_heads: 4
  n_layers: 2
  vocab_size: 50277
  no_bias: true
  attn_config: {clip_qkv: 6}
  init_config: {name: kaiming_normal_, emb_init_std: 0.02}
train_loader: {dataset: {local: DATA}}
optimizer: {name: decoupled_lionw, lr: 1.0e-4}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A long text: Python's own library, a token for every two characters."""
    folder = tmp_path_factory.mktemp("long")
    text = "\n".join(text for _, text in standard_library()[:100]).encode()
    ids = np.unique(np.frombuffer(text[:280_000], "<u2"), return_inverse=True)[1]
    write_shards(folder / "data", {"train": [ids]}, vocab_size=50277)
    path = folder / "long.yaml"
    path.write_text(RECIPE.replace("DATA", str(folder / "data")))
    return str(path)


@pytest.mark.slow
def test_nothing_is_quadratic(recipe):
    """A step at 65,536 tokens, and one at twice as many. One layer's scores would be 16 GiB a head."""
    once, twice = (bench_memory.measure(recipe, [f"max_seq_len={length}"], 1) for length in (65536, 131072))
    assert once["tokens"] == 65536 and once["measured_bytes"] < 8 * GIB
    assert twice["measured_bytes"] <= 2.2 * once["measured_bytes"]
    for row in (once, twice):
        if row["measured_bytes"] > GIB:
            assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.1)


# Each with a peak above 1 GiB; where the weights, the loss, a block's attention and a block's MLP are the most.
WEIGHTS = ["max_seq_len=128", "model.d_model=1024", "model.n_layers=5"]
WIDE = ["model.d_model=512", "model.n_heads=8", "model.vocab_size=16384"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ([*WEIGHTS, "optimizer.name=decoupled_adamw"], 1),
        ([*WEIGHTS, "precision=amp_bf16", "optimizer.state_dtype=bf16"], 1),
        ([*WIDE, "max_seq_len=16384"], 1),
        ([*WIDE, "max_seq_len=20480", "mlp_chunk_size=2048", "activation_offload=true"], 1),
        ([*WIDE, "max_seq_len=32768", "context_parallel_size=2"], 2),
    ],
)
def test_the_plan_predicts_the_measured_peak(recipe, overrides, processes):
    row = bench_memory.measure(recipe, overrides, 1, processes)
    assert row["measured_bytes"] > GIB, json.dumps(row)
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.1), json.dumps(row)


@pytest.mark.slow
def test_the_plan_predicts_the_peak_of_adapters(recipe, tmp_path):
    pytest.importorskip("peft")
    shape = [*WEIGHTS[1:], "max_seq_len=1024", "activation_checkpointing=none"]
    config = build_model_config(load_config(recipe, shape))
    MptForCausalLM(config).save_pretrained(tmp_path / "base")
    overrides = [*shape, f"load_path={tmp_path / 'base'}", "lora={rank: 16, dropout: 0.05}"]
    row = bench_memory.measure(recipe, overrides, 1)
    assert row["measured_bytes"] > GIB, json.dumps(row)
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.1), json.dumps(row)


def test_a_run_that_cannot_be_is_an_error(recipe, capsys):
    assert bench_memory.main([recipe, "train_loader.dataset.local=nowhere"]) == 2
    assert "error: InputError: nowhere: there is no such folder" in capsys.readouterr().err

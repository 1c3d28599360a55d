"""Training with context_parallel_size: the curve, evaluation and resuming of one process; sizes that do not fit."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from data_files import write_shards, write_tokenizer
from launch import launch

from trainer import InputError, load_config, run
from trainer.config import validate
from trainer.data import file_sha256
from trainer.plan import memory, plan

RECIPE = """
run_name: toy
max_seq_len: 50
max_duration: 6ba
global_train_batch_size: 4
device_train_microbatch_size: 2
device_eval_batch_size: 2
precision: fp32
device: cpu
log_interval: 1
eval_interval: 2ba
save_interval: 100ba
export: false
model:
  d_model: 32
  n_heads: 4
  n_layers: 2
  vocab_size: 304
  attn_config: {attn_uses_sequence_id: true}
  init_config: {name: kaiming_normal_, emb_init_std: 0.02}
train_loader: {dataset: {local: DATA}}
eval_loader: {dataset: {local: DATA}}
optimizer: {name: decoupled_adamw, lr: 1.0e-2}
loggers: {progress: false}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    ids = np.cumsum(np.random.default_rng(0).integers(1, 4, 6000)) % 20 + 1
    ids[::17] = 0  # documents of 16 tokens and their end
    write_shards(folder, {"train": [ids[:5400]], "val": [ids[5400:]]}, vocab_size=304)
    write_tokenizer(folder, vocab_size=304)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = file_sha256(folder / "tokenizer.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = folder / "toy.yaml"
    path.write_text(RECIPE.replace("DATA", str(folder)))
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("alone")
    assert run(load_config(recipe, [f"save_folder={folder}"])) == 0
    return history(folder)


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    for ours, theirs in zip(found, expected):
        compared = {key: theirs[key] for key in ("loss", "eval_loss", "grad_norm") if key in theirs}
        assert {key: ours.get(key) for key in compared} == pytest.approx(compared, rel=1e-5), f"step {ours['step']}"


def test_two_ranks_that_share_sequences_follow_the_curve_of_one(
    recipe: Path, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    """Stopped twice: in between they go on without sharing. And with a length curriculum, whose pieces they share."""
    folder, two = tmp_path / "run", ["context_parallel_size=2", "activation_checkpointing=selective"]
    short = ["length_curriculum=[{max_seq_len: 5, until: 2ba}, {max_seq_len: 25, until: 4ba}]"]
    assert run(load_config(recipe, [f"save_folder={tmp_path / 'short-alone'}", *short])) == 0
    term = {"recipe": str(recipe), "signal": int(signal.SIGTERM)}
    runs = [
        {**term, "overrides": [f"save_folder={folder}", *two], "after": 3},
        {**term, "overrides": [f"save_folder={folder}"], "after": 4},
        {"recipe": str(recipe), "overrides": [f"save_folder={folder}", *two]},
        {"recipe": str(recipe), "overrides": [f"save_folder={tmp_path / 'short'}", *two, *short]},
    ]
    assert launch(2, runs, tmp_path / "workers") == [[143, 143, 0, 0]] * 2
    assert_same_curve(history(tmp_path / "short"), history(tmp_path / "short-alone"))
    assert_same_curve(history(folder), alone)
    log = (tmp_path / "workers" / "log-0.txt").read_text()
    assert "resuming after step 3 of 6" in log and "resuming after step 4 of 6" in log
    for row in history(folder):
        if "loss" in row:
            assert row["tokens_per_s_device"] == pytest.approx(row["tokens_per_s"] / 2)


@pytest.mark.slow
def test_four_ranks_as_shard_replicate_and_context(recipe: Path, alone: list[dict[str, float]], tmp_path: Path) -> None:
    settings = {
        "shard x context": ["context_parallel_size=2", "activation_checkpointing=full"],
        "replicate x context": ["context_parallel_size=2", "fsdp_config.replicate=2"],
        "context": ["context_parallel_size=4"],
        "compiled": ["context_parallel_size=4", "compile=true", "activation_checkpointing=full"],
        "bf16": ["context_parallel_size=2", "precision=amp_bf16"],
    }
    runs = [
        {"recipe": str(recipe), "overrides": [f"save_folder={tmp_path / name}", *extra]}
        for name, extra in settings.items()
    ]
    assert launch(4, runs, tmp_path / "workers") == [[0] * len(runs)] * 4
    for name in settings:
        if name == "bf16":
            assert history(tmp_path / name)[-1]["eval_loss"] == pytest.approx(alone[-1]["eval_loss"], rel=1e-2)
        else:
            assert_same_curve(history(tmp_path / name), alone)


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (4, ["context_parallel_size=3"], r"context_parallel_size=3 does not divide the 4 processes"),
        (4, ["context_parallel_size=0"], r"context_parallel_size=0 does not divide"),
        (4, ["context_parallel_size=4", "fsdp_config.replicate=2"], r"replicate=2 and context_parallel_size=4 .* 8"),
        (64, ["context_parallel_size=64"], r"context_parallel_size=64 processes cannot share the 50 tokens"),
        (4, ["context_parallel_size=4", "length_curriculum=[{max_seq_len: 2, until: 1ba}]"],
         r"cannot share the 2 tokens of a sequence \(length_curriculum\[0\].max_seq_len\)"),
        (2, ["context_parallel_size=2", "model.attn_config.prefix_lm=true"], r"prefix_lm=true.*set one"),
        (12, ["context_parallel_size=2"], r"global_train_batch_size=4 .* 6 groups of 2 processes; use 6 or 12"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(recipe: Path, world: int, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(load_config(recipe, overrides), world, open_data=False)


def test_the_plan_counts_a_ranks_part(recipe: Path) -> None:
    def of(n: int, *extra: str) -> dict[str, int]:
        config = load_config(recipe, [f"context_parallel_size={n}", *extra])
        return memory(config, validate(config, 4, open_data=False).model_config, 4, 1)

    # Attention's backward is the fullest moment.
    long = ("max_seq_len=4096", "mlp_chunk_size=64", "model.d_model=256")
    one, two = of(1, *long), of(2, *long)
    assert two["weights"] == one["weights"] and two["optimizer state"] == one["optimizer state"]
    assert two["activations"] == one["activations"] / 2
    assert "keys of the group" not in one
    keys = 2 * 4096 * 256 * 4
    assert two["keys of the group"] == 5 * keys
    assert of(2, *long, "activation_checkpointing=full")["keys of the group"] == 4 * keys

    config = load_config(recipe, ["context_parallel_size=2", "max_seq_len=4097", "device_train_microbatch_size=auto"])
    text = str(plan(config, validate(config, 4, open_data=False), 4))
    assert "2 x 2 processes x micro-batch 1 x 2 accumulated" in text
    assert "2 processes share each sequence, 2,049 tokens each; the busiest has 1." in text

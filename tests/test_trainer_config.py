"""TrainConfig from YAML: reading, overrides, a clear error for each kind of mistake, cross-checks, the round trip."""

import contextlib
import dataclasses
import json
import os
import time

import pytest
import torch
from data_files import edit_manifest, write_shards, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend
from trainer import yamlfile
from trainer.config import TrainConfig, config_to_yaml, load_config, validate
from trainer.data import file_sha256
from trainer.errors import InputError
from trainer.plan import plan

RECIPE = """\
run_name: small
max_seq_len: 16
max_duration: 50ba
global_train_batch_size: 8
device_train_microbatch_size: 2
precision: fp32
device: cpu
model:
  d_model: 32
  n_heads: 4
  n_layers: 2
  vocab_size: 100
  attn_config:
    alibi: true
train_loader:
  dataset:
    local: {data}
eval_loader:
  dataset:
    local: {data}
optimizer:
  name: decoupled_adamw
  lr: 1e-3
  betas: [0.9, 0.95]
scheduler:
  t_warmup: 5ba
  alpha_f: 0.1
"""


# Aliases to lists of aliases: 300 bytes that unfold into 9^8 values.
LAUGHS = b"a0: &a0 [1]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)
)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a small recipe, with changes to its text, beside its data, and returns its path."""
    monkeypatch.delenv("RUN_NAME", raising=False)
    data = write_shards(tmp_path / "data", {"train": [range(1, 90)] * 20, "val": [range(1, 90)] * 2}, vocab_size=100)

    def write(*changes, text=RECIPE):
        text = text.replace("{data}", str(data))
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new, 1)
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def error(call, *arguments, **keywords):
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


def test_a_recipe_is_read_with_its_defaults(recipe):
    config = load_config(recipe())
    assert (config.run_name, config.max_duration, config.seed) == ("small", "50ba", 17)
    assert config.optimizer.lr == 1e-3 and config.optimizer.betas == (0.9, 0.95)
    assert config.model["attn_config"] == {"alibi": True}
    assert config.loggers.wandb is None and config.train_loader.dataset.shuffle is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


# --- overrides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "read", "expected"),
    [
        ("seed=3", lambda c: c.seed, 3),
        ("optimizer.lr=2e-4", lambda c: c.optimizer.lr, 2e-4),
        ("optimizer.betas=[0.8, 0.99]", lambda c: c.optimizer.betas, (0.8, 0.99)),
        ("model.n_layers=7", lambda c: c.model["n_layers"], 7),
        ("model.attn_config={clip_qkv: 6}", lambda c: c.model["attn_config"], {"alibi": True, "clip_qkv": 6}),
        ("max_duration=2ep", lambda c: c.max_duration, "2ep"),
        ("max_duration=100", lambda c: c.max_duration, 100),
        ("run_name=0017", lambda c: c.run_name, "0017"),
        ("sample_prompt=def f(x): [", lambda c: c.sample_prompt, "def f(x): ["),
        ("eval_loader=", lambda c: c.eval_loader, None),
        ("loggers.wandb.project=mpt", lambda c: c.loggers.wandb.project, "mpt"),
        ("profile={start: 2, steps: 1}", lambda c: c.profile.steps, 1),
        ("gradient_clip_norm=null", lambda c: c.gradient_clip_norm, None),
        ("device_train_microbatch_size=auto", lambda c: c.device_train_microbatch_size, "auto"),
        ("save_folder=runs/${run_name}-a", lambda c: c.save_folder, "runs/small-a"),
        (
            "train_loader.dataset={local: null, mix: [{local: a, weight: 2}]}",
            lambda c: c.train_loader.dataset.mix[0].weight,
            2.0,
        ),
    ],
)
def test_overrides(recipe, argument, read, expected):
    assert read(load_config(recipe(), [argument])) == expected


def test_the_last_override_wins(recipe):
    assert load_config(recipe(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optimizer=adamw", r"'optimizer=adamw'.*optimizer is a section.*'adamw'.*optimizer.name="),
        ("optimizer.betas.1=0.99", r"give the list whole, optimizer.betas=\["),
        ("optimizer.lr", r"'optimizer.lr' has no value; write optimizer.lr=VALUE"),
        ("optimizer.lr=", r"optimizer.lr: expected a number, got nothing"),
        ("--optimizer.lr=1", r"no dashes; write optimizer.lr=1"),
        ("optimizer.lr=fast", r"optimizer.lr=fast.*expected a number, got the text 'fast'"),
        ("optimizer.lr=.nan", r"not finite"),
        ("optimizer.bets=[0,1]", r"unknown key optimizer.bets; did you mean optimizer.betas\?"),
        ("optimiser.lr=1e-3", r"^argument 'optimiser.lr=1e-3': unknown key optimiser; did you mean optimizer\?"),
        ("optimizer.learning_rate=1", r"unknown key optimizer.learning_rate; did you mean optimizer.lr\?"),
        ("precision=bf16", r"expected one of fp32, amp_bf16, got the text 'bf16'; did you mean amp_bf16\?"),
        ("optimizer.name=lion", r"did you mean decoupled_lionw\?"),
        ("lr=1", r"unknown key lr; did you mean optimizer.lr\?"),
        ("optimizer.max_duration=3", r"unknown key optimizer.max_duration; did you mean max_duration\?"),
        ("zzz=1", r"unknown key zzz; known keys are .*run_name"),
        ("=3", r"is not a key"),
        ("a b=3", r"is not a key"),
        ("seed=1.5", r"seed: expected an integer, got the number 1.5"),
        ("seed=true", r"seed: expected an integer, got true"),
        ("seed.x=3", r"seed: expected an integer, got a section"),
        ("compile=7", r"compile: expected true or false, got the number 7"),
        ("precision=amp_fp16", r"precision=amp_fp16 is not supported; use amp_bf16, or fp32"),
        ("precision=fp8", r"precision: expected one of fp32, amp_bf16, got the text 'fp8'"),
        ("device_train_microbatch_size=big", r"expected an integer or auto"),
        ("optimizer.betas=[0.9]", r"optimizer.betas: expected a list of 2 values or null"),
        ("optimizer.betas=0.9", r"optimizer.betas: expected a list of 2 values or null"),
        ("train_loader.dataset.mix=[{local: a, weigth: 1}]", r"mix\[0\].weigth; did you mean .*weight\?"),
        ("train_loader.dataset.mix=[{local: a, weight: x}]", r"mix\[0\].weight: expected a number"),
        ("train_loader.dataset.mix={local: a}", r"mix: expected a list or null, got a section"),
        ("model=7", r"model: expected a section of its own, got the number 7"),
        ("seed=[1", r"not valid YAML"),
        ("seed=!!python/name:os.system", r"tag .*python/name:os.system is refused"),
        ("run_name=${oc.env:HOME}", r"only \$\{section.key\} of the same file"),
        ("run_name=${nothing}", r"run_name.*'nothing' not found"),
        ("run_name=${run_name}", r"run_name: Recursive interpolation"),
    ],
)
def test_bad_overrides(recipe, argument, message):
    assert_matches(error(load_config, recipe(), [argument]), message)


def assert_matches(text, pattern):
    import re

    assert re.search(pattern, text), text


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  betas:", "  bets:", r"recipe.yaml:24: unknown key optimizer.bets; did you mean optimizer.betas\?"),
        (
            "max_duration: 50ba",
            "max_duraton: 50ba",
            r"recipe.yaml:3: unknown key max_duraton; did you mean max_duration\?",
        ),
        ("max_duration: 50ba\n", "", r"max_duration is required: an integer or text"),
        ("  lr: 1e-3\n", "", r"recipe.yaml:21: optimizer.lr is required: a number"),
        ("  lr: 1e-3", "  lr: fast", r"recipe.yaml:23: optimizer.lr: expected a number, got the text 'fast'"),
        ("  lr: 1e-3", "  lr: 0", r"recipe.yaml:23: optimizer.lr=0"),
        ("run_name: small", "run_name: 17", r'recipe.yaml:1: run_name is text, 17 a number; put it in quotes: "17"'),
        ("run_name: small", "run_name: ../out", r"recipe.yaml:1: run_name='../out' has to be one folder name"),
        ("run_name: small", "run_name: ''", r"run_name is required"),
        ("max_duration: 50ba", "max_duration: 50", None),
        ("max_duration: 50ba", "max_duration: 50sec", r"recipe.yaml:3: max_duration='50sec' is not a duration"),
        ("max_duration: 50ba", "max_duration: 0ba", r"recipe.yaml:3: max_duration=0ba trains for no step"),
        ("  t_warmup: 5ba", "  t_warmup: soon", r"recipe.yaml:26: scheduler.t_warmup='soon' is not a duration"),
        ("max_seq_len: 16", "max_seq_len: 0", r"recipe.yaml:2: max_seq_len=0; expected at least 1"),
        ("max_seq_len: 16", "max_seq_len: 2147483648", r"recipe.yaml:2: max_seq_len=2147483648; expected .* below 2"),
        (
            "global_train_batch_size: 8",
            "global_train_batch_size: 1000000000000000000",
            r"recipe.yaml:4: global_train_batch_size=1000000000000000000; expected a number below 2\*\*31",
        ),
        ("max_duration: 50ba", "max_duration: 1e300ba", r"recipe.yaml:3: max_duration='1e300ba' is too long"),
        ("  n_heads: 4", "  n_heads: 5", r"recipe.yaml:9: model: d_model 32 is not divisible by n_heads 5"),
        ("  n_heads: 4", "  n_head: 4", r"recipe.yaml:10: model: unknown key n_head.*did you mean 'n_heads'"),
        ("    alibi: true", "    alibbi: true", r"recipe.yaml:14: model: unknown key attn_config.alibbi.*'alibi'"),
        ("  n_heads: 4", "  n_heads: 4\n  max_seq_len: 32", r"model.max_seq_len=32 and max_seq_len=16 differ"),
        (
            "max_seq_len: 16",
            "max_seq_len: 16\nmax_seq_len: 32",
            r"recipe.yaml:3: key max_seq_len is given twice, first in line 2",
        ),
        ("  n_heads: 4", "  n_heads: 4\n  n_heads: 8", r"recipe.yaml:11: key model.n_heads is given twice"),
        (
            "run_name: small",
            "run_name: !!python/object/apply:os.system ['true']",
            r"recipe.yaml:1: tag .*os.system is refused",
        ),
        ("run_name: small", "run_name: !custom x", r"recipe.yaml:1: tag !custom is refused"),
        ("run_name: small", "run_name: ${oc.env:PATH}", r"recipe.yaml:1: run_name: .*only \$\{section.key\}"),
        ("run_name: small", "run_name: ${${a}:PATH}\na: oc.env", r"recipe.yaml:1: run_name: .*only \$\{section.key\}"),
        ("run_name: small", "run_name: ${a}${b}\na: $\nb: '{oc.env}'", r"may not make another"),
        ("run_name: small", "run_name: ${model.nothing}", r"recipe.yaml:1: run_name: .*'model.nothing' not found"),
        ("run_name: small", "run_name: ???", r"recipe.yaml:1: run_name is left open"),
        ("run_name: small", "a: b\nb: x\nrun_name: ${${a}}", r"recipe.yaml:3: run_name: .*only \$\{section.key\}"),
        ("run_name: small", "run_name: small\nseed: !!int abc", r"recipe.yaml:2: 'abc' is no int"),
        ("run_name: small", "run_name: small\nseed: " + "9" * 5000, r"recipe.yaml:2: '9{77}\.\.\.' is no int"),
        ("run_name: small", "run_name: small\nseed: 0x" + "f" * 5000, r"recipe.yaml:2: '0xf{75}\.\.\.' is no int"),
        ("run_name: small", "run_name: !!float abc", r"recipe.yaml:1: 'abc' is no float"),
        ("run_name: small", "run_name: !!bool abc", r"recipe.yaml:1: 'abc' is no bool"),
        ("run_name: small", "run_name: !!timestamp abc", r"recipe.yaml:1: 'abc' is no timestamp"),
        ("run_name: small", "run_name: !!timestamp 2020-99-99", r"recipe.yaml:1: '2020-99-99' is no timestamp"),
        (
            "eval_loader:\n",
            "eval_loader:\n  name: denoising\n",
            r"eval_loader.name: expected one of text, finetuning, got",
        ),
        ("run_name: small", "run_name: [", r"recipe.yaml:\d+: not valid YAML"),
        ("run_name: small", "? [a, b]\n: c", r"recipe.yaml:1: a key has to be one word"),
        (
            "run_name: small",
            "run_name: small\nsave_folder: s3://bucket/a",
            r"recipe.yaml:2: save_folder=s3://bucket/a: remote",
        ),
        (
            "run_name: small",
            "run_name: small\nload_path: gs://bucket/a",
            r"recipe.yaml:2: load_path=gs://bucket/a: remote",
        ),
        ("run_name: small", "run_name: small\nload_path: dbfs:/a", r"load_path=dbfs:/a: remote"),
        ("run_name: small", "run_name: small\nload_path: a/" + "ü" * 128, r"recipe.yaml:2: load_path=.*255 bytes"),
        (
            "run_name: small",
            'run_name: small\nsave_folder: "a\\0b"',
            r"recipe.yaml:2: save_folder='a\\x00b': .*control",
        ),
        ("    local: {data}", '    local: "a\\tb"', r"train_loader.dataset.local='a\\tb': a path with control"),
        ("    local: {data}", "    local: oci://b/a", r"train_loader.dataset.local=oci://b/a: remote"),
        ("    local: {data}", "    local: ~/a", r"train_loader.dataset.local=~/a: ~ is not expanded"),
        ("run_name: small", "run_name: small\nsave_folder: ~", None),  # YAML's null
        ("run_name: small", "run_name: small\nseed: 4294967296", r"seed=4294967296; expected a number below 2\*\*32"),
        ("run_name: small", "run_name: small\ndist_timeout: 1e13", r"dist_timeout=1e\+13 seconds; expected at most"),
        ("    local: {data}", "    mix: [{local: hf://b/a}]", r"train_loader.dataset.mix\[0\].local=hf://b/a: remote"),
        (
            "run_name: small",
            "run_name: small\non_nonfinite: go",
            r"on_nonfinite='go'; expected \"stop\", or \"skip:N\"",
        ),
        ("run_name: small", "run_name: small\nlog_interval: 0", r"log_interval=0"),
        ("run_name: small", "run_name: small\ngradient_clip_norm: -1", r"gradient_clip_norm=-1"),
        ("run_name: small", "run_name: small\neval_subset_num_batches: 0", r"eval_subset_num_batches=0"),
        (
            "run_name: small",
            "run_name: small\ntokenizer: {kwargs: {add_bos: true}}",
            r"tokenizer.kwargs.add_bos=True has no effect",
        ),
        ("run_name: small", "run_name: small\nloggers: {tensorboard: {log_dir: ../x}}", r"inside the run folder"),
    ],
)
def test_a_mistake_in_the_file(recipe, old, new, message):
    path = recipe((old, new)) if "{data}" not in old else recipe(text=RECIPE.replace(old, new, 1))
    if message is None:
        load_config(path)
    else:
        assert_matches(error(load_config, path), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"- a\n- b\n", "top level"),
        (b"text", "top level"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"\xff\xfe\x00a", "not a text file"),
        (b"a: \x00", "not valid YAML"),
        (b"a: &x [*x]", "deeper|undefined"),
        (b"x" * (2**20 + 1), "more than 1 MiB"),
        (b"".join(b" " * i + b"a:\n" for i in range(100)), "deeper than 40"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "deeper than 40"),
        (b"a: " + b"{b: " * 2000 + b"1" + b"}" * 2000, "deeper than 40"),
        (LAUGHS, "100000 values"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert_matches(error(load_config, path), message)


@pytest.mark.parametrize("last", ["${a8}", "['${a8}']", "{b: '${a8}', c: '${.b}${..a8}'}"])
def test_interpolations_that_unfold_into_too_much(recipe, last):
    tens = "\n".join(["a0: 0123456789", *(f"a{i}: {f'${{a{i - 1}}}' * 10}" for i in range(1, 9)), f"a9: {last}"])
    path = recipe(("run_name: small", f"{tens}\nrun_name: small"))
    start = time.perf_counter()
    assert_matches(error(load_config, path), r"recipe.yaml:\d+: a\d: interpolations unfold into more than 131072 char")
    assert time.perf_counter() - start < 5


def test_a_section_that_refers_to_itself(recipe):
    for text in ("a: ${a}", "a: ${b}\nb: ${a}${a}", "a: {b: '${a}${a}'}", "a: ['${a}', '${a}']"):
        path = recipe(("run_name: small", f"{text}\nrun_name: small"))
        assert_matches(error(load_config, path), r"recipe.yaml.*")


def test_a_missing_recipe_lists_those_there_are(tmp_path):
    text = error(load_config, "yaml/mpt-125.yaml")
    assert text.endswith("did you mean yaml/mpt-125m.yaml?")
    assert "recipes in yaml/: " in error(load_config, "other.yaml")
    assert "is a folder" in error(load_config, tmp_path)


def test_merge_keys_and_anchors_work(recipe):
    text = RECIPE.replace(
        "eval_loader:\n  dataset:\n    local: {data}", "eval_loader:\n  <<: *loader\n  num_workers: 7"
    )
    config = load_config(recipe(("train_loader:", "train_loader: &loader"), text=text))
    assert config.eval_loader.dataset == config.train_loader.dataset and config.eval_loader.num_workers == 7


def test_numbers_and_dates_are_read_as_people_mean_them(recipe):
    config = load_config(
        recipe(("run_name: small", "run_name: 2024-05-01\nsample_prompt: 1e5x"), ("lr: 1e-3", "lr: 6e-4"))
    )
    assert config.run_name == "2024-05-01" and config.optimizer.lr == 6e-4 and config.sample_prompt == "1e5x"


def test_the_run_name_comes_from_the_environment_where_the_file_has_none(recipe, monkeypatch):
    path = recipe(("run_name: small", "run_name:"))
    monkeypatch.setenv("RUN_NAME", "from-env")
    assert load_config(path).run_name == "from-env"
    assert load_config(path, ["run_name=given"]).run_name == "given"


def test_the_environment_cannot_be_read(recipe):
    """Every resolver that OmegaConf registers is refused, however it is spelt."""
    os.environ["MPT_TEST_SECRET"] = "secret-value"
    for text in ("${oc.env:MPT_TEST_SECRET}", "${ oc.env : MPT_TEST_SECRET }", "a${oc.env:MPT_TEST_SECRET}b",
                 "${oc.decode:${oc.env:MPT_TEST_SECRET}}", "${oc.create:{a: 1}}", "${oc.select:seed}",
                 "${oc.dict.keys:model}", "\\\\${oc.env:MPT_TEST_SECRET}"):  # fmt: skip
        message = error(load_config, recipe(("run_name: small", f"run_name: {json.dumps(text)}")))
        assert "secret-value" not in message and "same file" in message


# --- validate ----------------------------------------------------------------------------------------------------


def test_what_follows_from_a_recipe(recipe, tmp_path):
    config = load_config(
        recipe(), ["max_duration=2ep", "eval_interval=500tok", "save_interval=0", "on_nonfinite=skip:3"]
    )
    resolved = validate(config, 2)
    # 20 shards of 89 tokens hold 5 sequences of 16 each: 100 sequences, 12.5 batches of 8.
    assert (resolved.steps, resolved.steps_per_epoch) == (25, 12)
    assert (resolved.tokens_per_step, resolved.micro_batch, resolved.accumulation) == (128, 2, 2)
    assert (resolved.eval_every, resolved.save_every, resolved.warmup_steps, resolved.decay_steps) == (4, 0, 5, 25)
    assert (resolved.eval_batch_size, resolved.skip_nonfinite) == (2, 3)
    assert str(resolved.run_folder) == "runs/small"
    assert resolved.model_config.max_seq_len == 16 and resolved.model_config.vocab_size == 100
    assert resolved.tokenizer_sha256 == "0" * 64


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        ([], 3, r"global_train_batch_size=8 is not divisible by the 3 processes; use 6 or 9"),
        ([], 16, r"global_train_batch_size=8 is not divisible by the 16 processes; use 16 or 32"),
        (
            ["device_train_microbatch_size=3"],
            1,
            r"device_train_microbatch_size=3 does not divide the 8 sequences .*use .*4",
        ),
        (
            ["global_train_batch_size=2147483646", "device_train_microbatch_size=4"],
            1,
            r"microbatch_size=4 does not divide the 2147483646 sequences .*use 2, 3, 6 or auto",
        ),
        (["fsdp_config.replicate=3"], 4, r"fsdp_config.replicate=3 does not divide the 4 processes"),
        (["fsdp_config.replicate=0"], 4, r"fsdp_config.replicate=0"),
        (["fsdp_config.cpu_offload=true"], 1, r"cpu_offload=true needs a GPU"),
        (["model.vocab_size=50"], 1, r"token id 89, vocab_size is 50"),
        (["train_loader.dataset.local=nowhere"], 1, r"nowhere: there is no such folder"),
        (["train_loader.dataset.split=test"], 1, r"no split 'test'"),
        (["max_seq_len=1000"], 1, r"no shard of split 'train' is as long as one sequence"),
        (["load_path=nowhere"], 1, r"load_path=nowhere does not exist"),
        (["tokenizer.name=./nowhere.json"], 1, r"tokenizer ./nowhere.json: no such file"),
    ],
)
def test_cross_checks(recipe, overrides, world, message):
    assert_matches(error(validate, load_config(recipe(), overrides), world), message)


def test_kernels_that_this_device_cannot_run(recipe, monkeypatch):
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    config = load_config(recipe(), ["kernels=triton"])
    assert_matches(error(validate, config, 1), r"kernels=triton: .*the tensor is on cpu.*use 'auto'")


def test_an_evaluation_batch_is_no_larger_than_the_split(recipe):
    config = load_config(recipe(), ["device_eval_batch_size=1000000"])
    assert validate(config, 1).eval_batch_size == 10  # two shards of 89 tokens, 5 sequences in each


def test_the_environments_kernels_are_checked_before_the_files(recipe, monkeypatch):
    monkeypatch.setenv("MPT_KERNELS", "fast")
    assert_matches(error(validate, load_config(recipe()), 1), r"environment: MPT_KERNELS is 'fast'; it must be one of")
    monkeypatch.setenv("MPT_KERNELS", "torch")
    validate(load_config(recipe(), ["kernels=triton"]), 1)


def test_a_micro_batch_is_no_larger_than_a_ranks_share(recipe):
    resolved = validate(load_config(recipe(), ["device_train_microbatch_size=64"]), 4)
    assert (resolved.micro_batch, resolved.accumulation) == (2, 1)


def test_the_tokenizer_has_to_be_the_shards(recipe, tmp_path):
    path = recipe()
    write_tokenizer(tmp_path / "other", vocab_size=100)
    tokenizer = tmp_path / "other" / "tokenizer.json"
    argument = f"tokenizer.name={tokenizer}"
    assert "were made with a tokenizer of SHA-256" in error(validate, load_config(path, [argument]), 1)
    digest = file_sha256(tokenizer)
    edit_manifest(tmp_path / "data", lambda manifest: manifest["tokenizer"].update(sha256=digest))
    resolved = validate(load_config(path, [argument]), 1)
    assert resolved.tokenizer_sha256 == digest and resolved.tokenizer_path == tokenizer
    tokenizer.write_text("{}")
    assert_matches(error(validate, load_config(path, [argument]), 1), r"tokenizer.json: the tokenizers library cannot")


def test_the_copy_beside_the_shards_has_to_be_whole(recipe, tmp_path):
    """It is needed at the end of a run only: too late to learn that it is damaged."""
    path, beside = recipe(), tmp_path / "data" / "tokenizer.json"
    write_tokenizer(tmp_path / "data", vocab_size=100)
    digest = file_sha256(beside)
    edit_manifest(tmp_path / "data", lambda manifest: manifest["tokenizer"].update(sha256=digest))
    assert validate(load_config(path), 1).tokenizer_path == beside
    beside.write_text(beside.read_text()[:-100])
    assert_matches(error(validate, load_config(path), 1), r"tokenizer.json is not the tokenizer that the shards")
    edit_manifest(tmp_path / "data", lambda manifest: manifest["tokenizer"].update(file="../tokenizer.json"))
    assert_matches(error(validate, load_config(path), 1), r"tokenizer.file is '../tokenizer.json'")


def test_a_sample_prompt_has_to_fit_learned_positions(recipe, tmp_path):
    path = recipe()
    write_tokenizer(tmp_path / "data", vocab_size=100)
    digest = file_sha256(tmp_path / "data" / "tokenizer.json")
    edit_manifest(tmp_path / "data", lambda manifest: manifest["tokenizer"].update(sha256=digest))
    prompt = f"sample_prompt={'word ' * 60}"
    validate(load_config(path, [prompt]), 1)
    learned = load_config(path, [prompt, "model.attn_config.alibi=false"])
    assert_matches(
        error(validate, learned, 1), r"sample_prompt has \d+ tokens; learned positions end at max_seq_len=16"
    )


def test_a_hub_tokenizer_needs_no_network(recipe, monkeypatch, tmp_path):
    """A name that is not in the local cache leaves the shards' own tokenizer; nothing is downloaded."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("went to the network"))
    resolved = validate(load_config(recipe(), ["tokenizer.name=somebody/some-tokenizer"]), 1)
    assert resolved.tokenizer_sha256 == "0" * 64
    assert any("tokenizer.name=somebody/some-tokenizer is not in the local cache" in note for note in resolved.notes)
    assert "neither a file" in error(validate, load_config(recipe(), ["tokenizer.name=a/b c"]), 1)


def test_a_mistyped_path_is_no_hub_tokenizer(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder" in error(validate, load_config(recipe(), ["tokenizer.name=data/tokeniser"]), 1)


def test_what_the_plan_says_of_the_data(recipe, monkeypatch):
    """20 shards of 89 tokens: 100 sequences of 16; their tokenizer has 100 tokens."""
    text = planned(recipe())
    assert "6,400 tokens" in text and ", 4 epochs" in text and "note" not in text
    text = planned(recipe(), "global_train_batch_size=104", "max_duration=100ba", "model.vocab_size=201")
    assert "global_train_batch_size=104 is more than the 100 sequences" in text
    assert "max_duration=100ba passes over the training split 104 times" in text
    assert "model.vocab_size=201, but the tokenizer of the shards has 100 tokens" in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU here" in planned(recipe(), "device=cuda")


def test_a_tokenizer_that_was_compared_may_be_far_smaller(recipe, tmp_path):
    path, tokenizer = recipe(), tmp_path / "other" / "tokenizer.json"
    write_tokenizer(tmp_path / "other", vocab_size=100)
    edit_manifest(tmp_path / "data", lambda manifest: manifest["tokenizer"].update(sha256=file_sha256(tokenizer)))
    assert "of the shards has" not in planned(path, "model.vocab_size=500", f"tokenizer.name={tokenizer}")
    assert "of the shards has" in planned(path, "model.vocab_size=500")


def planned(path, *overrides):
    config = load_config(path, overrides)
    return str(plan(config, validate(config, 1), 1))


def test_the_checkpoint_to_load_has_to_have_the_models_shapes(recipe, tmp_path):
    from mpt import MptConfig, MptForCausalLM

    path = recipe()
    config = load_config(path)
    model = MptForCausalLM(MptConfig.from_dict({**config.model, "max_seq_len": 16}))
    model.save_pretrained(tmp_path / "weights")
    argument = f"load_path={tmp_path / 'weights'}"
    validate(load_config(path, [argument]), 1)
    text = error(validate, load_config(path, [argument, "model.n_layers=3"]), 1)
    assert "transformer.blocks.2.attn.Wqkv.weight" in text and "missing" in text


def test_without_data_only_epochs_stay_open(recipe):
    config = load_config(recipe(), ["train_loader.dataset.local=nowhere", "load_path=nowhere"])
    assert validate(config, 2, open_data=False).steps == 50
    config = load_config(recipe(), ["max_duration=2ep"])
    assert "max_duration=2ep needs the data" in error(validate, config, 2, open_data=False)


def test_auto_on_a_cpu_takes_few_tokens(recipe):
    config = load_config(recipe(), ["device_train_microbatch_size=auto", "global_train_batch_size=1000"])
    assert validate(config, 2, open_data=False).micro_batch == 250  # the largest divisor of 500 within 4,096 tokens


# --- the round trip ----------------------------------------------------------------------------------------------


def test_yaml_round_trip(recipe, tmp_path):
    config = load_config(recipe(), ["loggers.wandb.tags=[a, '1e5', 'no']", "profile={}", "sample_prompt='123'",
                                    "train_loader.dataset.mix=[{local: x, weight: 1}, {local: y, weight: 2.5}]",
                                    "train_loader.dataset.local="])  # fmt: skip
    path = tmp_path / "again.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config
    assert isinstance(load_config(path), TrainConfig)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@given(st.dictionaries(st.text(), values, max_size=4))
@settings(max_examples=150, deadline=None)
def test_plain_values_survive_dump_and_parse(data):
    assert yamlfile.parse(yamlfile.dump(data), "text")[0] == data


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_is_read_or_refused_clearly(text):
    with contextlib.suppress(InputError):
        yamlfile.parse(text, "text")


def test_loading_leaves_torch_and_omegaconf_as_they_were(recipe):
    from omegaconf import OmegaConf

    state = torch.random.get_rng_state()
    load_config(recipe())
    assert OmegaConf.has_resolver("oc.env") and torch.equal(state, torch.random.get_rng_state())

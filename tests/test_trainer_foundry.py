"""llm-foundry's pretraining YAMLs, in both published forms: what is mapped, ignored by name, and refused."""

import re

import pytest

from mpt import MptConfig
from trainer.config import load_config, validate
from trainer.errors import InputError
from trainer.lora import LoraConfig

# The form of later releases: values under `variables`.
NEW = """\
variables:
  data_local: ./c4-copy
  data_remote:
  max_seq_len: 2048
  global_seed: 23
  run_name:

max_seq_len: ${variables.max_seq_len}
run_name: ${variables.run_name}

model:
  name: mpt_causal_lm
  init_device: meta
  d_model: 768
  n_heads: 12
  n_layers: 12
  expansion_ratio: 4
  max_seq_len: ${variables.max_seq_len}
  vocab_size: 50368
  attn_config:
    attn_impl: flash
  loss_fn: torch_crossentropy

tokenizer:
  name: EleutherAI/gpt-neox-20b
  kwargs:
    model_max_length: ${variables.max_seq_len}

train_loader:
  name: text
  dataset:
    local: ${variables.data_local}
    remote: ${variables.data_remote}
    split: train
    shuffle: true
    max_seq_len: ${variables.max_seq_len}
    shuffle_seed: ${variables.global_seed}
  drop_last: true
  num_workers: 8

eval_loader:
  name: text
  dataset:
    local: ${variables.data_local}
    remote: ${variables.data_remote}
    split: val
    shuffle: false
    max_seq_len: ${variables.max_seq_len}
    shuffle_seed: ${variables.global_seed}
  drop_last: false
  num_workers: 8

scheduler:
  name: cosine_with_warmup
  t_warmup: 100ba
  alpha_f: 0.1

optimizer:
  name: decoupled_adamw
  lr: 6.0e-4
  betas:
  - 0.9
  - 0.95
  eps: 1.0e-08
  weight_decay: 0.0

algorithms:
  gradient_clipping:
    clipping_type: norm
    clipping_threshold: 1.5

max_duration: 4800ba  # ~ 2.5B tokens
eval_interval: 500ba
eval_first: false
eval_subset_num_batches: -1
global_train_batch_size: 256

seed: ${variables.global_seed}
device_eval_batch_size: 16
device_train_microbatch_size: 16
precision: amp_bf16

fsdp_config:
  sharding_strategy: FULL_SHARD
  mixed_precision: PURE
  activation_checkpointing: true
  activation_checkpointing_reentrant: false
  limit_all_gathers: true

progress_bar: false
log_to_console: true
console_log_interval: 5ba

callbacks:
  speed_monitor:
    window_size: 10
  lr_monitor: {}

loggers:
  wandb:
    project: mpt
    log_artifacts: true

save_interval: 500ba
save_num_checkpoints_to_keep: 1
save_folder: ./{run_name}/checkpoints
"""

# The form of the first release: variables at the top level.
OLD = (
    NEW.replace(NEW[: NEW.index("max_seq_len: ${variables")], "data_local: ./c4-copy\ndata_remote:\nglobal_seed: 23\n")
    .replace("max_seq_len: ${variables.max_seq_len}\nrun_name: ${variables.run_name}", "max_seq_len: 2048\nrun_name:")
    .replace("${variables.", "${")
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads llm-foundry text with (old, new) changes and override arguments."""
    monkeypatch.delenv("RUN_NAME", raising=False)

    def load(*changes, text=NEW, arguments=()):
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new, 1)
        path = tmp_path / "theirs.yaml"
        path.write_text(text)
        return load_config(path, arguments)

    return load


@pytest.mark.parametrize("text", [NEW, OLD], ids=["new", "old"])
def test_a_pretraining_yaml_loads_as_it_is(load, text, capsys):
    config = load(text=text)
    assert config.run_name == "llm" and config.save_folder == "./llm"  # llm-foundry's own default name
    assert (config.max_seq_len, config.seed, config.max_duration, config.eval_interval) == (2048, 23, "4800ba", "500ba")
    assert (config.global_train_batch_size, config.device_train_microbatch_size, config.device_eval_batch_size) == (
        256,
        16,
        16,
    )
    dataset = config.train_loader.dataset
    assert (dataset.local, dataset.split, dataset.shuffle, dataset.shuffle_seed) == ("./c4-copy", "train", True, 23)
    assert config.eval_loader.dataset.split == "val" and config.train_loader.num_workers == 8
    assert config.optimizer.betas == (0.9, 0.95) and config.optimizer.lr == 6e-4 and config.optimizer.weight_decay == 0
    assert config.optimizer.decay_all is True
    assert (config.scheduler.name, config.scheduler.t_warmup, config.scheduler.alpha_f) == (
        "cosine_with_warmup",
        "100ba",
        0.1,
    )
    assert config.gradient_clip_norm == 1.5 and config.log_interval == 5
    assert config.activation_checkpointing == "full" and config.fsdp_config.reduce_dtype == "bf16"
    assert config.loggers.progress is False and config.loggers.wandb.project == "mpt"
    assert config.save_num_checkpoints_to_keep == 1

    resolved = validate(config, 8, open_data=False)
    model = resolved.model_config
    # llm-foundry's defaults, not Hugging Face's: learned positions, biases, Kaiming initialisation.
    assert model.attn_config.alibi is False and model.learned_pos_emb is True and model.no_bias is False
    assert model.init_config.name == "kaiming_normal_" and model.norm_type == "low_precision_layernorm"
    assert (resolved.steps, resolved.accumulation) == (4800, 2)

    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "read as an llm-foundry YAML" in notice
    variables = ["data_local", "data_remote", "global_seed"] if text is OLD else []
    expected = {
        "model.loss_fn", "tokenizer.kwargs.model_max_length", "fsdp_config.activation_checkpointing_reentrant",
        "fsdp_config.limit_all_gathers", "loggers.wandb.log_artifacts", "log_to_console",
        "callbacks.speed_monitor", "callbacks.lr_monitor", *variables,
    }  # fmt: skip
    assert set(notice.strip().split("ignored: ")[1].split(", ")) == expected


def test_only_rank_0_prints_the_notice(load, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load()
    assert capsys.readouterr().err == ""


def test_ours_is_not_taken_for_theirs(load, capsys):
    load_config("yaml/mpt-125m.yaml")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argument", "read", "expected"),
    [
        ("max_duration=10ba", lambda c: c.max_duration, "10ba"),
        ("variables.max_seq_len=1024", lambda c: (c.max_seq_len, c.model["max_seq_len"]), (1024, 1024)),
        ("kernels=torch", lambda c: c.kernels, "torch"),
        ("gradient_clip_norm=2.0", lambda c: c.gradient_clip_norm, 2.0),
        ("fsdp_config.replicate=2", lambda c: c.fsdp_config.replicate, 2),
        ("algorithms.gradient_clipping.clipping_threshold=3", lambda c: c.gradient_clip_norm, 3.0),
        ("train_loader.dataset.local=data/mine", lambda c: c.train_loader.dataset.local, "data/mine"),
        ("loggers.wandb.mode=offline", lambda c: c.loggers.wandb.mode, "offline"),
        ("loggers.progress=true", lambda c: c.loggers.progress, True),
        ("run_name=mine", lambda c: (c.run_name, c.save_folder), ("mine", "./mine")),
    ],
)
def test_overrides_in_either_language(load, argument, read, expected):
    assert read(load(arguments=[argument])) == expected


@pytest.mark.parametrize(
    ("old", "new", "read", "expected"),
    [
        (
            "  gradient_clipping:\n    clipping_type: norm\n    clipping_threshold: 1.5\n",
            "",
            lambda c: c.gradient_clip_norm,
            None,
        ),
        ("max_duration: 4800ba", "max_duration: 2", lambda c: c.max_duration, "2ep"),
        ("eval_interval: 500ba\n", "", lambda c: c.eval_interval, "1ep"),
        ("save_interval: 500ba", "save_interval: 3", lambda c: c.save_interval, "3ep"),
        ("  alpha_f: 0.1\n", "", lambda c: c.scheduler.alpha_f, 0.0),
        ("t_warmup: 100ba", "t_warmup: 0.02dur", lambda c: c.scheduler.t_warmup, "96ba"),
        ("t_warmup: 100ba", "t_warmup: 100ba\n  t_max: 1dur", lambda c: c.scheduler.t_max, "4800ba"),
        (
            "cosine_with_warmup\n  t_warmup: 100ba\n  alpha_f: 0.1",
            "inv_sqrt_with_warmup\n  t_warmup: 100ba\n  t_scale: 100ba\n  t_cooldown: 0ba\n  alpha_f_decay: 0.05",
            lambda c: (c.scheduler.name, c.scheduler.alpha_f),
            ("inv_sqrt_with_warmup", 0.05),
        ),
        ("FULL_SHARD", "SHARD_GRAD_OP", lambda c: c.fsdp_config.reshard_after_forward, False),
        ("mixed_precision: PURE", "mixed_precision: DEFAULT", lambda c: c.fsdp_config.reduce_dtype, "fp32"),
        ("precision: amp_bf16", "precision: fp32", lambda c: c.fsdp_config.reduce_dtype, "fp32"),
        (
            "activation_checkpointing: true",
            "activation_checkpointing: false",
            lambda c: c.activation_checkpointing,
            "none",
        ),
        ("progress_bar: false", "compile_config: {}", lambda c: c.compile, True),
        (
            "  attn_config:",
            "  no_bias: true\n  attn_config:\n    alibi: true",
            lambda c: c.model["attn_config"]["alibi"],
            True,
        ),
        ("    shuffle: true\n", "", lambda c: c.train_loader.dataset.shuffle, False),
        ("./{run_name}/checkpoints", "/scratch/{run_name}", lambda c: c.save_folder, "/scratch/llm"),
        ("run_name:\n", "run_name: theirs\n", lambda c: c.run_name, "theirs"),
        ("eval_first: false", "eval_first: true", lambda c: c.eval_first, True),
        ("microbatch_size: 16", "microbatch_size: auto", lambda c: c.device_train_microbatch_size, "auto"),
    ],
)
def test_values_and_defaults(load, old, new, read, expected):
    assert read(load((old, new))) == expected


STREAMS = """\
    streams:
      web:
        local: ./web
        remote:
        proportion: 0.75
        split: train
      code:
        local: ./code
        proportion: 0.25
"""


def test_streams_become_a_mix(load):
    config = load(
        ("    local: ${variables.data_local}\n    remote: ${variables.data_remote}\n    split: train\n", STREAMS)
    )
    entries = [(entry.local, entry.split, entry.weight) for entry in config.train_loader.dataset.mix]
    assert entries == [("./web", "train", 0.75), ("./code", None, 0.25)]
    assert config.train_loader.dataset.local is None


def test_one_stream_is_a_folder(load):
    one = STREAMS[: STREAMS.index("      code")].replace("        proportion: 0.75\n", "")
    dataset = load(
        ("    local: ${variables.data_local}\n    remote: ${variables.data_remote}\n    split: train\n", one)
    ).train_loader.dataset
    assert (dataset.local, dataset.split, dataset.mix) == ("./web", "train", None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "data_remote:",
            "data_remote: s3://bucket/c4",
            r"theirs.yaml:33: train_loader.dataset.remote: s3://bucket/c4: data is not fetched",
        ),
        (
            "name: text",
            "name: denoising",
            r"train_loader.name: 'denoising' is not supported; expected text or finetuning",
        ),
        ("mpt_causal_lm", "hf_causal_lm", r"theirs.yaml:12: model: name is 'hf_causal_lm'"),
        ("    attn_impl: flash", "    rope: true", r"attn_config.rope is True"),
        ("  d_model: 768", "  d_modle: 768", r"unknown key d_modle.*d_model"),
        ("  n_heads: 12", "  n_heads: 11", r"d_model 768 is not divisible by n_heads 11"),
        (
            "  gradient_clipping:",
            "  label_smoothing: {}\n  gradient_clipping:",
            r"algorithms.label_smoothing: is not supported",
        ),
        ("clipping_type: norm", "clipping_type: value", r"clipping_type: 'value' is not supported; expected norm"),
        (
            "clipping_threshold: 1.5",
            "clipping_threshold: much",
            r"theirs.yaml:7\d: gradient_clip_norm: expected a number",
        ),
        ("FULL_SHARD", "HYBRID_SHARD", r"HYBRID_SHARD is set by .*fsdp_config.replicate=N"),
        ("FULL_SHARD", "HALF_SHARD", r"HALF_SHARD is unknown"),
        ("mixed_precision: PURE", "mixed_precision: {param_dtype: bf16}", r"mixed_precision: .* is not supported"),
        ("activation_checkpointing: true", "activation_checkpointing: some", r"expected true or false, found 'some'"),
        ("precision: amp_bf16", "precision: amp_fp16", r"amp_fp16 is not supported"),
        ("precision: amp_bf16", "precision: amp_fp8", r"precision: expected one of fp32, amp_bf16"),
        ("decoupled_adamw", "adalr_lion", r"optimizer.name: expected one of decoupled_adamw, decoupled_lionw"),
        ("  eps: 1.0e-08", "  disable_grad: x", r"unknown key optimizer.disable_grad"),
        ("  alpha_f: 0.1", "  alpha_i: 2.0", r"scheduler.alpha_i: 2.0 is not supported"),
        ("max_duration: 4800ba", "max_duration: 4800sp", r"max_duration='4800sp' is not a duration"),
        ("eval_interval: 500ba", "eval_intervall: 500ba", r"eval_intervall: unknown key; did you mean eval_interval\?"),
        ("global_train_batch_size: 256\n", "", r"global_train_batch_size is required"),
        ("eval_first: false", "train_subset_num_batches: 5", r"train_subset_num_batches: 5 is not supported"),
        ("eval_first: false", "tp_config: {degree: 2}", r"tp_config: .* is not supported"),
        (
            "save_folder: ./{run_name}/checkpoints",
            "save_folder: s3://b/{run_name}/checkpoints",
            r"save_folder=s3://b/llm: remote",
        ),
        (
            "save_folder: ./{run_name}/checkpoints",
            "load_path: ./x/latest-rank{rank}.symlink",
            r"latest-rank0\.symlink is a text file that names",
        ),
        (
            "    max_seq_len: ${variables.max_seq_len}\n    shuffle_seed",
            "    max_seq_len: 512\n    shuffle_seed",
            r"train_loader.dataset.max_seq_len: 512",
        ),
        ("    shuffle: true\n", "    epoch_size: 5000\n", r"epoch_size: 5000 is not supported"),
        ("run_name:\n", "run_name: ${oc.env:HOME}\n", r"variables.run_name: .*same file"),
    ],
)
def test_what_would_change_the_meaning_is_refused(load, old, new, message):
    with pytest.raises(InputError) as caught:
        load((old, new))
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.parametrize("section", ["model", "train_loader", "optimizer", "scheduler"])
def test_a_missing_section_is_named(load, section):
    with pytest.raises(InputError, match=f"{section}: is required"):
        load((f"\n{section}:\n", f"\nmy_own_{section}_notes:\n"))


def test_streams_that_cannot_be_mapped(load):
    place = "    local: ${variables.data_local}\n    remote: ${variables.data_remote}\n    split: train\n"
    for old, new, message in (
        ("        proportion: 0.25\n", "", "every stream a proportion"),
        ("        proportion: 0.25\n", "        proportion: 0.25\n        repeat: 2\n", "repeat: 2 is not supported"),
        ("        remote:\n", "        remote: gs://b/web\n", "data is not fetched"),
        ("        proportion: 0.25\n", "        proportion: much\n", "'much': expected a number above 0"),
        ("        proportion: 0.25\n", "        proportion: -1\n", "-1: expected a number above 0"),
    ):
        with pytest.raises(InputError, match=message):
            load((place, STREAMS.replace(old, new)))


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ("web", "expected a mapping or list of streams, found 'web'"),
        ("[web]", r"streams\[0\]: expected a section, found 'web'"),
        ("[{local: a, proportion: true}]", r"streams\[0\].proportion: True: expected a number above 0"),
        ("[{local: a, proportion: 0}]", r"streams\[0\].proportion: 0: expected a number above 0"),
    ],
)
def test_streams_that_are_none(load, streams, message):
    place = "    local: ${variables.data_local}\n    remote: ${variables.data_remote}\n    split: train\n"
    with pytest.raises(InputError, match=message):
        load((place, f"    streams: {streams}\n"))


# A finetuning YAML, in the same published form.
FINETUNING = """\
max_seq_len: 2048
global_seed: 17
run_name: dolly

model:
  name: hf_causal_lm
  init_device: mixed
  pretrained_model_name_or_path: BASE
  pretrained: true
  use_auth_token: false
  config_overrides:
    max_seq_len: ${max_seq_len}
    resid_pdrop: 0.1
    attn_config:
      attn_impl: triton
      clip_qkv: 6

tokenizer:
  name: EleutherAI/gpt-neox-20b
  kwargs:
    model_max_length: ${max_seq_len}

train_loader:
  name: finetuning
  dataset:
    hf_name: mosaicml/dolly_hhrlhf
    split: train
    max_seq_len: ${max_seq_len}
    allow_pad_trimming: false
    decoder_only_format: true
    packing_ratio: 9
    shuffle: true
  drop_last: true
  num_workers: 8

eval_loader:
  name: finetuning
  dataset:
    hf_name: mosaicml/dolly_hhrlhf
    split: test
    max_seq_len: ${max_seq_len}
    decoder_only_format: true
    shuffle: false

scheduler:
  name: linear_decay_with_warmup
  t_warmup: 50ba
  alpha_f: 0

optimizer:
  name: decoupled_adamw
  lr: 5.0e-6
  betas: [0.9, 0.999]
  eps: 1.0e-8
  weight_decay: 0

max_duration: 2ep
eval_interval: 1ep
eval_first: true
global_train_batch_size: 48
device_train_microbatch_size: 4
precision: amp_bf16
"""


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=50432).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_finetuning_yaml_loads_as_it_is(load, base, capsys):
    config = load(("BASE", str(base)), text=FINETUNING)
    assert config.load_path == str(base) and config.max_seq_len == 2048 and config.eval_first is True
    model = config.model
    assert (model["d_model"], model["resid_pdrop"], model["attn_config"]["clip_qkv"]) == (64, 0.1, 6)
    assert model["attn_config"]["alibi"] is True  # the base's, not llm-foundry's default
    train, held_out = config.train_loader.dataset, config.eval_loader.dataset
    assert (train.hf_name, train.split, train.shuffle) == ("mosaicml/dolly_hhrlhf", "train", True)
    assert (train.packing, train.too_long, held_out.packing) == (True, "cut", False)
    assert config.scheduler.name == "linear_decay_with_warmup" and config.optimizer.betas == (0.9, 0.999)
    ignored = set(capsys.readouterr().err.strip().split("ignored: ")[1].split(", "))
    assert ignored == {
        "model.init_device", "model.use_auth_token", "tokenizer.kwargs.model_max_length", "global_seed",
        "train_loader.dataset.allow_pad_trimming",
    }  # fmt: skip


def test_a_local_data_set_under_hf_name(load, base, tmp_path):
    (tmp_path / "examples").mkdir()
    dataset = load(
        ("BASE", str(base)), ("mosaicml/dolly_hhrlhf", str(tmp_path / "examples")), text=FINETUNING
    ).train_loader.dataset
    assert (dataset.local, dataset.hf_name, dataset.split) == (str(tmp_path / "examples"), None, "train")


def test_adapters_of_a_finetuning_yaml(load, base):
    def lora(settings):
        return load(("BASE", str(base)), ("  pretrained: true", f"  peft_config: {settings}"), text=FINETUNING).lora

    full = (
        "{peft_type: LORA, task_type: CAUSAL_LM, r: 16, lora_alpha: 32, lora_dropout: 0.1, target_modules: [up_proj]}"
    )
    assert lora(full) == LoraConfig(16, 32, 0.1, ["up_proj"])
    assert lora("{peft_type: LORA}") == LoraConfig(8, 8, 0.0, ["Wqkv"])  # peft's defaults
    assert lora("null") is None
    for settings, message in (
        ("{peft_type: IA3}", "model.peft_config.peft_type: 'IA3' is not supported; expected LORA"),
        ("{use_dora: true}", "model.peft_config.use_dora: is not supported; known are r, lora_alpha"),
        ("{target_modules: [q]}", "lora.target_modules: q: no such layer"),
    ):
        with pytest.raises(InputError, match=rf"theirs.yaml:\d+: .*{message}"):
            lora(settings)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("decoder_only_format: true", "decoder_only_format: false", "decoder_only_format: False is not supported"),
        ("    packing_ratio: 9", "    preprocessing_fn: a:b", "preprocessing_fn: 'a:b' is not supported"),
        (
            "    packing_ratio: 9",
            "    target_responses: last",
            "target_responses: 'last' is not supported; expected all",
        ),
        ("  pretrained: true", "  pretrained: false", "model.pretrained: False is not supported"),
        ("BASE", "nowhere/at/all", "theirs.yaml:8: model.pretrained=nowhere/at/all: .* does not exist"),
    ],
)
def test_finetuning_that_would_mean_something_else_is_refused(load, base, old, new, message):
    changes = [(old, new)] if old == "BASE" else [("BASE", str(base)), (old, new)]
    with pytest.raises(InputError, match=message):
        load(*changes, text=FINETUNING)

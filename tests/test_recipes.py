"""Every recipe in yaml/ loads, has the published values, and its numbers add up at a sensible number of processes."""

import re
from pathlib import Path

import pytest
import torch

from mpt.config import count_parameters
from trainer.config import build_model_config, load_config, validate
from trainer.plan import plan

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "yaml").glob("*.yaml"))

# d_model, n_heads, n_layers, vocab_size, learning rate, global batch, steps, processes
PRETRAINING = {
    "mpt-125m": (768, 12, 12, 50368, 6e-4, 256, 4800, 8),
    "mpt-350m": (1024, 16, 24, 50368, 3e-4, 256, 13400, 8),
    "mpt-760m": (1536, 12, 24, 50368, 2.5e-4, 256, 29000, 8),
    "mpt-1b": (2048, 16, 24, 50368, 2e-4, 512, 24800, 8),
    "mpt-3b": (2560, 20, 32, 50368, 1.6e-4, 512, 51500, 8),
    "mpt-7b": (4096, 32, 32, 50432, 1.2e-4, 1024, 63900, 8),
    "mpt-13b": (5120, 40, 40, 50368, 1e-4, 1024, 124000, 64),
    "mpt-30b": (7168, 64, 48, 50432, 1e-4, 2048, 143100, 128),
    "mpt-70b": (8192, 64, 80, 50368, 8e-5, 2048, 333800, 256),
}
# base, learning rate, betas, global batch, length, duration, packing, processes
FINETUNES = {
    "mpt-7b-instruct": ("mpt-7b", 5e-6, (0.9, 0.999), 48, 2048, "2ep", False, 8),
    "mpt-7b-chat": ("mpt-7b", 5e-6, (0.9, 0.999), 48, 2048, "2ep", True, 8),
    "mpt-30b-instruct": ("mpt-30b", 9.65e-6, (0.9, 0.95), 72, 8192, "8ep", True, 72),
    "mpt-7b-lora": ("mpt-7b", 2e-4, (0.9, 0.999), 16, 2048, "1ep", True, 1),
    "mpt-tiny-lora": ("mpt-tiny", 5e-3, (0.9, 0.95), 4, 512, "1ep", True, 2),
    "mpt-tiny-instruct": ("mpt-tiny", 1e-3, (0.9, 0.95), 4, 512, "1ep", True, 2),
    "mpt-tiny-chat": ("mpt-tiny", 1e-3, (0.9, 0.95), 4, 512, "1ep", True, 2),
}
# base, learning rate, global batch, length, steps, alibi_bias_max, processes
STORYWRITERS = {
    "mpt-7b-storywriter": ("mpt-7b", 2e-6, 8, 65536, 2500, 16, 8),
    "mpt-tiny-storywriter": ("mpt-tiny", 3e-4, 4, 2048, 120, 8, 2),
}
BASES = {name: values[0] for name, values in (FINETUNES | STORYWRITERS).items()}
GIB = 2**30
PUBLISHED_PARAMETERS = {"mpt-7b": 6_649_286_656, "mpt-30b": 29_957_200_896}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RUN_NAME", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the same numbers on every machine


@pytest.fixture
def load(tmp_path):
    """Loads a recipe; a fine-tune's base is a folder with the base recipe's configuration."""

    def load(name, *overrides):
        if name in BASES:
            build_model_config(load_config(f"yaml/{BASES[name]}.yaml")).save_pretrained(tmp_path)
            overrides = (f"model.pretrained={tmp_path}", *overrides)
        return load_config(f"yaml/{name}.yaml", overrides)

    return load


def test_the_recipes_are_all_here():
    assert {"mpt-tiny", *PRETRAINING, *FINETUNES, *STORYWRITERS} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_adds_up(name, load):
    config = load(name)
    assert config.run_name == name
    world = {**PRETRAINING, **FINETUNES, **STORYWRITERS}.get(name, [2])[-1]
    if name in FINETUNES:  # epochs, which need the data
        config = load(name, "max_duration=1000ba", "eval_interval=100ba", "save_interval=100ba")
    resolved = validate(config, world, open_data=False)
    assert resolved.micro_batch * resolved.accumulation * world == config.global_train_batch_size
    assert resolved.warmup_steps < resolved.steps
    numbers = plan(config, resolved, world)
    assert numbers.parameters == count_parameters(resolved.model_config)
    assert [note.split(":")[0] for note in numbers.notes] == ["dataset.packing"] * config.train_loader.dataset.packing
    assert f"{numbers.parameters:,}" in str(numbers)


@pytest.mark.parametrize("name", PRETRAINING)
def test_published_values(name, load):
    d, heads, layers, vocab, lr, batch, steps, _ = PRETRAINING[name]
    config = load(name)
    resolved = validate(config, 1, open_data=False)
    model = resolved.model_config
    assert (model.d_model, model.n_heads, model.n_layers, model.vocab_size) == (d, heads, layers, vocab)
    assert (model.max_seq_len, model.expansion_ratio, model.norm_type) == (2048, 4, "low_precision_layernorm")
    assert model.attn_config.alibi is True and model.attn_config.alibi_bias_max == 8 and model.no_bias is True
    assert model.tie_word_embeddings is True and model.init_config.name == "kaiming_normal_"
    assert (config.global_train_batch_size, resolved.steps, resolved.warmup_steps) == (batch, steps, 100)
    optimizer, scheduler = config.optimizer, config.scheduler
    assert (optimizer.name, optimizer.lr, optimizer.betas) == ("decoupled_adamw", lr, (0.9, 0.95))
    assert (optimizer.eps, optimizer.weight_decay, config.gradient_clip_norm) == (1e-8, 0.0, 1.0)
    assert (scheduler.name, scheduler.alpha_f, config.precision) == ("cosine_with_warmup", 0.1, "amp_bf16")
    assert config.tokenizer.name == "EleutherAI/gpt-neox-20b"


@pytest.mark.parametrize("name", PRETRAINING)
def test_parameters_equal_the_formula(name, load):
    d, _, layers, vocab, *_ = PRETRAINING[name]
    expected = vocab * d + layers * (3 * d * d + d * d + 2 * d * 4 * d + 2 * d) + d
    assert count_parameters(validate(load(name), 1, open_data=False).model_config) == expected
    assert PUBLISHED_PARAMETERS.get(name, expected) == expected


@pytest.mark.parametrize("name", FINETUNES)
def test_values_of_the_fine_tunes(name, load):
    base, lr, betas, batch, length, duration, packing, _ = FINETUNES[name]
    config = load(name)
    assert config.model["d_model"] == load_config(f"yaml/{base}.yaml").model["d_model"]
    optimizer, scheduler = config.optimizer, config.scheduler
    assert (optimizer.name, optimizer.lr, optimizer.betas) == ("decoupled_adamw", lr, betas)
    assert (optimizer.eps, optimizer.weight_decay, config.gradient_clip_norm) == (1e-8, 0.0, 1.0)
    assert (scheduler.name, scheduler.alpha_f) == ("linear_decay_with_warmup", 0.0)
    assert scheduler.t_warmup == ("10ba" if "tiny" in name else "50ba")
    assert (config.global_train_batch_size, config.max_seq_len, config.max_duration) == (batch, length, duration)
    dataset, held_out = config.train_loader.dataset, config.eval_loader.dataset
    assert (dataset.packing, dataset.template) == (packing, held_out.template)
    assert (dataset.hf_name, dataset.local) == (held_out.hf_name, held_out.local)
    assert dataset.split != held_out.split and config.eval_first


def test_the_7b_adapters_are_planned_for_one_gpu_of_24_gib(load):
    config = load("mpt-7b-lora", "max_duration=1000ba", "eval_interval=0", "save_interval=0")
    numbers = plan(config, validate(config, 1, open_data=False), 1)
    assert numbers.adapters == 32 * 16 * (4096 + 3 * 4096 + 2 * 4096 + 2 * 5 * 4096)
    assert "fits into a GPU of 24 GiB" in str(numbers)
    tiny = load("mpt-tiny-lora")
    assert tiny.lora == config.lora and tiny.activation_checkpointing == config.activation_checkpointing == "full"


@pytest.mark.parametrize("name", STORYWRITERS)
def test_values_of_the_storywriters(name, load):
    _, lr, batch, length, steps, bias_max, _ = STORYWRITERS[name]
    config = load(name)
    resolved = validate(config, 1, open_data=False)
    attention = resolved.model_config.attn_config
    assert (attention.clip_qkv, attention.alibi_bias_max) == (6, bias_max)
    assert (config.max_seq_len, resolved.steps, config.global_train_batch_size) == (length, steps, batch)
    assert (config.optimizer.name, config.optimizer.lr) == ("decoupled_lionw", lr) and config.eval_first
    assert config.activation_checkpointing == "full"


def test_storywriter_fits_what_it_should(load):
    """One GPU of 139 GiB, and eight of 80 GB, with what CUDA itself takes to spare."""
    config = load("mpt-7b-storywriter")
    for world, gpu in ((1, 139 * GIB), (8, 80e9)):
        resolved = validate(config, world, open_data=False)
        assert plan(config, resolved, world).total_memory < 0.92 * gpu


@pytest.mark.parametrize("name", ["mpt-7b", "mpt-30b", "mpt-7b-chat", "mpt-30b-instruct", "mpt-7b-storywriter"])
def test_what_was_not_published_is_said_so(name):
    comment = (ROOT / "yaml" / f"{name}.yaml").read_text().split("run_name:")[0]
    assert re.search(r"Not published", comment) and ("not what MosaicML ran" in comment or "so ours" in comment)


def test_the_folder_is_no_package():
    assert not (ROOT / "yaml" / "__init__.py").exists()
    import yaml

    assert yaml.safe_load("a: 1") == {"a": 1}

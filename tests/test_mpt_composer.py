"""Composer's checkpoints: what is read out of a training's state, and the files that are written for it."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import HUB_CONFIG, TOKENIZER, published, same, write_composer

from mpt import MptConfig, MptForCausalLM
from mpt.checkpoint import load_weights, open_checkpoint
from mpt.composer import save_composer


@pytest.mark.parametrize("given", ["ep0-ba4-rank0.pt", "latest-rank0.pt", ""])
def test_composer(tmp_path: Path, given: str) -> None:
    trained = published()
    write_composer(tmp_path, trained)
    loaded = MptForCausalLM.from_pretrained(tmp_path / given)
    assert same(loaded, trained) and loaded.config == trained.config
    companions = open_checkpoint(tmp_path / given).companions
    assert json.loads(companions.pop("tokenizer.json")) == TOKENIZER
    # Neither code nor a config.json of someone's making.
    assert companions == {"merges.txt": b"a b\nc d", "chat_template.jinja": b"{{ messages }}"}


def test_composer_without_a_configuration(tmp_path: Path) -> None:
    trained = published()
    path = write_composer(tmp_path, trained, integrations={})
    with pytest.raises(ValueError, match=r"ep0-ba4-rank0\.pt has no configuration; put .* config\.json beside it"):
        MptForCausalLM.from_pretrained(path)
    load_weights(again := published(), path)
    assert same(again, trained)
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    assert same(MptForCausalLM.from_pretrained(path), trained)


def test_composer_means_llm_foundrys_defaults(tmp_path: Path) -> None:
    """What its configuration leaves out is llm-foundry's: no ALiBi, and biases."""
    config = {key: HUB_CONFIG[key] for key in ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")}
    trained = MptForCausalLM(MptConfig(**config, no_bias=False, attn_config={"alibi": False}))
    path = write_composer(tmp_path, trained, config | {"model_type": "mpt", "attn_config": {"qk_ln": False}})
    loaded = MptForCausalLM.from_pretrained(path)
    assert same(loaded, trained) and loaded.transformer.wpe is not None
    path = write_composer(
        tmp_path, published(), config | {"model_type": "mpt", "no_bias": True, "learned_pos_emb": False}
    )
    with pytest.warns(
        UserWarning, match=r"rank0\.pt describes another model: attn_config\.alibi False there, True here"
    ):
        load_weights(published(), path)


def test_a_configuration_of_transformers_means_its_defaults(tmp_path: Path) -> None:
    """Composer stores what a configuration has otherwise than its class: of transformers' MPT, ALiBi and no biases."""
    config = {key: HUB_CONFIG[key] for key in ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")}
    trained = MptForCausalLM(MptConfig(**config))
    path = write_composer(
        tmp_path, trained, config | {"model_type": "mpt"}, "transformers.models.mpt.modeling_mpt.MptForCausalLM"
    )
    loaded = MptForCausalLM.from_pretrained(path)
    assert same(loaded, trained) and loaded.config == trained.config


def test_what_composer_needs_to_open_it(tmp_path: Path) -> None:
    """Its loader imports the class by name, and asks for the tokenizer's settings, by the whole names of files."""
    trained = published()
    tensors = [(name, p.detach) for name, p in trained.named_parameters()]
    forms = {name: (tuple(p.shape), p.dtype) for name, p in trained.named_parameters()}
    files = {"tokenizer.json": b"{}", "merges.txt": b"a b\nc d", "chat_template.jinja": b"{{ messages }}"}
    save_composer(tensors, forms, trained.config, tmp_path / "a.pt", companions=files)
    held = torch.load(tmp_path / "a.pt", weights_only=True)["state"]["integrations"]["huggingface"]
    module, name = held["model"]["config"]["class"].rsplit(".", 1)
    assert getattr(pytest.importorskip(module), name).config_class.model_type == "mpt"
    assert held["tokenizer"].keys() == {*files, "tokenizer_config.json"}
    companions = open_checkpoint(tmp_path / "a.pt").companions
    assert companions.pop("tokenizer_config.json") and companions == files


def test_a_run_under_ddp(tmp_path: Path) -> None:
    trained = published()
    weights = {f"module.model.{name}": p.detach() for name, p in trained.named_parameters()}
    assert same(MptForCausalLM.from_pretrained(write_composer(tmp_path, trained, model=weights)), trained)


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    for value in (torch.ones(1), {1}):
        path = write_composer(tmp_path, published(), HUB_CONFIG | {"d_model": value})
        with pytest.raises(ValueError, match=r"rank0\.pt: its configuration or tokenizer is no JSON"):
            open_checkpoint(path)
    path = write_composer(tmp_path, published(), HUB_CONFIG | {"d_modle": 64})
    with pytest.raises(ValueError, match=r"rank0\.pt: its configuration: unknown key d_modle"):
        MptForCausalLM.from_pretrained(path)


def test_what_is_written_has_to_be_whole(tmp_path: Path) -> None:
    trained = published()
    tensors = [(name, p.detach) for name, p in trained.named_parameters()]
    forms = {name: (tuple(p.shape), p.dtype) for name, p in trained.named_parameters()}
    other = ("transformer.norm_f.weight", lambda: torch.ones(3))
    for given, message in (
        (tensors[1:], r"1 parameters were not given, the first of them model\.transformer\.wte\.weight"),
        ([*tensors, tensors[0]], r"transformer\.wte\.weight \(97, 64\) is given twice"),
        ([*tensors[:-1], other], r"norm_f\.weight \(3,\) is given twice, or is not a parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            save_composer(given, forms, trained.config, tmp_path / "a.pt", companions={})
        assert not list(tmp_path.iterdir())


def test_each_weight_keeps_its_dtype(tmp_path: Path) -> None:
    trained = published()
    trained.transformer.norm_f.float()
    tensors = [(name, p.detach) for name, p in trained.named_parameters()]
    forms = {name: (tuple(p.shape), p.dtype) for name, p in trained.named_parameters()}
    save_composer(tensors, forms, trained.config, tmp_path / "a.pt", companions={"tokenizer.json": b"{}"})
    stored = open_checkpoint(tmp_path / "a.pt").tensors
    assert {name: s.dtype for name, s in stored.items()} == {name: p.dtype for name, p in trained.named_parameters()}
    assert all(torch.equal(stored[name].rows(0, len(p)), p) for name, p in trained.named_parameters())

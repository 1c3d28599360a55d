"""Where a fine-tune starts: the model section filled in from a folder or the hub, and what differs."""

import pytest
import torch

from mpt import MptConfig, MptForCausalLM, MptForSequenceClassification
from trainer import InputError, load_config
from trainer.checkpoint import compare_shapes, describe, load_weights
from trainer.config import build_model_config
from trainer.pretrained import differences

RECIPE = """\
run_name: small
max_seq_len: 64
max_duration: 5ba
global_train_batch_size: 8
model: {pretrained: BASE}
train_loader: {dataset: {local: data}}
optimizer: {lr: 1e-3}
"""


@pytest.fixture
def base(tmp_path):
    config = MptConfig(d_model=48, n_heads=6, n_layers=3, vocab_size=300, max_seq_len=32, no_bias=False, eos_token_id=7)
    config.attn_config.clip_qkv = 6
    MptForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def load(tmp_path, base):
    def load(*overrides, name=base):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.replace("BASE", str(name)))
        return load_config(path, overrides)

    return load


def test_the_section_is_the_bases_configuration(load, base):
    config = load()
    theirs, ours = (c.to_dict(extra=False) for c in (MptConfig.from_pretrained(base), build_model_config(config)))
    assert ours.pop("max_seq_len") == 64 and theirs.pop("max_seq_len") == 32
    assert ours == theirs and config.load_path == str(base)
    assert "pretrained" not in config.model  # what is written to the run folder stands on its own


def test_null_unsets_it(load):
    config = load("model.pretrained=null", "model.d_model=32", "model.n_heads=4", "model.n_layers=2")
    assert config.model == {"d_model": 32, "n_heads": 4, "n_layers": 2} and config.load_path is None


def test_fields_beside_it_go_before(load, base):
    config = load("model.resid_pdrop=0.1", "model.attn_config.alibi_bias_max=16", "load_path=elsewhere")
    model = build_model_config(config)
    assert (model.resid_pdrop, model.attn_config.alibi_bias_max, model.attn_config.clip_qkv) == (0.1, 16, 6)
    assert model.no_bias is False and config.load_path == "elsewhere"
    assert sorted(differences(str(base), model)) == ["attn_config.alibi_bias_max: 8 -> 16", "resid_pdrop: 0.0 -> 0.1"]


def test_llm_foundrys_defaults_do_not_go_before_the_base(load):
    model = build_model_config(load("model.name=mpt_causal_lm"))
    assert model.attn_config.alibi is True and model.init_config is None


def test_nothing_to_compare(base):
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    (said,) = differences(str(base), MptConfig())
    assert said.startswith("configuration cannot be compared: ") and "model_type is 'gpt2'" in said
    (base / "config.json").unlink()
    assert differences(str(base), MptConfig()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"recipe.yaml:5: model.pretrained=nowhere: nowhere does not exist; give a model's folder"),
        ("17", r"model.pretrained=17; expected the folder of a model, or a name on the hub"),
    ],
)
def test_a_base_that_is_not_there(load, name, message):
    with pytest.raises(InputError, match=message):
        load(name=name)


def test_a_damaged_configuration(load, base):
    (base / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"recipe.yaml:5: model.pretrained=.*config.json"):
        load()


def test_of_a_hub_model_only_the_configuration_is_fetched_for_the_section(load, base, monkeypatch):
    asked = []

    def download_file(name, file, revision):
        asked.append((name, file))
        return base / file

    monkeypatch.setattr("mpt.hub.download_file", download_file)
    config = load(name="org/model")
    assert config.load_path == "org/model" and config.model["d_model"] == 48
    assert asked == [("org/model", "config.json")]


@pytest.mark.filterwarnings("ignore:.*which MptForCausalLM does not use")
def test_a_classifier_is_a_base_without_its_head(tmp_path):
    trained = MptForSequenceClassification(MptConfig(d_model=48, n_heads=6, n_layers=1, vocab_size=300, num_labels=3))
    trained.save_pretrained(tmp_path)
    model = MptForCausalLM(MptConfig(d_model=48, n_heads=6, n_layers=1, vocab_size=300))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert compare_shapes(tmp_path, shapes, describe(tmp_path)) is None
    load_weights(tmp_path, model)
    theirs = dict(trained.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())

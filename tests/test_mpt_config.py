"""MptConfig: every spelling that loads, every field that is checked, and parameter counts against SPEC.md's formula."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch

from mpt import MptAttentionConfig, MptConfig, MptForCausalLM
from mpt.config import count_parameters, parameter_shapes

HUB_7B = """{
  "architectures": ["MPTForCausalLM"],
  "attn_config": {"alibi": true, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
    "attn_type": "multihead_attention", "attn_uses_sequence_id": false, "clip_qkv": null, "prefix_lm": false,
    "qk_ln": false, "softmax_scale": null},
  "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig", "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
  "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4,
  "init_config": {"emb_init_std": null, "emb_init_uniform_lim": null, "fan_mode": "fan_in",
    "init_div_is_residual": true, "init_gain": 0, "init_nonlinearity": "relu", "init_std": 0.02,
    "name": "kaiming_normal_", "verbose": 0},
  "init_device": "cpu", "learned_pos_emb": true, "logit_scale": null, "max_seq_len": 2048, "model_type": "mpt",
  "n_heads": 32, "n_layers": 32, "no_bias": true, "norm_type": "low_precision_layernorm", "resid_pdrop": 0,
  "tokenizer_name": "EleutherAI/gpt-neox-20b", "torch_dtype": "bfloat16", "transformers_version": "4.28.1",
  "use_cache": false, "verbose": 0, "vocab_size": 50432}"""

SMALL = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 50, "max_seq_len": 16}


def formula(c: MptConfig) -> int:
    """The closed form of the parameter count."""
    d, h, g, big_d = c.d_model, c.n_heads, c.kv_heads, c.d_head
    f, q = int(d * c.expansion_ratio), (h + 2 * g) * big_d
    count = c.vocab_size * d + c.n_layers * (q * d + d * d + 2 * f * d + 2 * d) + d
    if c.learned_pos_emb and not c.attn_config.alibi:
        count += c.max_seq_len * d
    if not c.tie_word_embeddings:
        count += c.vocab_size * d
    if c.attn_config.qk_ln:
        count += c.n_layers * (h + g) * big_d
    if not c.no_bias:
        norms = "rms" not in c.norm_type
        count += c.n_layers * (q + d + f + d + 2 * d * norms) + d * norms
        count += c.n_layers * (h + g) * big_d * norms * c.attn_config.qk_ln
    return count


def test_hub_config_loads() -> None:
    config = MptConfig.from_dict(json.loads(HUB_7B))
    assert (config.d_model, config.n_layers, config.vocab_size) == (4096, 32, 50432)
    assert config.init_config is not None and config.init_config.name == "kaiming_normal_"
    assert config.attn_config.alibi and config.no_bias


def test_extra_keys_are_kept_and_written_back(tmp_path) -> None:
    """What only other libraries read: as it came, readable, without part in what two configurations have in common."""
    hub = json.loads(HUB_7B) | {"fc_type": "torch", "ffn_config": {"ffn_type": "mptmlp"}}
    hub["attn_config"] |= {"rope": False, "rope_theta": 10000}
    config = MptConfig.from_dict(hub)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in hub} == hub
    assert config.auto_map == hub["auto_map"] and config.tokenizer_name == "EleutherAI/gpt-neox-20b"
    assert config.to_dict()["auto_map"] is not config.auto_map
    plain = config.to_dict(extra=False)
    assert hub.keys() - plain.keys() == {
        "architectures", "auto_map", "fc_type", "ffn_config", "tokenizer_name", "torch_dtype", "transformers_version",
        "verbose",
    }  # fmt: skip
    assert not plain["attn_config"].keys() & {"rope", "rope_theta"} and "verbose" not in plain["init_config"]
    assert MptConfig.from_dict(plain) == config == pickle.loads(pickle.dumps(config))
    assert pickle.loads(pickle.dumps(config)).auto_map == copy.deepcopy(config).auto_map == config.auto_map
    config.torch_dtype = torch.float16
    config.save_pretrained(tmp_path, architecture="MptForTokenClassification")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["torch_dtype"] == "float16" and written["architectures"] == ["MptForTokenClassification"]
    assert MptConfig(**SMALL).verbose == 0 and "verbose" not in MptConfig(**SMALL).to_dict()
    with pytest.raises(AttributeError, match="no field 'auto_map'"):
        _ = MptConfig(**SMALL).auto_map


def test_hub_weights_with_their_config_load_in_transformers(tmp_path) -> None:
    """auto_map and the rest do not lead it to code that is not there, nor dtype to another than the weights have."""
    from transformers import AutoModelForCausalLM

    hub = json.loads(HUB_7B) | SMALL | {"dtype": "bfloat16"}
    model = MptForCausalLM(MptConfig.from_dict(hub))
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "MptForCausalLM" and theirs.dtype == torch.float32
    assert torch.equal(theirs.transformer.wte.weight, model.transformer.wte.weight)


def test_storywriter() -> None:
    """Its config.json, which transformers cannot parse; and the three lines of its card that change it."""
    attn = {"clip_qkv": 6, "alibi_bias_max": 16, "attn_pdrop": 0.0}
    config = MptConfig.from_dict(json.loads(HUB_7B) | {"max_seq_len": 65536, "attn_config": attn})
    assert (config.attn_config.clip_qkv, config.attn_config.alibi_bias_max, config.max_seq_len) == (6.0, 16.0, 65536)
    config.attn_config["attn_impl"] = "triton"
    config.init_device = "cuda:0"
    config.max_seq_len = 83968
    config.check()
    assert config.attn_config.attn_impl == config.attn_config["attn_impl"] == "triton"
    with pytest.raises(AttributeError, match="did you mean 'clip_qkv'"):
        config.attn_config.clip_qvk = 6
    with pytest.raises(AttributeError, match="MptAttentionConfig has no field 'impl'"):
        config.attn_config["impl"] = "torch"


def test_labels() -> None:
    """num_labels, id2label and label2id are one thing; transformers reads the same of what is written."""
    from transformers import MptConfig as Theirs

    names = {0: "no", 1: "yes", 2: "perhaps"}
    for given in (
        {},
        {"num_labels": 2},
        {"num_labels": 3},
        {"id2label": names},
        {"id2label": {str(i): name for i, name in names.items()}, "num_labels": 3},
        {"label2id": {name: i for i, name in names.items()}},
        {"id2label": names, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},  # what transformers leaves of the default
        {"num_labels": 1, "problem_type": "regression"},
    ):
        config = MptConfig(**SMALL, **given)
        assert config.num_labels == len(config.id2label)
        assert config.label2id == {name: i for i, name in config.id2label.items()}
        assert MptConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        theirs = Theirs(**config.to_dict())
        assert (theirs.num_labels, theirs.id2label) == (config.num_labels, config.id2label)
        assert (theirs.label2id, theirs.problem_type) == (config.label2id, config.problem_type)
    config = MptConfig(**SMALL, id2label=names)
    config.num_labels = 3
    assert config.id2label == names
    config.num_labels = 2
    assert config == MptConfig(**SMALL) and not config.to_dict().keys() & {"id2label", "label2id", "num_labels"}
    config.label2id = {"a": 0}
    assert config.id2label == {0: "a"} and config.num_labels == 1


def test_overrides() -> None:
    """Under any of a field's names; parts of attn_config only where given; the file's labels give way."""
    values = SMALL | {"attn_config": {"clip_qkv": 6, "alibi_bias_max": 16}, "id2label": {"0": "a", "1": "b", "2": "c"}}
    config = MptConfig.from_dict(
        values, hidden_size=64, num_labels=4, attn_config={"alibi_bias_max": 8}, use_cache=False
    )
    assert (config.d_model, config.num_labels, config.id2label[3]) == (64, 4, "LABEL_3")
    assert (config.attn_config.clip_qkv, config.attn_config.alibi_bias_max) == (6, 8)
    assert MptConfig.from_dict(values | {"hidden_size": 32}, d_model=64).d_model == 64
    assert MptConfig.from_dict(values, attn_config=MptAttentionConfig()).attn_config == MptAttentionConfig()
    with pytest.raises(ValueError, match="hidden_size is 32 and d_model is 64"):
        MptConfig.from_dict(values, d_model=64, hidden_size=32)
    assert values["attn_config"] == {"clip_qkv": 6, "alibi_bias_max": 16}


def test_foundry_section_takes_foundry_defaults() -> None:
    section = SMALL | {"name": "mpt_causal_lm", "attn_config": {"attn_impl": "triton"}, "loss_fn": "fused_crossentropy"}
    config = MptConfig.from_dict(section)
    assert not config.attn_config.alibi and not config.no_bias
    assert config.init_config is not None and config.init_config.name == "kaiming_normal_"
    given = MptConfig.from_dict(section | {"no_bias": True, "attn_config": {"alibi": True}})
    assert given.attn_config.alibi and given.no_bias
    assert MptConfig(**SMALL).attn_config.alibi and MptConfig(**SMALL).no_bias  # Hugging Face's
    with pytest.raises(ValueError, match="name is 'mosaic_gpt'"):
        MptConfig(name="mosaic_gpt")


@pytest.mark.parametrize(
    "extra",
    [
        {"clip_qkv": 6},
        {"clip_qkv": 0},
        {"attn_pdrop": 0.0},
        {"attn_pdrop": 0},
        {"softmax_scale": 1},
        {"alibi_bias_max": 16.0},
        {"attn_impl": "flash"},
        {"kv_n_heads": 4},
        {"rope": False, "rope_theta": 10000, "sliding_window_size": -1, "fused_qkv": True, "kv_dim": None},
        {"id2label": {"0": "LABEL_0"}, "return_dict": True, "dtype": None, "_name_or_path": ""},
    ],
)
def test_attn_config_accepts(extra: dict) -> None:
    config = MptConfig(**SMALL, attn_config=extra)
    assert MptConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "extra",
    [
        {"expansion_ratio": 2.5},
        {"expansion_ratio": 4.0},
        {"logit_scale": 2},
        {"logit_scale": "inv_sqrt_d_model"},
        {"embedding_fraction": 1},
        {"layer_norm_epsilon": 1},
        {"norm_eps": 1e-6},
        {"norm_type": "Low_Precision_RMSNorm"},
        {"fc_type": {"name": "torch"}, "ffn_config": {"ffn_type": "mptmlp", "fc_type": "torch"}},
        {"head_dim": None, "block_overrides": None, "final_logit_softcapping": None, "attention_bias": False},
        {"init_config": {"name": "xavier_normal_", "init_gain": 1, "init_div_is_residual": "2.5"}},
        {"init_config": {"emb_init_uniform_lim": [-1, 2]}},
        {"eos_token_id": [1, 2], "pad_token_id": 0},
        {"eos_token_id": [1.0, 2], "pad_token_id": 3.0},
    ],
)
def test_config_accepts(extra: dict) -> None:
    config = MptConfig(**SMALL, **extra)
    assert MptConfig.from_dict(config.to_dict()) == config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


REFUSED = [
    ({"d_model": 30}, "d_model 30 is not divisible by n_heads 4"),
    ({"d_model": 0}, "d_model is 0"),
    ({"d_model": 32.5}, "d_model is 32.5"),
    ({"d_model": "32"}, "d_model is '32'"),
    ({"n_layers": True}, "n_layers is True"),
    ({"no_bias": 1}, "no_bias is 1"),
    ({"expansion_ratio": 1.7}, "expansion_ratio 1.7 times d_model 32"),
    ({"expansion_ratio": 2**26}, r"expansion_ratio 67108864.0 times d_model 32 is too wide; it must be below 2\*\*31"),
    ({"expansion_ratio": 1e308}, r"expansion_ratio is 1e\+308; it must be below 2\*\*31"),
    ({"d_model": 2**31}, r"d_model is 2147483648; it must be below 2\*\*31"),
    ({"vocab_size": 10**400}, "vocab_size is 1000.*; it must be finite"),
    ({"resid_pdrop": 1.0}, "resid_pdrop is 1"),
    ({"emb_pdrop": -0.1}, "emb_pdrop is -0.1"),
    ({"embedding_fraction": 0}, "embedding_fraction is 0"),
    ({"logit_scale": "sqrt"}, "logit_scale is 'sqrt'"),
    ({"logit_scale": float("nan")}, "logit_scale is nan"),
    ({"norm_type": "batchnorm"}, "norm_type is 'batchnorm'"),
    ({"init_device": "tpu"}, "init_device is 'tpu'"),
    ({"pad_token_id": 50}, "pad_token_id is 50"),
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"hidden_size": 64}, "hidden_size is 64 and d_model is 32"),
    ({"n_head": 4}, "unknown key n_head .*did you mean 'n_heads'"),
    ({"fc_type": "te"}, "fc_type is 'te'"),
    ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_config.ffn_type is 'mptglu'"),
    ({"ffn_config": {"moe_num_experts": 8}}, "unknown key ffn_config.moe_num_experts"),
    ({"attention_bias": True}, "attention_bias is True and no_bias is True"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"quantization_config": {}}, "unknown key quantization_config"),
    ({"attn_config": {"clip_qvk": 6}}, "attn_config.clip_qvk .*did you mean 'clip_qkv'"),
    ({"attn_config": {"clip_qkv": -1}}, "attn_config.clip_qkv is -1"),
    ({"attn_config": {"softmax_scale": 0}}, "attn_config.softmax_scale is 0"),
    ({"attn_config": {"attn_pdrop": 1}}, "attn_config.attn_pdrop is 1"),
    ({"attn_config": {"attn_type": "mla"}}, "attn_config.attn_type is 'mla'"),
    ({"attn_config": {"attn_impl": "xformers"}}, "attn_config.attn_impl is 'xformers'"),
    ({"attn_config": {"attn_type": "grouped_query_attention"}}, "kv_n_heads is None"),
    ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 3}}, "kv_n_heads is 3; n_heads 4"),
    ({"attn_config": {"attn_type": "multiquery_attention", "kv_n_heads": 2}}, "kv_n_heads is 2"),
    ({"attn_config": {"rope": True}}, "attn_config.rope is True"),
    ({"attn_config": {"sliding_window_size": 256}}, "attn_config.sliding_window_size is 256"),
    ({"attn_config": "alibi"}, "attn_config is 'alibi'"),
    ({"num_label": 3}, "unknown key num_label .*did you mean 'num_labels'"),
    ({"num_labels": 0}, "num_labels is 0; it must be a whole number, positive"),
    ({"num_labels": 2**31 - 1}, r"num_labels is 2147483647; .* below 2\*\*20"),
    ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels is 3 and id2label names 1 labels"),
    ({"id2label": {0: "a", 1: "b"}, "label2id": {"b": 0}}, "label2id says 'b' is 0 and id2label says 0 is 'a'"),
    ({"id2label": {1: "a", 2: "b"}}, r"id2label names the labels \[1, 2\]; they must be 0, 1, ... without gaps"),
    ({"id2label": {0: 5}}, "id2label.0. is 5"),
    ({"id2label": {"first": "a"}}, "a key of id2label is 'first'"),
    ({"id2label": ["a", "b"]}, "id2label is .*; it must be a mapping"),
    ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
    ({"problem_type": "single_label_classification", "num_labels": 1}, "num_labels is 1, which leaves nothing"),
    ({"classifier_dropout": 1}, "classifier_dropout is 1"),
    ({"hidden_dropout": "0.1"}, "hidden_dropout is '0.1'"),
    ({"init_device": "cuda:x"}, "init_device is 'cuda:x'"),
    ({"init_config": {"name": "orthogonal_"}}, "init_config.name is 'orthogonal_'"),
    ({"init_config": {"name": "baseline_"}}, "init_config.init_std is None"),
    ({"init_config": {"name": "xavier_uniform_"}}, "init_config.init_gain is 0"),
    ({"init_config": {"init_div_is_residual": "two"}}, "init_config.init_div_is_residual is 'two'"),
    ({"init_config": {"init_div_is_residual": 0}}, "init_config.init_div_is_residual is 0"),
    ({"init_config": {"emb_init_uniform_lim": [1, 2, 3]}}, "emb_init_uniform_lim is"),
]


@pytest.mark.parametrize(("extra", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_config_refuses(extra: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MptConfig(**(SMALL | extra))


def test_aliases_read_set_and_do_not_serialise() -> None:
    config = MptConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=3, d_model=64)
    assert (config.d_model, config.n_heads, config.n_layers) == (64, 4, 3)
    config.hidden_size = 128
    assert config.d_model == config.hidden_size == 128
    assert "hidden_size" not in config.to_dict()
    with pytest.raises(AttributeError, match="did you mean 'n_heads'"):
        config.n_head = 8
    with pytest.raises(AttributeError, match="no field 'depth'"):
        _ = config.depth


def test_a_changed_config_is_checked_again() -> None:
    config = MptConfig(**SMALL)
    config.attn_config.clip_qkv = 6
    config.n_heads = 5
    with pytest.raises(ValueError, match="d_model 32 is not divisible by n_heads 5"):
        MptForCausalLM(config)


def test_transformers_parses_what_we_write(tmp_path) -> None:
    from transformers import MptConfig as Theirs

    attn = {"clip_qkv": 6, "attn_pdrop": 0.0, "softmax_scale": 1, "alibi_bias_max": 16}
    config = MptConfig(
        **SMALL, attn_config=attn, expansion_ratio=4.0, logit_scale=1, embedding_fraction=1, eos_token_id=3
    )
    config.save_pretrained(tmp_path)
    theirs = Theirs.from_pretrained(tmp_path)
    assert theirs.d_model == 32 and theirs.attn_config.clip_qkv == 6.0 and theirs.eos_token_id == 3
    assert MptConfig.from_pretrained(tmp_path) == config
    theirs.save_pretrained(tmp_path / "again")
    assert MptConfig.from_pretrained(tmp_path / "again") == config


def test_from_pretrained_errors(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        MptConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="its JSON does not parse"):
        MptConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'gpt2'"):
        MptConfig.from_pretrained(tmp_path)


def test_released_models_count() -> None:
    qk_ln = {"qk_ln": True}
    assert count_parameters(MptConfig(d_model=4096, n_heads=32, n_layers=32, vocab_size=50432)) == 6_649_286_656
    assert count_parameters(MptConfig(d_model=7168, n_heads=64, n_layers=48, vocab_size=50432)) == 29_957_200_896
    assert count_parameters(MptConfig(d_model=2048, n_heads=16, n_layers=24, attn_config=qk_ln)) == 1_311_311_872


@pytest.mark.parametrize("no_bias", [True, False])
@pytest.mark.parametrize("norm_type", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize(
    ("attn", "extra"),
    [
        ({}, {}),
        ({"alibi": False, "qk_ln": True}, {"tie_word_embeddings": False}),
        ({"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True}, {"expansion_ratio": 2.5}),
        ({"attn_type": "multiquery_attention", "alibi": False}, {}),
    ],
)
def test_shapes_are_the_models(attn: dict, extra: dict, norm_type: str, no_bias: bool) -> None:
    config = MptConfig(**SMALL, attn_config=attn, norm_type=norm_type, no_bias=no_bias, init_device="meta", **extra)
    model = MptForCausalLM(config)
    assert all(p.is_meta for p in model.parameters())
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(config)
    assert list(model.state_dict()) == list(parameter_shapes(config))
    assert model.num_parameters() == count_parameters(config) == formula(config)


def test_attention_config_stands_alone() -> None:
    attn = MptAttentionConfig(clip_qkv=6)
    assert MptConfig(**SMALL, attn_config=attn).attn_config.clip_qkv == 6.0


def test_importing_mpt_queries_no_device_and_no_transformers() -> None:
    code = "import sys, torch, mpt; assert 'transformers' not in sys.modules; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, env=None)
    assert torch.get_default_device().type == "cpu"


def test_the_model_type() -> None:
    config = MptConfig(model_type="mpt")
    assert config.model_type == MptConfig.model_type == config.to_dict()["model_type"] == "mpt"
    with pytest.raises(AttributeError, match="no field 'model_type'"):
        config.model_type = "llama"

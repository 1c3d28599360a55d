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
    with pytest.raises(ValueError, match="is not JSON"):
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

"""mosaic_gpt's names and configuration, field by field; whole files are loaded in test_mpt_checkpoint.py."""

import pytest
from checkpoint_files import MOSAIC_GPT_CONFIG

from mpt import MptConfig
from mpt.mosaic_gpt import present_name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("transformer.wte.weight", "transformer.wte.weight"),
        ("transformer.blocks.3.ln_1.weight", "transformer.blocks.3.norm_1.weight"),
        ("transformer.blocks.3.ln_2.bias", "transformer.blocks.3.norm_2.bias"),
        ("transformer.ln_f.weight", "transformer.norm_f.weight"),
        ("transformer.blocks.3.attn.q_ln.weight", "transformer.blocks.3.attn.q_ln.weight"),
        ("transformer.blocks.3.mlp.mlp_up.weight", "transformer.blocks.3.ffn.up_proj.weight"),
        ("transformer.blocks.3.mlp.mlp_down.weight", "transformer.blocks.3.ffn.down_proj.weight"),
    ],
)
def test_names(old: str, new: str) -> None:
    assert present_name(old) == new


def test_the_published_configuration() -> None:
    config = MptConfig.from_dict(MOSAIC_GPT_CONFIG)
    assert config.attn_config.qk_ln and config.attn_config.alibi and config.no_bias
    assert config.expansion_ratio == 4.0 and config.norm_type == "low_precision_layernorm"
    assert config.init_config is not None and config.init_config.name == "kaiming_normal_"
    assert config.to_dict()["model_type"] == "mpt"


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("mlp_ratio", 2, "expansion_ratio"),
        ("attn_qk_ln", False, "attn_config.qk_ln"),
        ("attn_clip_qkv", 6, "attn_config.clip_qkv"),
        ("attn_pdrop", 0.1, "attn_config.attn_pdrop"),
        ("attn_impl", "triton", "attn_config.attn_impl"),
        ("softmax_scale", 0.5, "attn_config.softmax_scale"),
        ("prefix_lm", True, "attn_config.prefix_lm"),
        ("attn_uses_sequence_id", True, "attn_config.attn_uses_sequence_id"),
        ("alibi", False, "attn_config.alibi"),
        ("alibi_bias_max", 16, "attn_config.alibi_bias_max"),
        ("param_init_fn", "neox_init_", "init_config.name"),
        ("fan_mode", "fan_out", "init_config.fan_mode"),
        ("init_nonlinearity", "linear", "init_config.init_nonlinearity"),
        ("init_gain", 1, "init_config.init_gain"),
        ("init_std", 0.1, "init_config.init_std"),
        ("init_div_is_residual", False, "init_config.init_div_is_residual"),
        ("emb_init_std", 0.1, "init_config.emb_init_std"),
        ("emb_init_uniform_lim", [-1, 1], "init_config.emb_init_uniform_lim"),
        ("logit_scale", 2, "logit_scale"),
    ],
)
def test_every_field(key: str, value: object, field: str) -> None:
    config: object = MptConfig.from_dict(MOSAIC_GPT_CONFIG | {key: value})
    for part in field.split("."):
        config = getattr(config, part)
    assert config == value


def test_plain_layer_norm_and_llm_foundrys_defaults() -> None:
    assert MptConfig.from_dict(MOSAIC_GPT_CONFIG | {"low_precision_layernorm": False}).norm_type == "layernorm"
    bare = MptConfig(model_type="mosaic_gpt")
    assert not bare.attn_config.alibi and not bare.no_bias
    with pytest.raises(ValueError, match="unknown key mlp_ration"):
        MptConfig.from_dict(MOSAIC_GPT_CONFIG | {"mlp_ration": 4})

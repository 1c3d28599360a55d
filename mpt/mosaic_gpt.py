"""mosaic_gpt, what MPT was called before its release (mpt-1b-redpajama): the same model under other names."""

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "mosaic_gpt"
# In this order: .mlp. would match a part of the names that come before it.
RENAMED = ((".ln_", ".norm_"), (".mlp_up.", ".up_proj."), (".mlp_down.", ".down_proj."), (".mlp.", ".ffn."))

FIELDS = {"mlp_ratio": "expansion_ratio"}
ATTN_FIELDS = {"attn_qk_ln": "qk_ln", "attn_clip_qkv": "clip_qkv"} | {
    name: name
    for name in (
        "attn_pdrop",
        "attn_impl",
        "softmax_scale",
        "prefix_lm",
        "attn_uses_sequence_id",
        "alibi",
        "alibi_bias_max",
    )
}
INIT_FIELDS = {"param_init_fn": "name"} | {
    name: name
    for name in (
        "fan_mode",
        "init_nonlinearity",
        "init_gain",
        "init_std",
        "init_div_is_residual",
        "emb_init_std",
        "emb_init_uniform_lim",
    )
}


def is_mosaic_gpt(names: Mapping[str, Any]) -> bool:
    """Whether parameters have mosaic_gpt's names."""
    return any(".mlp_up." in name or ".mlp_down." in name for name in names)


def present_name(name: str) -> str:
    """MPT's name of a parameter of mosaic_gpt."""
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


def config(values: Mapping[str, Any]) -> dict[str, Any]:
    """An MPT's configuration, as MptConfig takes it, from a mosaic_gpt config.json."""
    out = {"name": "mpt_causal_lm"}  # what is left out has llm-foundry's defaults, not Hugging Face's
    attn: dict[str, Any] = {}
    init: dict[str, Any] = {}
    for key, value in values.items():
        if key == "low_precision_layernorm":
            out["norm_type"] = "low_precision_layernorm" if value else "layernorm"
        elif key in ATTN_FIELDS:
            attn[ATTN_FIELDS[key]] = value
        elif key in INIT_FIELDS:
            init[INIT_FIELDS[key]] = value
        elif key != "model_type":
            out[FIELDS.get(key, key)] = value
    return out | {"attn_config": attn, "init_config": init}

"""MptConfig: the shape and behaviour of an MPT, from Hugging Face or llm-foundry keys, every field checked."""

import copy
import difflib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

from mpt import hub, mosaic_gpt
from mpt.tensor_files import read_json

LIMIT = 2**31  # of every size: beyond it kernels could not count in 32 bits
ATTN_TYPES = ("multihead_attention", "multiquery_attention", "grouped_query_attention")
NORM_TYPES = ("low_precision_layernorm", "layernorm", "low_precision_rmsnorm", "rmsnorm")
INIT_NAMES = (
    "default_",
    "baseline_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "neox_init_",
    "small_init_",
    "xavier_normal_",
    "xavier_uniform_",
)
NONLINEARITIES = ("relu", "leaky_relu", "tanh", "sigmoid", "linear", "selu")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "norm_eps": "layer_norm_epsilon",
}
MOST_LABELS = 2**20  # every one gets a name: a number from a foreign file must not fill the memory
LABEL_KEYS = frozenset({"num_labels", "id2label", "label2id"})  # three names of one thing

# Bookkeeping that transformers and llm-foundry write into any configuration: kept and written back; none of it changes
# what an MPT computes.
BOOKKEEPING = frozenset(
    """
    architectures auto_map chunk_size_feed_forward dtype finetuning_task is_decoder is_encoder_decoder _name_or_path
    name_or_path tokenizer_class tokenizer_name torch_dtype torchscript transformers_version use_bfloat16 verbose
    loss_fn _attn_implementation attn_implementation _attn_implementation_autoset _attn_implementation_internal
    sep_token_id decoder_start_token_id task_specific_params prefix tf_legacy_loss max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens use_pad_tok_in_ffn
    """.split()  # noqa: SIM905
)
# The same in attn_config, where transformers repeats its generic keys; the rope_ ones only say how rope would be done.
ATTN_BOOKKEEPING = BOOKKEEPING | frozenset(
    """
    model_type output_attentions output_hidden_states return_dict use_cache tie_word_embeddings bos_token_id
    eos_token_id pad_token_id pruned_heads add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    hidden_dropout classifier_dropout id2label label2id num_labels problem_type rope_theta rope_impl rope_dail_config
    rope_hf_config
    """.split()  # noqa: SIM905
)

# Keys of newer configurations, accepted at the values that mean "an MPT" and refused at any other.
INERT: dict[str, tuple[Any, ...]] = {
    "fc_type": ("torch", {"name": "torch"}),
    "head_dim": (None,),
    "block_overrides": (None,),
    "final_logit_softcapping": (None,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
}
ATTN_INERT: dict[str, tuple[Any, ...]] = {
    "rope": (False,),
    "nope": (False,),
    "qk_gn": (False,),
    "fused_qkv": (True,),
    "sliding_window_size": (-1,),
    "attn_logit_softcapping": (None,),
    "kv_dim": (None,),
}
FFN_INERT: dict[str, tuple[Any, ...]] = {
    "ffn_type": ("mptmlp",),
    "fc_type": INERT["fc_type"],
    "ffn_hidden_size": (None,),
    "ffn_act_fn": (None, {"name": "gelu"}, {"name": "gelu", "approximate": "none"}),
}


@dataclass(init=False)
class MptAttentionConfig:
    """The attention's part of an MptConfig; takes its fields as keywords. ValueError names the field and its value.

    Fields are also items, as in the published models' code: `config.attn_config["attn_impl"] = "flash"`.

    attn_type: multihead_attention, multiquery_attention, or grouped_query_attention with kv_n_heads key/value heads.
    attn_pdrop: dropout of the attention probabilities, 0 <= p < 1.
    attn_impl: torch, flash or triton, all giving the same numbers.
    clip_qkv: clamps the output of Wqkv to [-clip_qkv, clip_qkv]; None or 0 is off.
    softmax_scale: None means 1/sqrt(head dimension).
    prefix_lm: forward takes a prefix_mask, keys that every query sees.
    qk_ln: queries and keys pass a norm of norm_type before they are split into heads.
    attn_uses_sequence_id: forward takes a sequence_id; tokens see their own sequence only.
    alibi, alibi_bias_max: a bias per head instead of positional embeddings (Press et al. 2022).
    """

    attn_type: str = "multihead_attention"
    attn_pdrop: float = 0.0
    attn_impl: str = "torch"
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    prefix_lm: bool = False
    qk_ln: bool = False
    attn_uses_sequence_id: bool = False
    alibi: bool = True
    alibi_bias_max: float = 8.0
    kv_n_heads: int | None = None
    _extra: ClassVar[dict[str, Any]]  # an instance's, but no field: keys without effect, kept to be written back

    def __init__(self, **values: Any) -> None:
        _fill(self, values, ATTN_BOOKKEEPING, ATTN_INERT, "attn_config.")
        self.check()

    def check(self) -> None:
        """Every rule that needs no other part of the configuration. ValueError on the first broken one."""
        where = "attn_config."
        _check_types(self, where)
        _one_of(where + "attn_type", self.attn_type, ATTN_TYPES)
        _one_of(where + "attn_impl", self.attn_impl, ("torch", "flash", "triton"))
        _between(where + "attn_pdrop", self.attn_pdrop, 0, 1)
        if self.clip_qkv is not None and self.clip_qkv < 0:
            raise ValueError(f"{where}clip_qkv is {self.clip_qkv}; it must be positive (None or 0: no clipping)")
        if self.softmax_scale is not None and self.softmax_scale <= 0:
            raise ValueError(
                f"{where}softmax_scale is {self.softmax_scale}; it must be positive (None: 1/sqrt(head dim))"
            )
        if self.alibi_bias_max <= 0:
            raise ValueError(f"{where}alibi_bias_max is {self.alibi_bias_max}; it must be positive")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_extra" and name not in (names := [f.name for f in fields(self)]):
            raise AttributeError(f"MptAttentionConfig has no field {name!r}{_nearest(name, names)}")
        object.__setattr__(self, name, value)

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def to_dict(self, *, extra: bool = True) -> dict[str, Any]:
        """Plain values, in the types that transformers parses (a whole number as an int where it wants one)."""
        out = (self._extra if extra else {}) | {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("attn_pdrop", "alibi_bias_max"):
            out[name] = _whole(out[name])
        if self.kv_n_heads is None:
            del out["kv_n_heads"]
        return out


@dataclass(init=False)
class MptInitConfig:
    """llm-foundry's `init_config`: how weights start; see mpt/initialize.py for what each scheme draws. ValueError as
    above.
    """

    name: str = "kaiming_normal_"
    fan_mode: str = "fan_in"
    init_nonlinearity: str = "relu"
    init_gain: float = 0.0
    init_std: float | None = None
    init_div_is_residual: bool | float | str = True
    emb_init_std: float | None = None
    emb_init_uniform_lim: float | list[float] | None = None
    _extra: ClassVar[dict[str, Any]]

    def __init__(self, **values: Any) -> None:
        _fill(self, values, frozenset({"verbose"}), {}, "init_config.")
        self.check()

    def check(self) -> None:
        """ValueError on the first broken rule."""
        where = "init_config."
        if isinstance(self.emb_init_uniform_lim, tuple):
            self.emb_init_uniform_lim = list(self.emb_init_uniform_lim)
        _check_types(self, where)
        _one_of(where + "name", self.name, INIT_NAMES)
        _one_of(where + "fan_mode", self.fan_mode, ("fan_in", "fan_out"))
        _one_of(where + "init_nonlinearity", self.init_nonlinearity, NONLINEARITIES)
        if self.name.startswith("xavier") and self.init_gain == 0:
            raise ValueError(
                f"{where}init_gain is 0, which makes every {self.name} weight zero; give a gain, such as 1.0"
            )
        if self.name == "baseline_" and self.init_std is None:
            raise ValueError(
                f"{where}init_std is None; baseline_ draws from normal(0, init_std): give it, such as 0.02"
            )
        for key in ("init_std", "emb_init_std"):
            if (value := getattr(self, key)) is not None and value < 0:
                raise ValueError(f"{where}{key} is {value}; a standard deviation is not negative")
        limits = self.emb_init_uniform_lim
        if isinstance(limits, list) and (len(limits) != 2 or limits[0] > limits[1]):
            raise ValueError(f"{where}emb_init_uniform_lim is {limits}; give one limit or [low, high]")
        self.residual_divisor(n_layers=1)

    def residual_divisor(self, n_layers: int) -> float:
        """What out_proj's and down_proj's weights are divided by, in a model of n_layers blocks."""
        if self.name == "neox_init_":
            return n_layers / math.sqrt(10.0)
        value = self.init_div_is_residual
        if isinstance(value, bool):
            return math.sqrt(2.0 * n_layers) if value else 1.0
        try:
            divisor = float(value)
        except ValueError:
            divisor = math.nan
        if not (math.isfinite(divisor) and divisor > 0):
            raise ValueError(
                f"init_config.init_div_is_residual is {value!r}; it must be true, false or a positive number"
            )
        return divisor

    def to_dict(self, *, extra: bool = True) -> dict[str, Any]:
        """Plain values."""
        return (self._extra if extra else {}) | {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(init=False)
class MptConfig:
    """Everything that decides what an MPT computes; takes its fields as keywords, Hugging Face's names and defaults.

    Mutable; `check()` runs at construction and again when a model is built from it. ValueError names the field, its
    value and what it may be. `hidden_size`, `num_attention_heads`, `num_hidden_layers` and `norm_eps` are accepted,
    readable and settable aliases. Keys that libraries write into every configuration (`auto_map`, `verbose`, ...) are
    kept, readable as attributes, and written back; any other unknown key is an error. With llm-foundry's
    `name: mpt_causal_lm`, keys left out take llm-foundry's defaults: no ALiBi, biases, and `init_config`
    (kaiming_normal_). With `model_type: mosaic_gpt` the keys are those of MPT's predecessor.

    d_model: width of the embeddings and hidden states; n_heads must divide it.
    n_heads, n_layers: attention heads of a block, and blocks.
    expansion_ratio: width of the MLP over d_model.
    max_seq_len: where learned positions end; with ALiBi no limit.
    vocab_size: rows of the embeddings; token ids are below it.
    resid_pdrop, emb_pdrop: dropout of what attention and MLP add to the residual stream, and of the embeddings.
    layer_norm_epsilon: of every norm.
    learned_pos_emb: embeddings of positions up to max_seq_len; without ALiBi only, which has no such limit.
    attn_config: a mapping, or an MptAttentionConfig, which see.
    embedding_fraction: f in (0, 1] scales the gradient of the embeddings.
    logit_scale: None, a number, or 'inv_sqrt_d_model'.
    use_cache: in eval mode forward returns a cache of keys and values where its own use_cache is None.
    no_bias: no bias anywhere, norms included; lm_head and RMSNorm never have one.
    norm_type: layernorm, rmsnorm, or one of them after low_precision_, in any case.
    init_device: cpu, cuda (or cuda:0, ...), meta, or mixed (node-local rank 0 on cpu, the others meta).
    init_config: how weights start; without it normal(0, initializer_range).
    return_dict, output_hidden_states, output_attentions: what forward does unless its arguments say it.
    tie_word_embeddings: lm_head's weight is the embeddings'.
    pad_token_id, bos_token_id, eos_token_id: special tokens; None where there is none. There may be several eos.
    id2label: the names of a classifier's labels, {0: "LABEL_0", 1: "LABEL_1"} unless given. `num_labels` is their
        number and `label2id` the inverse; either may be given, and set, in place of id2label.
    problem_type: of a sequence classifier: regression, single_label_classification, multi_label_classification, or
        None, which is decided by num_labels and the labels' dtype.
    classifier_dropout: before a token classifier; None means hidden_dropout, and where that is None too, 0.1.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    expansion_ratio: float = 4
    max_seq_len: int = 2048
    vocab_size: int = 50368
    resid_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    emb_pdrop: float = 0.0
    learned_pos_emb: bool = True
    attn_config: MptAttentionConfig = None  # type: ignore[assignment]  # __init__ fills it
    init_device: str = "cpu"
    logit_scale: float | str | None = None
    no_bias: bool = True
    embedding_fraction: float = 1.0
    norm_type: str = "low_precision_layernorm"
    use_cache: bool = False
    initializer_range: float = 0.02
    init_config: MptInitConfig | None = None
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    return_dict: bool = True
    output_hidden_states: bool = False
    output_attentions: bool = False
    id2label: dict[int, str] = None  # type: ignore[assignment]  # __init__ fills it
    problem_type: str | None = None
    classifier_dropout: float | None = None
    hidden_dropout: float | None = None
    model_type = "mpt"  # of every MPT; no field
    _extra: ClassVar[dict[str, Any]]

    def __init__(self, **values: Any) -> None:
        if values.get("model_type") == mosaic_gpt.MODEL_TYPE:
            values = mosaic_gpt.config(values)
        values = _label_names(foundry_defaults(values))
        for alias, name in ALIASES.items():
            if alias in values:
                value = values.pop(alias)
                if name in values and values[name] != value:
                    raise ValueError(
                        f"{alias} is {value} and {name} is {values[name]}; they are one field: give one of them"
                    )
                values[name] = value
        model_type = values.pop("model_type", self.model_type)
        if model_type != self.model_type:
            raise ValueError(f"model_type is {model_type!r}; only those of 'mpt' and 'mosaic_gpt' can be read")
        attention_bias = values.pop("attention_bias", None)
        ffn = mapping("ffn_config", values.pop("ffn_config", None))
        _check_inert(ffn, FFN_INERT, "ffn_config.", partial=False)
        attn, init = values.pop("attn_config", None), values.pop("init_config", None)
        _fill(self, values, BOOKKEEPING, INERT, "")
        if ffn:
            self._extra["ffn_config"] = ffn
        self.attn_config = (
            attn if isinstance(attn, MptAttentionConfig) else MptAttentionConfig(**mapping("attn_config", attn))
        )
        self.init_config = (
            init if init is None or isinstance(init, MptInitConfig) else MptInitConfig(**mapping("init_config", init))
        )
        if attention_bias is not None and attention_bias == self.no_bias:
            raise ValueError(f"attention_bias is {attention_bias} and no_bias is {self.no_bias}; set no_bias only")
        self.check()

    def check(self) -> None:
        """Every rule, across fields too. ValueError on the first broken one."""
        _check_types(self, "")
        self.attn_config.check()
        if self.init_config is not None:
            self.init_config.check()
        for name in (
            "d_model",
            "n_heads",
            "n_layers",
            "max_seq_len",
            "vocab_size",
            "expansion_ratio",
            "layer_norm_epsilon",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
            if getattr(self, name) >= LIMIT:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be below 2**31")
        for name in ("resid_pdrop", "emb_pdrop", "classifier_dropout", "hidden_dropout"):
            if (p := getattr(self, name)) is not None:
                _between(name, p, 0, 1)
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}; change one of them")
        if self.d_model * self.expansion_ratio >= LIMIT:
            raise ValueError(
                f"expansion_ratio {self.expansion_ratio} times d_model {self.d_model} is too wide; "
                "it must be below 2**31"
            )
        if not float(self.d_model * self.expansion_ratio).is_integer():
            width = self.d_model * self.expansion_ratio
            raise ValueError(
                f"expansion_ratio {self.expansion_ratio} times d_model {self.d_model} is {width}; it must be whole"
            )
        if not 0 < self.embedding_fraction <= 1:
            raise ValueError(f"embedding_fraction is {self.embedding_fraction}; it must be in (0, 1]")
        if isinstance(self.logit_scale, str) and self.logit_scale != "inv_sqrt_d_model":
            raise ValueError(f"logit_scale is {self.logit_scale!r}; it must be None, a number or 'inv_sqrt_d_model'")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range is {self.initializer_range}; a standard deviation is not negative")
        self.norm_type = self.norm_type.lower()
        _one_of("norm_type", self.norm_type, NORM_TYPES)
        if not re.fullmatch(r"cuda:\d+", self.init_device):
            _one_of("init_device", self.init_device, ("cpu", "cuda", "meta", "mixed"))
        self._check_kv_heads()
        self._check_token_ids()
        self._check_labels()

    @property
    def learned_positions(self) -> bool:
        """Whether the model has embeddings of positions (wpe), which end at max_seq_len."""
        return self.learned_pos_emb and not self.attn_config.alibi

    def _check_kv_heads(self) -> None:
        kind, given = self.attn_config.attn_type, self.attn_config.kv_n_heads
        if kind == "grouped_query_attention":
            if given is None:
                raise ValueError("attn_config.kv_n_heads is None; grouped_query_attention needs it")
            if given <= 0 or self.n_heads % given:
                raise ValueError(f"attn_config.kv_n_heads is {given}; n_heads {self.n_heads} must be divisible by it")
        elif given not in (None, self.kv_heads):
            raise ValueError(
                f"attn_config.kv_n_heads is {given}, but {kind} has {self.kv_heads}; use grouped_query_attention"
            )

    def _check_token_ids(self) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not 0 <= one < self.vocab_size:
                    raise ValueError(
                        f"{name} is {value}; ids must be in 0..{self.vocab_size - 1} (vocab_size {self.vocab_size})"
                    )

    def _check_labels(self) -> None:
        if not self.id2label or sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"id2label names the labels {sorted(self.id2label)}; they must be 0, 1, ... without gaps")
        if self.problem_type is not None:
            _one_of("problem_type", self.problem_type, PROBLEM_TYPES)
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type is 'single_label_classification' and num_labels is 1, which leaves nothing to decide; "
                "two classes are num_labels 2, one number is problem_type 'regression'"
            )

    @property
    def num_labels(self) -> int:
        """How many labels a classifier has. Setting another number renames them LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        if number != len(self.id2label):
            self.id2label = _label_names({"num_labels": number})["id2label"]

    @property
    def label2id(self) -> dict[str, int]:
        """The inverse of id2label. Setting it sets id2label."""
        return {name: i for i, name in self.id2label.items()}

    @label2id.setter
    def label2id(self, ids: dict[str, int]) -> None:
        self.id2label = _label_names({"label2id": ids})["id2label"]

    @property
    def kv_heads(self) -> int:
        """G, the number of key/value heads."""
        kind = self.attn_config.attn_type
        if kind == "grouped_query_attention":
            assert self.attn_config.kv_n_heads is not None
            return self.attn_config.kv_n_heads
        return 1 if kind == "multiquery_attention" else self.n_heads

    @property
    def d_head(self) -> int:
        """D, the width of a head."""
        return self.d_model // self.n_heads

    @property
    def d_ffn(self) -> int:
        """The hidden width of the MLP."""
        return int(self.d_model * self.expansion_ratio)

    @property
    def norm_bias(self) -> bool:
        """Whether norms have biases: a LayerNorm with no_bias False; an RMSNorm never."""
        return not self.no_bias and "rms" not in self.norm_type

    @property
    def logit_factor(self) -> float:
        """What the logits are multiplied by."""
        if self.logit_scale is None:
            return 1.0
        return self.d_model**-0.5 if isinstance(self.logit_scale, str) else float(self.logit_scale)

    def __getattr__(self, name: str) -> Any:  # called only where normal lookup finds nothing
        if name in ALIASES:
            return getattr(self, ALIASES[name])
        kept = {"verbose": 0} | self.__dict__.get("_extra", {})
        if name in kept:
            return kept[name]
        raise AttributeError(f"MptConfig has no field {name!r}{_nearest(name, [f.name for f in fields(MptConfig)])}")

    def __setattr__(self, name: str, value: Any) -> None:
        name = ALIASES.get(name, name)
        if name in BOOKKEEPING:
            self._extra[name] = value
        elif name in MptConfig.__dataclass_fields__ or name in ("num_labels", "label2id"):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(
                f"MptConfig has no field {name!r}{_nearest(name, [f.name for f in fields(MptConfig)])}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> "MptConfig":
        """From a Hugging Face config.json or an llm-foundry model section; `values` is left as it is.

        overrides: fields to take instead of what `values` has, under any of their names; of attn_config and
            init_config, those that are given.
        """
        values = mapping("the configuration", values)
        if values.get("model_type") == mosaic_gpt.MODEL_TYPE:
            values = mosaic_gpt.config(values)
        for part in ("attn_config", "init_config"):
            if isinstance(old := values.get(part), Mapping) and isinstance(new := overrides.get(part), Mapping):
                overrides[part] = {**old, **new}
        replaced = {ALIASES.get(key, key) for key in overrides}
        if LABEL_KEYS & replaced:
            replaced |= LABEL_KEYS
        return cls(
            **{key: value for key, value in values.items() if ALIASES.get(key, key) not in replaced}, **overrides
        )

    def to_dict(self, *, extra: bool = True) -> dict[str, Any]:
        """Plain values under their own names, as transformers parses them; `from_dict` gives an equal configuration.

        What only classifiers need is left out where it is the default; without `extra`, so are the keys that are kept
        but have no effect.
        """
        out: dict[str, Any] = (copy.deepcopy(self._extra) if extra else {}) | {"model_type": self.model_type}
        out |= {f.name: getattr(self, f.name) for f in fields(self)}
        out["expansion_ratio"] = _whole(self.expansion_ratio)
        out["attn_config"] = self.attn_config.to_dict(extra=extra)
        if self.init_config is None:
            del out["init_config"]
        else:
            out["init_config"] = self.init_config.to_dict(extra=extra)
        out |= {"id2label": {str(i): name for i, name in self.id2label.items()}, "label2id": self.label2id}
        if self.id2label == _label_names({})["id2label"]:
            del out["id2label"], out["label2id"]
        for name in ("problem_type", "classifier_dropout", "hidden_dropout"):
            if out[name] is None:
                del out[name]
        return out

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, *, revision: str | None = None, **overrides: Any) -> "MptConfig":
        """From the config.json in a folder, or of a model on the hub (revision: a branch, tag or commit of it).

        overrides: as in from_dict. ValueError where there is none or it is no JSON object.
        """
        path = hub.local_path(path_or_name, revision=revision, weights=False) / hub.CONFIG
        try:
            values = read_json(path)
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; give a folder that holds a model's config.json") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); copy it again") from None
        try:
            return cls.from_dict(values, **overrides)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save_pretrained(self, folder: str | Path, *, architecture: str | None = None) -> None:
        """Write config.json into `folder`, which is made where it does not exist.

        architecture: the class that the configuration is of; None keeps what it says, else MptForCausalLM.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        values = {"architectures": ["MptForCausalLM"]} | self.to_dict()
        if architecture is not None:
            values["architectures"] = [architecture]
        text = json.dumps(values, indent=2, sort_keys=True, default=_dtype_name)
        (Path(folder) / "config.json").write_text(text + "\n", encoding="utf-8")


def head_shapes(config: MptConfig, architecture: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a class has on top of MptModel's parameters; tied logits have no lm_head of their own."""
    d = config.d_model
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "MptModel": {},
        "MptForCausalLM": {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, d)},
        "MptForSequenceClassification": {"score.weight": (config.num_labels, d)},
        "MptForTokenClassification": {
            "classifier.weight": (config.num_labels, d),
            "classifier.bias": (config.num_labels,),
        },
        "MptForQuestionAnswering": {"qa_outputs.weight": (2, d), "qa_outputs.bias": (2,)},
    }
    return shapes[architecture]


def parameter_shapes(config: MptConfig, architecture: str = "MptForCausalLM") -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a class, in the model's order."""
    d, q, kv, f = config.d_model, config.n_heads * config.d_head, config.kv_heads * config.d_head, config.d_ffn
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, shape: tuple[int, ...], bias: bool) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    linear_bias = not config.no_bias
    add("transformer.wte", (config.vocab_size, d), False)
    if config.learned_positions:
        add("transformer.wpe", (config.max_seq_len, d), False)
    for i in range(config.n_layers):
        block = f"transformer.blocks.{i}."
        add(block + "norm_1", (d,), config.norm_bias)
        add(block + "attn.Wqkv", (q + 2 * kv, d), linear_bias)
        if config.attn_config.qk_ln:
            add(block + "attn.q_ln", (q,), config.norm_bias)
            add(block + "attn.k_ln", (kv,), config.norm_bias)
        add(block + "attn.out_proj", (d, q), linear_bias)
        add(block + "norm_2", (d,), config.norm_bias)
        add(block + "ffn.up_proj", (f, d), linear_bias)
        add(block + "ffn.down_proj", (d, f), linear_bias)
    add("transformer.norm_f", (d,), config.norm_bias)
    if architecture == "MptModel":
        return {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    return shapes | head_shapes(config, architecture)


def count_parameters(config: MptConfig) -> int:
    """The number of parameters of an MptForCausalLM, exactly, without building it."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def _fill(
    config: Any, values: Mapping[str, Any], bookkeeping: frozenset[str], inert: dict[str, tuple[Any, ...]], where: str
) -> None:
    """Set every field from `values` or its default; keep bookkeeping and inert keys, the latter checked, in `_extra`;
    refuse the rest by name.
    """
    names = [f.name for f in fields(config)]
    for key in values:
        if key not in names and key not in inert and key not in bookkeeping:
            near = _nearest(key, names if where else [*names, *LABEL_KEYS, *ALIASES])
            raise ValueError(f"unknown key {where}{key} (= {values[key]!r}){near}")
    _check_inert(values, inert, where, partial=True)
    object.__setattr__(config, "_extra", {key: value for key, value in values.items() if key not in names})
    for f in fields(config):
        setattr(config, f.name, values.get(f.name, f.default))


def _check_inert(values: Any, inert: dict[str, tuple[Any, ...]], where: str, *, partial: bool) -> None:
    """ValueError where a key of `inert` has a value this model cannot honour, or (not partial) another key is there."""
    for key, value in mapping(where.rstrip("."), values).items():
        if key in inert and value not in inert[key]:
            allowed = " or ".join(repr(v) for v in inert[key])
            raise ValueError(f"{where}{key} is {value!r}; this model supports only {allowed}")
        if key not in inert and not partial:
            raise ValueError(f"unknown key {where}{key} (= {value!r}){_nearest(key, list(inert))}")


def foundry_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values`; where it is an llm-foundry model section (it has `name`), with llm-foundry's defaults for
    what it lacks.
    """
    values = dict(values)
    if "name" not in values:
        return values
    if (name := values.pop("name")) != "mpt_causal_lm":
        raise ValueError(f"name is {name!r}; the one model there is is 'mpt_causal_lm'")
    attn = values.get("attn_config")
    if not isinstance(attn, MptAttentionConfig):
        values["attn_config"] = {"alibi": False} | mapping("attn_config", attn)
    if values.get("init_config") is None:
        values["init_config"] = {}
    return {"no_bias": False} | values


def _label_names(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with id2label filled in, from whichever of num_labels, label2id and itself are there."""
    values = dict(values)
    number, ids, names = (values.pop(key, None) for key in ("num_labels", "label2id", "id2label"))
    if number is not None and not (type(number) is int and 0 < number < MOST_LABELS):
        raise ValueError(f"num_labels is {number!r}; it must be a whole number, positive and below 2**20")
    names = {int(i) if str(i).isdigit() else i: name for i, name in mapping("id2label", names).items()}
    ids = mapping("label2id", ids)
    if ids == {f"LABEL_{i}": i for i in range(len(ids))} and names:
        ids = {}  # what transformers leaves there when id2label alone is set
    if not names:
        names = {i: name for name, i in ids.items()} or {i: f"LABEL_{i}" for i in range(number or 2)}
    for name, i in ids.items():
        if names.get(i) != name:
            raise ValueError(
                f"label2id says {name!r} is {i!r} and id2label says {i!r} is {names.get(i)!r}; give one of them"
            )
    if number not in (None, len(names)):
        raise ValueError(f"num_labels is {number} and id2label names {len(names)} labels; give one of them")
    return values | {"id2label": names}


def mapping(name: str, values: Any) -> dict[str, Any]:
    """A copy of a part of a configuration that may be left out. ValueError where it is no mapping."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} is {values!r}; it must be a mapping")
    return dict(values)


def _check_types(config: Any, where: str) -> None:
    """Bring each field to one of its annotated types (an int to float where a float is meant), or refuse it by name."""
    for f in fields(config):
        value = getattr(config, f.name)
        kinds = (get_args(f.type) or (f.type,)) if get_origin(f.type) not in (list, dict) else (f.type,)
        setattr(config, f.name, _typed(where + f.name, value, kinds))


def _typed(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not abs(value) <= sys.float_info.max:  # also an integer that no float can hold
        raise ValueError(f"{name} is {value}; it must be finite")
    for kind in kinds:
        item = get_args(kind)
        if get_origin(kind) is list and isinstance(value, list):
            return [_typed(f"{name}[{i}]", one, item) for i, one in enumerate(value)]
        if get_origin(kind) is dict and isinstance(value, dict):
            return {
                _typed(f"a key of {name}", k, item[:1]): _typed(f"{name}[{k!r}]", v, item[1:]) for k, v in value.items()
            }
        if kind is float and number:
            return float(value)
        if kind is int and number and float(value).is_integer():
            return int(value)
        if not item and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    wanted = " or ".join("None" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ValueError(f"{name} is {value!r} ({type(value).__name__}); it must be {wanted}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"{name} is {value}; it must be at least {low} and less than {high}")


def _dtype_name(value: Any) -> str:
    """For JSON: "bfloat16" of a torch.dtype, which users put into `torch_dtype`."""
    if type(value).__name__ != "dtype":
        raise TypeError(f"{value!r} cannot be written into a config.json")
    return str(value).removeprefix("torch.")


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _nearest(key: str, names: list[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

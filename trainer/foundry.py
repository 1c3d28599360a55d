"""llm-foundry's YAMLs, of pretraining and finetuning, read as they are: their keys as ours, their defaults, and what is
ignored by name.
"""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mpt.config import ATTN_BOOKKEEPING, BOOKKEEPING
from trainer.errors import InputError
from trainer.yamlfile import Place, Source, dotted, nearest

# One of these at the top level makes a file llm-foundry's: ours has none of them.
MARKS = (
    "algorithms",
    "callbacks",
    "console_log_interval",
    "device_train_batch_size",
    "icl_tasks",
    "log_to_console",
    "progress_bar",
    "python_log_level",
    "save_overwrite",
    "variables",
)
# So does one of these inside a section.
SECTION_MARKS = (
    ("fsdp_config", "sharding_strategy"),
    ("fsdp_config", "mixed_precision"),
    ("model", "pretrained_model_name_or_path"),
    ("train_loader", "dataset", "max_seq_len"),
    ("train_loader", "dataset", "packing_ratio"),
    ("train_loader", "dataset", "remote"),
    ("train_loader", "dataset", "streams"),
)
# What these do is either always done here, of no effect, or not part of training (logging, storage).
IGNORED = (
    "accumulate_train_batch_on_tokens",
    "callbacks",
    "code_paths",
    "compile_config",
    "console_log_interval",
    "cuda_load_lazy",
    "eval_gauntlet",
    "eval_gauntlet_str",
    "expandable_segments",
    "flatten_metadata",
    "icl_seq_len",
    "icl_subset_num_batches",
    "icl_tasks",
    "icl_tasks_str",
    "load_ignore_keys",
    "load_strict_model_weights",
    "load_weights_only",
    "log_config",
    "log_to_console",
    "max_split_size_mb",
    "metadata",
    "only_composer_checkpoint",
    "only_hf_checkpoint",
    "profiler",
    "progress_bar",
    "python_log_level",
    "save_filename",
    "save_ignore_keys",
    "save_latest_filename",
    "save_overwrite",
    "save_weights_only",
    "spin_dataloaders",
)
# Of peft's LoraConfig: ours, and peft's default for an MPT.
_LORA = {
    "r": ("rank", 8),
    "lora_alpha": ("alpha", 8),
    "lora_dropout": ("dropout", 0.0),
    "target_modules": ("target_modules", ["Wqkv"]),
}
_FSDP_OURS = ("replicate", "reshard_after_forward", "reduce_dtype", "reduce_every_microbatch", "cpu_offload")
_DATASET_OURS = ("local", "split", "shuffle", "shuffle_seed", "mix")
_EXAMPLES_OURS = ("hf_name", "split", "shuffle", "shuffle_seed")


class _Translation:
    """The file being translated, and what was ignored in it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.ignored: list[str] = []

    def ignore(self, place: Place, keys: Iterable[str]) -> None:
        """Report keys of the section at `place`; callbacks and the like by the name of each entry."""
        for key in keys:
            value = self.at((*place, key))
            if isinstance(value, dict) and value and not place:
                self.ignored += [f"{key}.{name}" for name in value]
            else:
                self.ignored.append(dotted((*place, key)))

    def at(self, place: Place) -> Any:
        value: Any = self.source.values
        for part in place:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def section(self, place: Place) -> dict[str, Any]:
        """A copy of the mapping at `place`, empty where there is none."""
        value = self.at(place)
        if value is not None and not isinstance(value, dict):
            raise self.error(place, f"expected a section, found {value!r}")
        return dict(value or {})

    def error(self, place: Place, message: str) -> InputError:
        return self.source.error(place, f"{dotted(place)}: {message}")

    def moved(self, old: Place, new: Place) -> None:
        """Let errors about our key `new` name the line of their key `old`."""
        if old in self.source.lines:
            self.source.lines.setdefault(new, self.source.lines[old])

    def only(self, place: Place, values: dict[str, Any], key: str, allowed: Collection[Any]) -> None:
        """Take `key` out of `values`; an error unless it is absent or has a value that changes nothing here."""
        if key in values and (value := values.pop(key)) not in allowed:
            raise self.error((*place, key), f"{value!r} is not supported; expected {' or '.join(map(str, allowed))}")


def recognise(values: Mapping[str, Any]) -> str | None:
    """The first key that only llm-foundry's YAMLs have, dotted; None for a file in our own form."""
    for key in MARKS:
        if key in values:
            return key
    for place in SECTION_MARKS:
        section: Any = values
        for part in place:
            section = section.get(part, ...) if isinstance(section, Mapping) else ...
        if section is not ...:
            return dotted(place)
    return None


def notice(name: str, mark: str, ignored: list[str]) -> str:
    """What is printed about a translated file."""
    text = f"{name}: read as an llm-foundry YAML (it has the key {mark})"
    return f"{text}; ignored: {', '.join(ignored)}" if ignored else text


def translate(source: Source, fields: Collection[str]) -> list[str]:
    """Turn the resolved values of an llm-foundry training YAML into ours, in place; returns the keys it ignored.

    fields: TrainConfig's names; where a key of that name means the same it is taken as it is. Defaults of absent keys
    are llm-foundry's where they would change the result. Raises InputError for a value that changes the meaning and has
    no counterpart here, and for a key that looks misspelt.
    """
    t = _Translation(source)
    values = dict(source.values)
    values.pop("variables", None)
    for key in ("model", "train_loader", "optimizer", "scheduler"):
        if not values.get(key):
            raise t.error((key,), "is required in an llm-foundry YAML")
    for key, value in (("train_subset_num_batches", -1), ("tp_config", None), ("device_train_batch_size", None)):
        t.only((), values, key, [value])
    out = {key: values[key] for key in values if key in fields}
    out["run_name"] = _run_name(values)
    out["model"] = _model(t)
    if t.at(("model", "peft_config")):
        out["lora"] = _lora(t)
    out["tokenizer"] = _tokenizer(t)
    out["train_loader"] = _loader(t, "train_loader")
    if values.get("eval_loader") is not None:
        out["eval_loader"] = _loader(t, "eval_loader")
    out["optimizer"] = _optimizer(t)
    out["scheduler"] = _scheduler(t)
    out["fsdp_config"], out_activation = _fsdp(t)
    out.setdefault("activation_checkpointing", out_activation)
    out["loggers"] = _loggers(t, values)
    out.setdefault("gradient_clip_norm", _clipping(t))
    out["eval_interval"] = _interval(values.get("eval_interval", 1))
    for key in ("max_duration", "save_interval"):
        if key in out:
            out[key] = _interval(out[key])
    for key in ("save_folder", "load_path"):
        if out.get(key) is not None:
            out[key] = _path(t, key, str(out[key]), out["run_name"])
    _console(t, values, out)
    _rest(t, [key for key in values if key not in out and key != "algorithms"], fields)
    source.values = out
    return t.ignored


def _run_name(values: Mapping[str, Any]) -> str:
    return str(values.get("run_name") or os.environ.get("RUN_NAME") or "llm")


def _interval(value: Any) -> Any:
    """Composer counts a bare number in epochs."""
    return f"{value}ep" if isinstance(value, int) and not isinstance(value, bool) else value


def _model(t: _Translation) -> dict[str, Any]:
    """The model section less its inert keys; MptConfig gives one with a `name` llm-foundry's defaults."""
    model = {"name": "mpt_causal_lm"} | t.section(("model",))
    if "pretrained_model_name_or_path" in model:
        return _pretrained(t, model)
    attn = t.section(("model", "attn_config"))
    t.ignore(("model",), [key for key in model if key in BOOKKEEPING])
    t.ignore(("model", "attn_config"), [key for key in attn if key in ATTN_BOOKKEEPING])
    kept = {key: value for key, value in model.items() if key not in BOOKKEEPING}
    if attn:
        kept["attn_config"] = {key: value for key, value in attn.items() if key not in ATTN_BOOKKEEPING}
    return kept


def _pretrained(t: _Translation, model: dict[str, Any]) -> dict[str, Any]:
    """A section that names a model to start from, and what is to differ from its configuration."""
    place: Place = ("model",)
    t.only(place, model, "name", ["hf_causal_lm", "mpt_causal_lm"])
    t.only(place, model, "pretrained", [True])
    model.pop("peft_config", None)  # see _lora
    t.source.lines.pop((*place, "pretrained"), None)
    t.moved((*place, "pretrained_model_name_or_path"), (*place, "pretrained"))
    overrides = t.section((*place, "config_overrides"))
    attn = t.section((*place, "config_overrides", "attn_config"))
    known = ("pretrained_model_name_or_path", "config_overrides")
    t.ignore(place, [key for key in model if key not in known])
    overrides.pop("max_seq_len", None)  # the run's decides
    if attn:
        overrides["attn_config"] = {key: value for key, value in attn.items() if key not in ATTN_BOOKKEEPING}
    return {"pretrained": model["pretrained_model_name_or_path"], **overrides}


def _lora(t: _Translation) -> dict[str, Any]:
    place: Place = ("model", "peft_config")
    theirs = t.section(place)
    for key, value in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("bias", "none"), ("inference_mode", False)):
        t.only(place, theirs, key, [value])
    if unknown := [key for key in theirs if key not in _LORA]:
        raise t.error((*place, unknown[0]), f"is not supported; known are {', '.join(_LORA)}")
    for key, (ours, _) in _LORA.items():
        t.moved((*place, key), ("lora", ours))
    return {ours: theirs.get(key, default) for key, (ours, default) in _LORA.items()}


def _tokenizer(t: _Translation) -> dict[str, Any]:
    tokenizer = t.section(("tokenizer",))
    t.ignore(("tokenizer",), [key for key in tokenizer if key not in ("name", "kwargs")])
    t.ignore(("tokenizer", "kwargs"), t.section(("tokenizer", "kwargs")))
    return {"name": tokenizer.get("name")}


def _loader(t: _Translation, name: str) -> dict[str, Any]:
    place: Place = (name,)
    if isinstance(entries := t.at(place), list):
        if len(entries) != 1:
            raise t.error(place, f"{len(entries)} validation sets; only one is supported")
        t.source.values[name] = entries[0]
    loader = t.section(place)
    kind = loader.get("name", "text")
    if kind not in ("text", "finetuning"):
        raise t.error((name, "name"), f"{kind!r} is not supported; expected text or finetuning")
    t.ignore(place, [key for key in loader if key not in ("name", "dataset", "num_workers", "drop_last")])
    out: dict[str, Any] = {key: loader[key] for key in ("num_workers", "drop_last") if key in loader}

    place = (name, "dataset")
    dataset = t.section(place)
    length = t.at(("max_seq_len",))
    t.only(place, dataset, "max_seq_len", [length])
    t.only(place, dataset, "epoch_size", [None])
    _no_remote(t, place, dataset)
    if kind == "finetuning":
        return out | {"name": kind, "dataset": _examples(t, place, dataset)}
    # Streaming reads in order unless told to shuffle.
    kept = {"shuffle": False} | {key: dataset[key] for key in _DATASET_OURS if key in dataset}
    streams = dataset.pop("streams", None)
    if streams:
        kept["mix"] = _streams(t, (*place, "streams"), streams)
        kept.pop("local", None)
    t.ignore(place, [key for key in dataset if key not in (*_DATASET_OURS, "remote")])
    if len(kept.get("mix") or []) == 1 and streams:
        (only,) = kept.pop("mix")
        kept |= {key: only[key] for key in ("local", "split") if only[key] is not None}
    return out | {"dataset": kept}


def _examples(t: _Translation, place: Place, dataset: dict[str, Any]) -> dict[str, Any]:
    """The dataset of a finetuning loader. Theirs cuts what is too long, and packs without telling examples apart."""
    t.only(place, dataset, "decoder_only_format", [True])
    t.only(place, dataset, "preprocessing_fn", [None])
    t.only(place, dataset, "hf_kwargs", [None, {}])
    t.only(place, dataset, "target_prompts", ["none"])
    t.only(place, dataset, "target_responses", ["all"])
    t.only(place, dataset, "streams", [None])
    kept = {"shuffle": False, "too_long": "cut"} | {key: dataset[key] for key in _EXAMPLES_OURS if key in dataset}
    kept["packing"] = dataset.get("packing_ratio") not in (None, 1, 1.0)
    hf_name = kept.pop("hf_name", None)
    if hf_name is not None and not str(hf_name).startswith((".", "/")) and not os.path.exists(str(hf_name)):
        kept["hf_name"] = hf_name
    else:
        kept["local"] = hf_name or dataset.get("local")
        t.moved((*place, "hf_name"), (*place, "local"))
    t.ignore(place, [key for key in dataset if key not in (*_EXAMPLES_OURS, "local", "remote", "packing_ratio")])
    return kept


def _no_remote(t: _Translation, place: Place, dataset: Mapping[str, Any]) -> None:
    if dataset.get("remote"):
        raise t.error(
            (*place, "remote"),
            f"{dataset['remote']}: data is not fetched; copy it, prepare it with scripts/prepare_data.py, set "
            f"{dotted((*place, 'local'))} to that folder and {dotted((*place, 'remote'))} to null",
        )


def _streams(t: _Translation, place: Place, streams: Any) -> list[dict[str, Any]]:
    """Streams with proportions as our mix; what else decides how often a stream is read is refused."""
    if not isinstance(streams, dict | list):
        raise t.error(place, f"expected a mapping or list of streams, found {streams!r}")
    entries = list(streams.items()) if isinstance(streams, dict) else list(enumerate(streams))
    out = []
    for name, stream in entries:
        here: Place = (*place, name)
        if not isinstance(stream, dict | None):
            raise t.error(here, f"expected a section, found {stream!r}")
        stream = dict(stream or {})
        _no_remote(t, here, stream)
        for key in ("repeat", "choose"):
            t.only(here, stream, key, [None])
        if stream.get("proportion") is None and len(entries) > 1:
            raise t.error(here, "give every stream a proportion (its share of the sequences)")
        proportion = stream.get("proportion")
        number = isinstance(proportion, int | float) and not isinstance(proportion, bool)
        if proportion is not None and not (number and 0 < proportion < math.inf):
            raise t.error((*here, "proportion"), f"{proportion!r}: expected a number above 0")
        out.append(
            {
                "local": stream.get("local"),
                "split": stream.get("split"),
                "weight": 1.0 if proportion is None else proportion,
            }
        )
        known = ("local", "remote", "split", "proportion")
        t.ignore(here, [key for key in stream if key not in known])
    return out


def _optimizer(t: _Translation) -> dict[str, Any]:
    """llm-foundry's optimizers decay every parameter."""
    return {"decay_all": True} | t.section(("optimizer",))


def _scheduler(t: _Translation) -> dict[str, Any]:
    place: Place = ("scheduler",)
    scheduler = t.section(place)
    kind = scheduler.get("name")
    t.only(place, scheduler, "alpha_i", [1.0])
    t.only(place, scheduler, "alpha", [1.0])
    t.only(place, scheduler, "scale_warmup", [False])
    if kind == "inv_sqrt_with_warmup":
        # Theirs equals ours where its time scale is the warm-up and nothing follows the decay.
        t.only(place, scheduler, "t_scale", [scheduler.get("t_warmup")])
        t.only(place, scheduler, "t_cooldown", [0, "0ba", "0tok", "0ep"])
        scheduler.pop("alpha_f_cooldown", None)
        scheduler["alpha_f"] = scheduler.pop("alpha_f_decay", 0.0)
    elif kind in ("cosine_with_warmup", "linear_decay_with_warmup"):
        scheduler.setdefault("alpha_f", 0.0)
    for key in ("t_warmup", "t_max"):
        if key in scheduler:
            scheduler[key] = _share_of_run(t, (*place, key), scheduler[key])
    return scheduler


def _share_of_run(t: _Translation, place: Place, value: Any) -> Any:
    """Composer's "0.01dur", a share of max_duration, in that duration's own unit; other values as they are."""
    share = re.fullmatch(r"(\d*\.?\d+)dur", str(value))
    if share is None:
        return _interval(value)
    whole = re.fullmatch(r"(\d[\d_]*)(ba|tok|ep)", str(_interval(t.at(("max_duration",)))))
    if whole is None:
        raise t.error(place, f"{value} is a share of max_duration={t.at(('max_duration',))}; give it in ba, tok or ep")
    length = float(share[1]) * int(whole[1])
    return f"{length:g}ep" if whole[2] == "ep" else f"{round(length)}{whole[2]}"


def _fsdp(t: _Translation) -> tuple[dict[str, Any], str]:
    """Our fsdp_config, and the activation checkpointing that llm-foundry configures there."""
    place: Place = ("fsdp_config",)
    fsdp = t.section(place)
    out = {key: fsdp.pop(key) for key in _FSDP_OURS if key in fsdp}
    strategy = str(fsdp.pop("sharding_strategy", "FULL_SHARD")).upper()
    if strategy == "SHARD_GRAD_OP":
        out.setdefault("reshard_after_forward", False)
    elif strategy in ("NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2") and "replicate" not in out:
        raise t.error(
            (*place, "sharding_strategy"),
            f"{strategy} is set by the number of groups that each hold the whole model here: FULL_SHARD with "
            "fsdp_config.replicate=N",
        )
    elif strategy not in ("FULL_SHARD", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"):
        raise t.error((*place, "sharding_strategy"), f"{strategy} is unknown; use FULL_SHARD or SHARD_GRAD_OP")
    mixed = str(fsdp.pop("mixed_precision", "DEFAULT")).upper()
    if mixed not in ("PURE", "DEFAULT", "FULL"):
        raise t.error((*place, "mixed_precision"), f"{mixed} is not supported; expected PURE, DEFAULT or FULL")
    if mixed == "PURE" and t.at(("precision",)) != "fp32":
        out.setdefault("reduce_dtype", "bf16")
    out.setdefault("reduce_every_microbatch", True)  # as their trainer does: a large model's sums fit no other way
    recompute = fsdp.pop("activation_checkpointing", False)
    if not isinstance(recompute, bool):
        raise t.error((*place, "activation_checkpointing"), f"expected true or false, found {recompute!r}")
    t.ignore(place, fsdp)
    return out, "full" if recompute else "none"


def _clipping(t: _Translation) -> Any:
    place: Place = ("algorithms",)
    algorithms = t.section(place)
    clipping = t.section((*place, "gradient_clipping"))
    for key in algorithms:
        if key == "low_precision_layernorm":  # model.norm_type decides here
            t.ignore(place, [key])
        elif key != "gradient_clipping":
            raise t.error((*place, key), "is not supported; remove it (known: gradient_clipping)")
    if not clipping:
        return None
    place = (*place, "gradient_clipping")
    t.only(place, clipping, "clipping_type", ["norm"])
    t.moved((*place, "clipping_threshold"), ("gradient_clip_norm",))
    return clipping.get("clipping_threshold")


def _loggers(t: _Translation, values: Mapping[str, Any]) -> dict[str, Any]:
    loggers = t.section(("loggers",))
    out = {key: loggers.pop(key) for key in ("progress",) if key in loggers}
    if "progress_bar" in values:
        out.setdefault("progress", values["progress_bar"])
        t.moved(("progress_bar",), ("loggers", "progress"))
    if "wandb" in loggers:
        wandb = t.section(("loggers", "wandb"))
        known = ("project", "entity", "name", "group", "tags", "mode")
        t.ignore(("loggers", "wandb"), [key for key in wandb if key not in known])
        out["wandb"] = {key: wandb[key] for key in known if key in wandb}
    if "tensorboard" in loggers:
        t.ignore(("loggers", "tensorboard"), t.section(("loggers", "tensorboard")))
        out["tensorboard"] = {}
    t.ignore(("loggers",), [key for key in loggers if key not in ("wandb", "tensorboard")])
    return out


def _path(t: _Translation, key: str, path: str, run_name: str) -> str:
    """Composer's placeholders filled in. Its save_folder is the checkpoints' folder, ours the run's above that."""
    path = path.replace("{run_name}", run_name)
    if key == "load_path":
        path = path.replace("{rank}", "0")  # a monolithic checkpoint is rank 0's
        if path.endswith(".symlink"):
            raise t.error((key,), f"{path} is a text file that names a checkpoint in an object store; name a .pt file")
    if "{" in path:
        raise t.error((key,), f"{path}: only the placeholder {{run_name}} is supported")
    if key == "save_folder":
        path = path.rstrip("/").removesuffix("/checkpoints")
    return path


def _console(t: _Translation, values: Mapping[str, Any], out: dict[str, Any]) -> None:
    every = re.fullmatch(r"(\d+)ba", str(values.get("console_log_interval", "")))
    if every:
        out.setdefault("log_interval", int(every[1]))
    elif "console_log_interval" in values:
        t.ignore((), ["console_log_interval"])
    if values.get("compile_config") is not None:
        out.setdefault("compile", True)
        t.ignore(("compile_config",), t.section(("compile_config",)))


def _rest(t: _Translation, keys: list[str], fields: Collection[str]) -> None:
    """Report what is left at the top level; a key that is nearly one that counts is a mistake, not a variable."""
    for key in keys:
        if key in ("progress_bar", "console_log_interval", "compile_config"):
            continue
        close = nearest(key, [*fields, *IGNORED, "algorithms"], cutoff=0.85)
        if key not in IGNORED and close:
            raise t.error((key,), f"unknown key; did you mean {close}?")
        t.ignore((), [key])

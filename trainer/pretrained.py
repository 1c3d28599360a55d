"""The model that a fine-tune starts from: its configuration as a recipe's `model` section, and what differs from it."""

from pathlib import Path
from typing import Any

from mpt import MptConfig
from mpt.checkpoint import open_checkpoint
from mpt.hub import CONFIG, is_hub_name
from trainer.yamlfile import Source

# What a configuration says about how a model starts, or about other uses than training; nothing to report on.
UNREPORTED = ("init_config", "init_device", "initializer_range", "attn_config.attn_impl", "max_seq_len", "use_cache",
              "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip


def expand(source: Source) -> None:
    """Replace `model: {pretrained: NAME, ...}` by that model's own configuration under the section's other keys.

    In place; load_path becomes NAME where it is not set. Raises InputError, with the place, for a model that is not
    there or whose configuration cannot be read.
    """
    section = source.values.get("model")
    if not isinstance(section, dict) or "pretrained" not in section:
        return
    if section["pretrained"] is None:  # as `model.pretrained=null` unsets it
        del section["pretrained"]
        return
    own = dict(section)
    name = own.pop("pretrained")
    place = ("model", "pretrained")
    if not isinstance(name, str):
        raise source.error(place, f"model.pretrained={name!r}; expected the folder of a model, or a name on the hub")
    try:
        base = configuration(name).to_dict(extra=False)
    except (ValueError, TypeError, OSError) as e:
        raise source.error(place, f"model.pretrained={name}: {e}") from e
    del base["max_seq_len"]  # the run's decides
    own.pop("name", None)  # its defaults are for keys that are left out, and none is
    source.values["model"] = _merged(base, own)
    if source.values.get("load_path") is None:
        source.values["load_path"] = name


def configuration(name: str) -> MptConfig:
    """The configuration of a checkpoint in any form that load_path takes; of a hub model nothing else is downloaded.

    ValueError says what is not there or cannot be read.
    """
    if is_hub_name(name) or (Path(name) / CONFIG).is_file():
        return MptConfig.from_pretrained(name)
    return open_checkpoint(name).config()


def differences(load_path: str, config: MptConfig) -> list[str]:
    """`field: its value -> ours` for what a checkpoint says differently from `config`, as far as it matters."""
    source = open_checkpoint(load_path)
    if source.values is None:
        return []
    try:
        theirs = _flat(source.config().to_dict(extra=False))
    except (ValueError, TypeError) as e:  # the weights may fit all the same
        return [f"configuration cannot be compared: {e}"]
    ours = _flat(config.to_dict(extra=False))
    names = [name for name in ours if name not in UNREPORTED and not name.startswith("init_config.")]
    return [f"{n}: {theirs.get(n)} -> {ours[n]}" for n in names if theirs.get(n) != ours[n]]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return out


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}

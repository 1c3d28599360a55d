"""Composer's monolithic checkpoints, ep{E}-ba{N}-rank0.pt: a model's weights and configuration out of a training's
state, and such a file for llm-foundry to start from.
"""

import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mpt.config import MptConfig
from mpt.hub import COMPANIONS
from mpt.tensor_files import Stored, as_stored, load_archive

PREFIX = "model."  # Composer's HuggingFaceModel holds the model under this name


def read_composer(path: Path) -> tuple[dict[str, Stored], dict[str, Any] | None, dict[str, bytes]]:
    """(tensors by the model's own names, configuration as MptConfig takes it, tokenizer files: name -> contents).

    Optimizer state, metrics and the rest are left where they are. The configuration is None where the file has none.
    ValueError names what is refused.
    """
    whole = load_archive(path, training_state=True)
    weights = _at(whole, "state", "model")
    if not isinstance(weights, dict):
        raise ValueError(f"{path} is no Composer checkpoint: it holds no ['state']['model']")
    if weights and all(isinstance(name, str) and name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}  # of a run under DDP
    if not all(isinstance(name, str) and name.startswith(PREFIX) for name in weights):
        raise ValueError(f"{path}: the names in ['state']['model'] do not all begin with {PREFIX!r}; it is no MPT's")
    weights = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    integration = _at(whole, "state", "integrations", "huggingface")
    config = _at(integration, "model", "config", "content")
    try:
        if isinstance(config, dict):
            config = json.loads(json.dumps(config))
            # By what is not there a class means its own defaults: transformers' those of its MPT, others llm-foundry's.
            if not str(_at(integration, "model", "config", "class")).startswith("transformers."):
                config = {"name": "mpt_causal_lm"} | config
        companions = dict(_tokenizer_files(_at(integration, "tokenizer")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its configuration or tokenizer is no JSON ({error})") from None
    stored = as_stored(path, weights, "['state']['model']")
    return stored, config if isinstance(config, dict) else None, companions


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _tokenizer_files(tokenizer: Any) -> Iterator[tuple[str, bytes]]:
    for stem, entry in tokenizer.items() if isinstance(tokenizer, dict) else ():
        suffix, content = _at(entry, "file_extension"), _at(entry, "content")
        name = str(stem).removesuffix(str(suffix)) + str(suffix)  # Composer used to leave the suffix out
        if name not in COMPANIONS:
            continue
        if suffix == ".json" and isinstance(content, dict):
            yield name, json.dumps(content, ensure_ascii=False).encode()
        elif suffix == ".txt" and isinstance(content, list):
            yield name, "\n".join(map(str, content)).encode()
        elif suffix == ".jinja" and isinstance(content, str):
            yield name, content.encode()


def save_composer(
    named_tensors: Iterable[tuple[str, Callable[[], Tensor]]],
    forms: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    config: MptConfig,
    path: Path,
    *,
    companions: Mapping[str, bytes],
) -> None:
    """Write weights as a file that llm-foundry's `load_path` takes with `load_weights_only: true`.

    forms: shape and dtype of every tensor; room for all of them is laid out in the file first.
    named_tensors: each of them once, as (name, function that gives it); one at a time is in memory.

    companions: tokenizer files, name -> contents.

    The file is written beside `path`, with .tmp behind its name, and renamed at the end. ValueError where a file of one
    of these names exists, where a tensor is missing or has another shape.
    """
    temporary = path.with_name(path.name + ".tmp")
    for file in (path, temporary):
        if file.exists():
            raise ValueError(f"{file} exists; remove it, or give another place")
    try:
        with FakeTensorMode():
            weights = {PREFIX + name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in forms.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(_state(weights, config, companions), temporary)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            places = torch.load(temporary, mmap=True, weights_only=True)["state"]["model"]
        for name, read in named_tensors:
            tensor = read()
            place = places.pop(PREFIX + name, None)
            if place is None or place.shape != tensor.shape:
                raise ValueError(f"{name} {tuple(tensor.shape)} is given twice, or is not a parameter of this model")
            place.copy_(tensor)
        if places:
            raise ValueError(f"{len(places)} parameters were not given, the first of them {next(iter(places))}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _state(weights: dict[str, Tensor], config: MptConfig, companions: Mapping[str, bytes]) -> dict[str, Any]:
    parsed: dict[str, Callable[[bytes], Any]] = {
        ".json": json.loads,
        ".txt": lambda text: text.decode().split("\n"),
        ".jinja": bytes.decode,
    }
    tokenizer = {
        name: {"file_extension": suffix, "content": parsed[suffix](content)}
        for name, content in companions.items()
        for suffix in [Path(name).suffix]
    }
    if tokenizer:  # Composer does not open a tokenizer without its settings
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        tokenizer.setdefault("tokenizer_config.json", {"file_extension": ".json", "content": settings})
    model = {"config": {"file_extension": ".json", "content": config.to_dict(), "class": "transformers.MptForCausalLM"}}
    return {
        "state": {
            "model": weights,
            "optimizers": {},
            "integrations": {"huggingface": {"model": model, "tokenizer": tokenizer}},
        },
        "rng": [],
    }

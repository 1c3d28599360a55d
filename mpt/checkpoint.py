"""Weights on disk: every form of checkpoint that there is of an MPT, read onto models that may be sharded; and Hugging
Face folders, written as a stream of tensors.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpt import hub, mosaic_gpt
from mpt.composer import read_composer
from mpt.config import MptConfig, foundry_defaults, mapping, parameter_shapes
from mpt.initialize import init_weights, is_adapter, local_rows, plain_name
from mpt.manifest import is_run
from mpt.step_folder import read_step_folder
from mpt.tensor_files import Stored, read_folder, read_json, short

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TABLE_LINES = 20
_MODEL_FILE = re.compile(r"config\.json|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
CLASSIFIERS = {  # the head's name, by which a checkpoint's class is known
    "score.": "MptForSequenceClassification",
    "classifier.": "MptForTokenClassification",
    "qa_outputs.": "MptForQuestionAnswering",
}
ALL_HEADS = ("lm_head.", *CLASSIFIERS)
LATEST_COMPOSER = "latest-rank0.pt"  # Composer's link to the newest checkpoint of a folder
# What decides a model's output without showing in its weights' shapes.
BEHAVIOUR = ("layer_norm_epsilon", "logit_scale", "norm_type")
ATTN_BEHAVIOUR = ("alibi", "alibi_bias_max", "attn_uses_sequence_id", "clip_qkv", "prefix_lm", "softmax_scale")


def save_hf(
    named_tensors: Iterable[tuple[str, Tensor | Callable[[], Tensor]]],
    config: MptConfig,
    folder: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    write: bool = True,
    companions: Mapping[str, bytes] | None = None,
    architecture: str = "MptForCausalLM",
) -> None:
    """Write a model as a folder that `load_weights` and transformers read.

    named_tensors: every parameter once, as (name, tensor) or (name, function that gives it); one shard's worth is held
        in memory at a time. Sharded parameters are gathered one by one: then every rank must make this call. A tied
        lm_head.weight is left out.
    max_shard_size: bytes, or such as "5GB" (10^9 bytes) or "500MiB".
    dtype: of the saved weights; None leaves them as they are.
    write: whether this rank writes; True on one of them.
    companions: what is written beside the weights, such as tokenizer files: name -> contents. None keeps those that are
        there.
    architecture: the model's class.

    Everything goes into `folder`.tmp, which is renamed at the end; an older export in `folder` is replaced (and is
    `folder`.old for a moment), and what else lies there stays. A folder that is no model's is refused under any of
    these names. ValueError where names or shapes are not the configuration's. Warns where transformers would load the
    folder and compute something else.
    """
    folder, limit = Path(os.path.abspath(folder)), _bytes(max_shard_size)
    temporary = folder.with_name(folder.name + ".tmp")
    if write:
        if folder in (Path.cwd(), *Path.cwd().parents):
            raise ValueError(f"{folder} is, or holds, the current folder, and would be replaced; give a folder in it")
        _check_replaceable(folder, besides=hub.COMPANIONS)
        for path in (temporary, _old(folder)):
            _check_replaceable(path)
        _remove(temporary)
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"{folder} cannot be made ({error.strerror}); give a place that can be written") from None
        # First, so that what a killed process leaves is known for an export.
        config.save_pretrained(temporary, architecture=architecture)
    expected = parameter_shapes(config, architecture)
    shard: dict[str, Tensor] = {}
    files: list[list[str]] = []
    held = total = 0
    saved_dtype = dtype
    for raw_name, value in named_tensors:
        name = plain_name(raw_name)
        tensor = value() if not isinstance(value, Tensor) else value
        if write and tensor.is_meta:  # ranks that do not write may give names and shapes only
            raise ValueError(f"{name} is on the meta device and has no values; load or initialise the model first")
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if tuple(tensor.shape) != expected.pop(name, None):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} is given twice, or is not a parameter of this configuration"
            )
        if not write:
            continue
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        size = tensor.nbytes
        if shard and held + size > limit:
            files.append(_write_shard(shard, temporary, len(files)))
            shard, held = {}, 0
        shard[name], held, total = tensor, held + size, total + size
        saved_dtype = tensor.dtype
    if expected:
        raise ValueError(f"{len(expected)} parameters were not given, the first of them {next(iter(expected))}")
    if not write:
        return
    files.append(_write_shard(shard, temporary, len(files)))
    _finish_shards(temporary, files, total)
    _write_config(temporary, config, architecture, saved_dtype)
    for written in temporary.glob("*.safetensors"):  # which the library makes readable by their owner only
        shutil.copymode(temporary / "config.json", written)
    for file, content in (companions or {}).items():
        (temporary / file).write_bytes(content)
    _carry_over(folder, temporary, left=() if companions is None else hub.COMPANIONS)
    _replace(temporary, folder)


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", str(size).upper())
    count = size if isinstance(size, int) else int(float(match[1]) * UNITS[match[2]]) if match else 0
    if count <= 0:
        raise ValueError(f"max_shard_size is {size!r}; give a number of bytes, or such as '5GB' or '500MiB'")
    return count


def _check_replaceable(folder: Path, besides: Container[str] = ()) -> None:
    """ValueError unless a folder is a model's, holds nothing but files named in `besides`, or is not there."""
    if not folder.exists():
        return
    if not folder.is_dir() or not (
        (folder / "config.json").exists() or all(path.name in besides for path in folder.iterdir())
    ):
        raise ValueError(f"{folder} exists and is not a model's folder; give another place")


def _carry_over(old: Path, new: Path, left: Container[str]) -> None:
    """Put into `new` what `old` holds besides a model and the names in `left`, by links where the disk has them."""
    for path in old.iterdir() if old.exists() else ():
        if path.name in left or _MODEL_FILE.fullmatch(path.name) or os.path.lexists(new / path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _write_shard(shard: dict[str, Tensor], folder: Path, index: int) -> list[str]:
    save_file(shard, folder / f"{index}.safetensors", metadata={"format": "pt"})
    return list(shard)


def _finish_shards(folder: Path, files: list[list[str]], total: int) -> None:
    """Give the shards their names, which hold their number, and write the index where there are several."""
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        final = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(folder: Path, config: MptConfig, architecture: str, dtype: torch.dtype | None) -> None:
    config.save_pretrained(folder, architecture=architecture)
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    values.pop("dtype", None)  # its newer name, of the file that the configuration was read from
    values.pop("auto_map", None)  # it names code, which is not copied along
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if ignored := unsupported_by_transformers(config):
        warnings.warn(
            f"transformers (5.23) does not honour {', '.join(ignored)}: this export fails there or gives other logits",
            stacklevel=3,
        )


def unsupported_by_transformers(config: MptConfig) -> list[str]:
    """`field=value` for each field of this configuration that transformers' MPT ignores or refuses."""
    attn = config.attn_config
    honoured = {
        "attn_config.attn_type": (attn.attn_type, "multihead_attention"),
        "attn_config.alibi": (attn.alibi, True),
        "attn_config.alibi_bias_max": (attn.alibi_bias_max, 8.0),
        "attn_config.qk_ln": (attn.qk_ln, False),
        "attn_config.prefix_lm": (attn.prefix_lm, False),
        "attn_config.attn_uses_sequence_id": (attn.attn_uses_sequence_id, False),
        "attn_config.attn_pdrop": (attn.attn_pdrop, 0.0),
        "expansion_ratio": (config.expansion_ratio, 4.0),
        "logit_scale": (config.logit_scale, None),
        "no_bias": (config.no_bias, True),
        "norm_type": (config.norm_type.removeprefix("low_precision_"), "layernorm"),
    }
    return [f"{name}={value}" for name, (value, only) in honoured.items() if value != only]


def _replace(temporary: Path, folder: Path) -> None:
    old = _old(folder)
    _remove(old)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    with contextlib.suppress(OSError):  # the export is whole; the next one tries again
        _remove(old)


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _remove(folder: Path) -> None:
    """Delete an export, config.json last: one that is half deleted is still known for one."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "config.json":
                path.unlink()
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Source:
    """A checkpoint that is open: what it holds is known, and none of its weights is read yet.

    path: the folder or file. kind: whose form it has. tensors: by the names that an MPT's parameters have here; those
        of a model without head may lack their `transformer.`. values: the configuration as MptConfig takes it, None
        where there is none. companions: files that belong to the model, such as its tokenizer's: name -> contents.
    """

    path: Path
    kind: Literal["huggingface", "composer", "run"]
    tensors: dict[str, Stored]
    values: dict[str, Any] | None
    companions: dict[str, bytes]

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that the weights are stored in (of the first one)."""
        return next((s.dtype for s in self.tensors.values() if s.dtype is not None), torch.float32)

    @property
    def architecture(self) -> str:
        """The class that the weights are of, by its head: that of the language model where there is no other."""
        heads = [kind for head, kind in CLASSIFIERS.items() if any(name.startswith(head) for name in self.tensors)]
        return heads[0] if len(heads) == 1 else "MptForCausalLM"

    def config(self, **overrides: Any) -> MptConfig:
        """The configuration, checked; overrides as in MptConfig.from_dict. ValueError where there is none, or it cannot
        be this checkpoint's.
        """
        if self.values is None:
            raise ValueError(
                f"{self.path} has no configuration; put the model's config.json "
                f"{'into it' if self.path.is_dir() else 'beside it'}"
            )
        try:
            config = MptConfig.from_dict(self.values, **overrides)
        except ValueError as error:
            raise ValueError(f"{self.path}: its configuration: {error}") from None
        if config.n_layers > len(self.tensors):  # before anyone makes so many
            raise ValueError(
                f"{self.path}: its configuration has n_layers {config.n_layers}, and it holds {len(self.tensors)} "
                "tensors: they do not belong together"
            )
        return config

    def with_head(self) -> dict[str, Stored]:
        """The tensors by the names that they have in a model with a head."""
        if any(name.startswith("transformer.") for name in self.tensors):
            return dict(self.tensors)
        return {n if n.startswith(ALL_HEADS) else f"transformer.{n}": s for n, s in self.tensors.items()}


def open_checkpoint(path_or_name: str | Path, *, revision: str | None = None, check_hashes: bool = False) -> Source:
    """Find a checkpoint and read what it says of itself: names, shapes, configuration.

    path_or_name: a Hugging Face folder (safetensors or .bin, whole or in shards), a Composer .pt file or a folder with
        latest-rank0.pt, a training run's folder or its step-N; or a model's name on the hub, at `revision`. Any of them
        may be of mosaic_gpt.
    check_hashes: of a training run's checkpoint, which reads all of it. The other forms have none.

    ValueError says what is not there, damaged or refused.
    """
    path = hub.local_path(path_or_name, revision=revision)
    try:
        source = _read(path, check_hashes)
    except OSError as error:
        raise ValueError(f"{error.filename or path} cannot be read ({error.strerror}); copy it again") from None
    if not mosaic_gpt.is_mosaic_gpt(source.tensors):
        return source
    renamed = {mosaic_gpt.present_name(name): stored for name, stored in source.tensors.items()}
    if len(renamed) < len(source.tensors):
        raise ValueError(f"{path}: two of its tensors have one name, once mosaic_gpt's names are made MPT's")
    return replace(source, tensors=renamed)


def _read(path: Path, check_hashes: bool) -> Source:
    form = form_of(path)
    if form == "composer":
        path = path / LATEST_COMPOSER if path.is_dir() else path
        tensors, values, companions = read_composer(path)
        return Source(path, form, tensors, values or _config_in(path.parent), companions)
    if form == "run":
        path, tensors, saved = read_step_folder(path, check_hashes=check_hashes)
        in_run = path.parent.name == "checkpoints"
        return Source(path, form, tensors, saved or None, companions_in(path.parents[1] / "export") if in_run else {})
    found = read_folder(path)
    if found is None:
        broken = next((p for p in path.iterdir() if p.is_symlink() and not p.exists()), None)
        if broken is not None:  # such as a hub cache's, copied without what they lead to
            raise ValueError(f"{broken} leads to a file that is not there; copy the files themselves (cp -rL)")
        export = path / "export"
        raise ValueError(
            f"{path} holds neither model.safetensors nor pytorch_model.bin, whole or with an index, "
            f"nor {LATEST_COMPOSER}, nor checkpoints of a training run{f'; give {export}' if export.is_dir() else ''}"
        )
    return Source(path, form, found, _config_in(path), companions_in(path))


def _config_in(folder: Path) -> dict[str, Any] | None:
    path = folder / hub.CONFIG
    return read_json(path) if path.exists() else None


def companions_in(folder: Path) -> dict[str, bytes]:
    """The files of a folder that belong to a model beside its weights and configuration: name -> contents."""
    return {file: (folder / file).read_bytes() for file in hub.COMPANIONS if (folder / file).is_file()}


def form_of(path: Path) -> Literal["huggingface", "composer", "run"]:
    """Whose form a path that exists has, told by what is there; "huggingface" where nothing tells."""
    if path.is_file():
        if path.name.endswith((".safetensors", ".bin", ".json")):
            raise ValueError(f"{path} is a part of a model's folder; give the folder, {path.parent}")
        return "composer"
    if any((path / f"{file}{suffix}").exists() for file in hub.WEIGHTS for suffix in ("", ".index.json")):
        return "huggingface"
    if (path / LATEST_COMPOSER).exists():
        return "composer"
    return "run" if is_run(path) else "huggingface"


def load_weights(model: nn.Module, source: Source | str | Path) -> None:
    """Copy a checkpoint's weights onto `model`, tensor by tensor, to where each parameter is.

    Parameters may be DTensors sharded along rows: each rank reads its own rows.

    source: as `open_checkpoint` takes or gives it. Values are cast to the parameters' dtypes. ValueError holds a table
    of the missing, unexpected and misshapen weights, and nothing is copied then. Warns of a head that is initialised or
    left out, as `match` does, and where the checkpoint's configuration describes another behaviour than `model.config`.
    """
    if not isinstance(source, Source):
        source = open_checkpoint(source, check_hashes=True)
    stored = match(model, source)
    compare_config(model.config, source)  # type: ignore[arg-type]
    fill(model, stored)


@torch.no_grad()
def fill(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Copy onto each parameter of `model` what `match` found for it; initialise the head that it did not find."""
    parameters = _parameters(model)
    if fresh := parameters.keys() - stored.keys():
        init_weights(model, int(torch.randint(2**62, (), device="cpu")), only=fresh)
    for name, parameter in parameters.items():
        if name in fresh:
            continue
        local, first = local_rows(name, parameter.detach())
        if local.shape[0]:
            stored[name].copy_to(local, first)


def match(model: nn.Module, source: Source) -> dict[str, Stored]:
    """What of a checkpoint goes onto each parameter of `model`, which may still be on meta, by the parameter's name.

    Warns where the checkpoint has none of a classifier's head, which is then to be initialised, and where it has other
    classes' heads. ValueError holds a table of what else does not fit.
    """
    parameters = {name: tuple(p.shape) for name, p in _parameters(model).items()}
    if hasattr(model, "transformer"):
        stored = source.with_head()
        if hasattr(model, "lm_head") and "lm_head.weight" not in parameters:
            _drop_tied_head(stored, source.path)
    else:
        named = source.tensors.items()
        stored = {name.removeprefix("transformer."): s for name, s in named if not name.startswith(ALL_HEADS)}
    fresh = _fresh_head(model, parameters, stored, source.path)
    compare({name: shape for name, shape in parameters.items() if name not in fresh}, stored, source.path)
    return stored


def _fresh_head(model: nn.Module, wanted: Collection[str], stored: dict[str, Stored], path: Path) -> set[str]:
    """The names of a classifier's head where the checkpoint has none of it. Drops other classes' heads from `stored`,
    and warns of both.
    """
    unused = _drop_other_heads(stored, wanted, path)
    head = {name for name in wanted if name.startswith(tuple(CLASSIFIERS))}
    fresh = set() if head & stored.keys() else head
    said = [f"has no {' and '.join(sorted(fresh))}: initialised at random, train before use"] if fresh else []
    said += [f"has {' and '.join(unused)}, which {type(model).__name__} does not use"] if unused else []
    if said:
        warnings.warn(f"{path} {'; it '.join(said)}", stacklevel=4)
    return fresh


def _drop_other_heads(stored: dict[str, Stored], wanted: Container[str], path: Path) -> list[str]:
    """Take the heads of other classes out of `stored`, and give their names. ValueError where they leave none for the
    language model that is wanted.
    """
    unused = sorted(name for name in stored if name.startswith(ALL_HEADS) and name not in wanted)
    for name in unused:
        del stored[name]
    if unused and "lm_head.weight" in wanted and "lm_head.weight" not in stored:
        raise ValueError(
            f"{path} is a classifier's: it has {' and '.join(unused)}, and no lm_head.weight, which a language model "
            "with tie_word_embeddings False needs; set that to True, or load a language model's checkpoint"
        )
    return unused


def model_tensors(source: Source, config: MptConfig, architecture: str = "MptForCausalLM") -> dict[str, Stored]:
    """Every parameter that a class of this configuration has, by name, in the model's order. Heads of other classes
    are left out.

    ValueError holds a table of what does not fit.
    """
    stored, shapes = source.with_head(), parameter_shapes(config, architecture)
    if config.tie_word_embeddings:
        _drop_tied_head(stored, source.path)
    _drop_other_heads(stored, shapes, source.path)
    compare(shapes, stored, source.path)
    return {name: stored[name] for name in shapes}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters, by their names in a checkpoint; adapters are left as they are."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if not is_adapter(name)}


def _drop_tied_head(stored: dict[str, Stored], path: Path) -> None:
    head, wte = stored.pop("lm_head.weight", None), stored.get("transformer.wte.weight")
    if head is None or wte is None:
        return
    step = 4096
    same = head.shape == wte.shape and all(
        torch.equal(head.rows(i, i + step), wte.rows(i, i + step)) for i in range(0, wte.shape[0], step)
    )
    if not same:
        raise ValueError(
            f"{path}: lm_head.weight differs from wte.weight; set tie_word_embeddings to False to keep both"
        )


def compare(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored], path: Path) -> None:
    """ValueError with a table where the checkpoint at `path` lacks a name, has one too many, or has another shape."""
    lines = [f"missing     {name} {shape}" for name, shape in wanted.items() if name not in stored]
    lines += [f"unexpected  {short(name)} {s.shape}" for name, s in stored.items() if name not in wanted]
    for name, shape in wanted.items():
        if name in stored and stored[name].shape != shape:
            lines.append(f"shape       {name} expected {shape}, found {stored[name].shape}")
        elif name in stored and stored[name].dtype is None:
            lines.append(f"dtype       {name} is stored as no kind of float")
    if lines:
        more = [f"... and {len(lines) - TABLE_LINES} more"] if len(lines) > TABLE_LINES else []
        table = "\n  ".join(lines[:TABLE_LINES] + more)
        raise ValueError(f"{path} does not fit the model, {len(lines)} weights differ:\n  {table}")


def compare_config(config: MptConfig, source: Source) -> None:
    """Warn where the checkpoint's configuration describes another behaviour than `config`."""
    if source.values is None:
        return
    theirs = source.values
    if theirs.get("model_type") == mosaic_gpt.MODEL_TYPE:
        theirs = mosaic_gpt.config(theirs)
    try:
        theirs = foundry_defaults(theirs)
        attn = mapping("attn_config", theirs.get("attn_config"))
    except ValueError as error:
        raise ValueError(f"{source.path}: its configuration: {error}") from None
    pairs = [(key, theirs[key], getattr(config, key)) for key in BEHAVIOUR if key in theirs]
    pairs += [
        (f"attn_config.{key}", attn[key], getattr(config.attn_config, key)) for key in ATTN_BEHAVIOUR if key in attn
    ]
    if differing := [f"{key} {old} there, {new} here" for key, old, new in pairs if (old or None) != (new or None)]:
        warnings.warn(f"{source.path} describes another model: {'; '.join(differing)}", stacklevel=3)

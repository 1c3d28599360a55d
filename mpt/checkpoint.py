"""Weights on disk: Hugging Face folders, written as a stream of tensors and read onto models that may be sharded."""

import contextlib
import json
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpt.config import MptConfig, parameter_shapes
from mpt.initialize import init_weights, local_rows, plain_name

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes of one element, of every dtype that has whole ones.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8), **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2), **dict.fromkeys(("I8", "U8", "BOOL"), 1),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 1),
}  # fmt: skip
TABLE_LINES = 20
CLASSIFIERS = ("score.", "classifier.", "qa_outputs.")
ALL_HEADS = ("lm_head.", *CLASSIFIERS)
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
    tokenizer_files: Iterable[str | Path] = (),
    architecture: str = "MptForCausalLM",
) -> None:
    """Write a model as a folder that `load_hf` and transformers read.

    named_tensors: every parameter once, as (name, tensor) or (name, function that gives it); one shard's worth is held
        in memory at a time. Sharded parameters are gathered one by one: then every rank must make this call. A tied
        lm_head.weight is left out.
    max_shard_size: bytes, or such as "5GB" (10^9 bytes) or "500MiB".
    dtype: of the saved weights; None leaves them as they are.
    write: whether this rank writes; True on one of them.
    tokenizer_files: copied along.
    architecture: the model's class.

    Everything goes into `folder`.tmp, which is renamed at the end; an older export in `folder` is replaced (and is
    `folder`.old for a moment), anything else under these three names refused. ValueError where names or shapes are not
    the configuration's. Warns where transformers would load the folder and compute something else.
    """
    folder, limit = Path(folder), _bytes(max_shard_size)
    temporary = folder.with_name(folder.name + ".tmp")
    if write:
        for path in (folder, temporary, _old(folder)):
            _check_replaceable(path)
        _remove(temporary)
        temporary.mkdir(parents=True)
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
    for file in tokenizer_files:
        shutil.copy(file, temporary / Path(file).name)
    _replace(temporary, folder)


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", str(size).upper())
    count = size if isinstance(size, int) else int(float(match[1]) * UNITS[match[2]]) if match else 0
    if count <= 0:
        raise ValueError(f"max_shard_size is {size!r}; give a number of bytes, or such as '5GB' or '500MiB'")
    return count


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))):
        raise ValueError(f"{folder} exists and is not a model's folder; give another place")


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
class Stored:
    """A tensor in a file: its shape, its dtype (None where it is no float), and how to read rows a..b of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    rows: Callable[[int, int], Tensor]


@torch.no_grad()
def load_hf(model: nn.Module, folder: str | Path) -> None:
    """Copy a Hugging Face folder's weights onto `model`, whose parameters may be DTensors sharded along rows; each rank
    reads its own rows.

    Reads model.safetensors or pytorch_model.bin, whole or in shards with an index; values are cast to the parameters'
    dtypes. A classifier's head that the folder does not have is initialised as `model.config` says, from torch's
    generator, with a warning; heads of other classes are left out. ValueError holds a table of the missing, unexpected
    and misshapen weights, and nothing is copied then; or it names the file that is absent, damaged, outside the folder,
    or holds a name twice. Warns where the folder's config.json describes another behaviour than `model.config`.
    """
    folder = Path(folder)
    stored = stored_tensors(folder)
    has_head = hasattr(model, "transformer")
    if has_head and not any(name.startswith("transformer.") for name in stored):
        stored = {name if name.startswith(ALL_HEADS) else f"transformer.{name}": s for name, s in stored.items()}
    if not has_head:
        stored = {name.removeprefix("transformer."): s for name, s in stored.items() if not name.startswith(ALL_HEADS)}
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    if hasattr(model, "lm_head") and "lm_head.weight" not in parameters:
        _drop_tied_head(stored, folder)
    fresh = _fresh_head(model, parameters, stored, folder)
    _compare({name: p for name, p in parameters.items() if name not in fresh}, stored, folder)
    _compare_config(model.config, folder)  # type: ignore[arg-type]
    if fresh:
        init_weights(model, int(torch.randint(2**62, (), device="cpu")), only=fresh)
    for name, parameter in parameters.items():
        if name in fresh:
            continue
        local, first = local_rows(name, parameter.detach())
        if local.shape[0]:
            local.copy_(stored[name].rows(first, first + local.shape[0]))


def _fresh_head(
    model: nn.Module, parameters: dict[str, nn.Parameter], stored: dict[str, Stored], folder: Path
) -> set[str]:
    """The names of a classifier's head where the folder has none of it. Drops other classes' heads from `stored`, and
    warns of both.
    """
    unused = sorted(name for name in stored if name.startswith(ALL_HEADS) and name not in parameters)
    for name in unused:
        del stored[name]
    head = {name for name in parameters if name.startswith(CLASSIFIERS)}
    fresh = set() if head & stored.keys() else head
    said = [f"has no {' and '.join(sorted(fresh))}: initialised at random, train before use"] if fresh else []
    said += [f"has {' and '.join(unused)}, which {type(model).__name__} does not use"] if unused else []
    if said:
        warnings.warn(f"{folder} {'; it '.join(said)}", stacklevel=5)
    return fresh


def dtype_of(folder: str | Path) -> torch.dtype:
    """The floating dtype a folder's weights are stored in (of the first one)."""
    return next((s.dtype for s in stored_tensors(Path(folder)).values() if s.dtype is not None), torch.float32)


def _drop_tied_head(stored: dict[str, Stored], folder: Path) -> None:
    head, wte = stored.pop("lm_head.weight", None), stored.get("transformer.wte.weight")
    if head is None or wte is None:
        return
    step = 4096
    same = head.shape == wte.shape and all(
        torch.equal(head.rows(i, i + step), wte.rows(i, i + step)) for i in range(0, wte.shape[0], step)
    )
    if not same:
        raise ValueError(
            f"{folder}: lm_head.weight differs from wte.weight; set tie_word_embeddings to False to keep both"
        )


def _compare(parameters: dict[str, nn.Parameter], stored: dict[str, Stored], folder: Path) -> None:
    lines = [f"missing     {name} {tuple(p.shape)}" for name, p in parameters.items() if name not in stored]
    lines += [f"unexpected  {_short(name)} {s.shape}" for name, s in stored.items() if name not in parameters]
    for name, p in parameters.items():
        if name in stored and (s := stored[name]).shape != tuple(p.shape):
            lines.append(f"shape       {name} expected {tuple(p.shape)}, found {s.shape}")
        elif name in stored and s.dtype is None:
            lines.append(f"dtype       {name} is stored as no kind of float")
    if lines:
        more = [f"... and {len(lines) - TABLE_LINES} more"] if len(lines) > TABLE_LINES else []
        table = "\n  ".join(lines[:TABLE_LINES] + more)
        raise ValueError(f"{folder} does not fit the model, {len(lines)} weights differ:\n  {table}")


def _compare_config(config: MptConfig, folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        return
    theirs = _json(path, path.read_bytes())
    attn = theirs.get("attn_config") or {}
    if not isinstance(attn, dict):
        raise ValueError(f"{path}: attn_config is {_short(repr(attn))}; it must be a mapping")
    pairs = [(key, theirs[key], getattr(config, key)) for key in BEHAVIOUR if key in theirs]
    pairs += [
        (f"attn_config.{key}", attn[key], getattr(config.attn_config, key)) for key in ATTN_BEHAVIOUR if key in attn
    ]
    if differing := [f"{key} {old} there, {new} here" for key, old, new in pairs if (old or None) != (new or None)]:
        warnings.warn(f"{folder}/config.json describes another model: {'; '.join(differing)}", stacklevel=3)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder, by name."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; download the model first, and give the folder that holds its config.json"
        )
    for single, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_bin)):
        whole, index = folder / single, folder / f"{single}.index.json"
        try:
            if whole.exists():
                return read(whole)
            if index.exists():
                return _read_shards(index, read)
        except OSError as error:
            raise ValueError(f"{error.filename or whole} cannot be read ({error.strerror}); copy it again") from None
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin, whole or with an index")


def _read_shards(index: Path, read: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    weight_map = _json(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from names to files")
    out: dict[str, Stored] = {}
    for file in dict.fromkeys(weight_map.values()):
        # A name that leads out of the folder is an attack. (The file itself may be a link: that is how hub downloads
        # are laid out.)
        if Path(file).name != file or file in ("", "..") or "\\" in file or "\0" in file:
            raise ValueError(
                f"{index} names the file {_short(repr(file))}; shards must be plain file names in its own folder"
            )
        if not _is_file(index.parent / file):
            raise ValueError(f"{index} names the file {_short(file)}, which does not exist")
        for name, stored in read(index.parent / file).items():
            if name in out or weight_map.get(name) != file:
                where = weight_map.get(name, "no file")
                raise ValueError(
                    f"{index.parent / file} holds {name}, which the index puts into {where}; a name must be in one file"
                )
            out[name] = stored
    if absent := weight_map.keys() - out.keys():
        name = min(absent)
        raise ValueError(f"{index} puts {name} into {weight_map[name]}, which does not hold it")
    return out


def _read_safetensors(path: Path) -> dict[str, Stored]:
    """The header, read here rather than by the library, which takes the last of two tensors with one name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is truncated or no safetensors file ({size} bytes)")
        header = _json(path, file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _describes_tensor(entry):
            raise ValueError(f"{path} is no safetensors file (its header does not describe {_short(name)} as a tensor)")
    end = _end_of_data(path, header)
    out = {
        name: Stored(tuple(entry["shape"]), DTYPES.get(entry["dtype"]), partial(_safetensors_rows, path, name))
        for name, entry in header.items()
    }
    if size != 8 + length + end:
        raise ValueError(f"{path} is truncated or damaged: {size} bytes, and its header says {8 + length + end}")
    return out


def _describes_tensor(entry: object) -> bool:
    def counts(value: object) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and counts(entry.get("shape"))
        and counts(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def _end_of_data(path: Path, header: dict[str, Any]) -> int:
    """Where the last tensor ends. ValueError unless each has its shape's bytes and begins where the one before ends."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        needed = math.prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else stop - start
        if start != end or stop < start or stop - start != needed:
            raise ValueError(
                f"{path} is damaged: its header puts {_short(name)} ({dtype}, {_short(str(shape))}) at bytes "
                f"{start} to {stop}, after {end} bytes of others; copy it again"
            )
        end = stop
    return end


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _safetensors_rows(path: Path, name: str, start: int, stop: int) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_slice(name)[start:stop]


def _read_bin(path: Path) -> dict[str, Stored]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the unpickler raises many kinds; each means that the file cannot be trusted
        raise ValueError(
            f"{path} cannot be read as a plain dictionary of tensors ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu"
        for name, t in tensors.items()
    ):
        raise ValueError(f"{path} is not a plain dictionary of tensors (named, dense, and with values)")
    return {
        name: Stored(tuple(t.shape), t.dtype if t.is_floating_point() else None, partial(_tensor_rows, t))
        for name, t in tensors.items()
    }


def _tensor_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def _json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object in which no name occurs twice."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            repeated.append(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return out

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a bare ValueError
        raise ValueError(f"{path} is damaged: its JSON does not parse ({error})") from None
    if repeated:
        raise ValueError(f"{path} names {_short(repr(repeated[0]))} twice")
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return values

"""Tensors in files, safetensors and torch.save's: found and checked without reading them, and nothing a file says is
run.

Whoever made such a file may be an enemy. Sizes are compared with the file's before anything is allocated, no name
counts twice, and what a pickle asks for is looked at before it is unpickled, by torch's restricted unpickler.
"""

import io
import json
import math
import pickletools
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes of one element, of every dtype that has whole ones.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8), **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2), **dict.fromkeys(("I8", "U8", "BOOL"), 1),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 1),
}  # fmt: skip
JSON_LIMIT = 100_000_000  # bytes of a header, index or configuration: what safetensors allows a header

# All that a pickled dictionary of tensors needs.
TENSORS = frozenset(
    ["collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"]
    + [f"torch.{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char")]
    + ["torch.ByteStorage", "torch.BoolStorage", "torch.storage.UntypedStorage"]
)
# What the state of a training adds, and torch makes without harm.
STATE = frozenset(
    ["collections.Counter", "builtins.set", "builtins.complex", "_codecs.encode"]
    + ["torch.Size", "torch.device", "torch.nn.parameter.Parameter"]
    + [f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")]
)
# Of Python's own library, what stands in such a state; a file that asks for more of it (os, subprocess) is an attack.
STATE_LIBRARY = frozenset(["collections", "copyreg", "datetime", "decimal", "enum", "functools", "pathlib", "uuid"])
# Of torch, what metrics are made of: torch's unpickler makes none of these, unlike torch.FloatTensor(10**12).
STATE_TORCH = ("torch.nn.", "torch._C._VariableFunctions", "torch.torch_version.")
STATE_BUILTINS = frozenset(
    f"builtins.{name}"
    for name in (
        "object",
        "getattr",
        "frozenset",
        "slice",
        "range",
        "dict",
        "list",
        "tuple",
        "str",
        "int",
        "float",
        "bool",
    )
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, its dtype (None where it is no float), and how to read rows a..b of it.

    place: the file and the byte where its numbers begin, where they lie there as they do in memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    rows: Callable[[int, int], Tensor]
    place: tuple[Path, int] | None = None

    def copy_to(self, target: Tensor, first: int) -> None:
        """Put the rows from `first` on into `target`, as many as it has, cast to its dtype."""
        if (
            self.place is None
            or target.device.type != "cpu"
            or target.dtype != self.dtype
            or not target.is_contiguous()
        ):
            target.copy_(self.rows(first, first + target.shape[0]))
            return
        # Read to where it belongs: no page of the file is mapped, and no threads wait for each other over a copy.
        path, start = self.place
        rest = target.view(torch.uint8).reshape(-1).numpy().data
        with path.open("rb", buffering=0) as file:
            file.seek(start + first * math.prod(self.shape[1:]) * target.element_size())
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise ValueError(f"{path} has become shorter while it was read; copy it again")
                rest = rest[count:]


class StandIn:
    """What a restricted unpickler puts in the place of an object of a class it does not load: it holds nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _stand_in(name: str) -> Any:
    """What a restricted unpickler calls in the place of `name`: what is filled afterwards has to be fillable."""
    filled: dict[str, Any] = {"collections.defaultdict": lambda *_: {}, "collections.deque": lambda *_: []}
    return filled.get(name, StandIn)


def read_folder(folder: Path) -> dict[str, Stored] | None:
    """Every tensor of a Hugging Face folder, by name; None where it has no weights. ValueError names a bad file."""
    for single, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        whole, index = folder / single, folder / f"{single}.index.json"
        if whole.exists():
            return read(whole)
        if index.exists():
            return _read_shards(index, read)
    return None


def _read_shards(index: Path, read: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from names to files")
    out: dict[str, Stored] = {}
    for file in dict.fromkeys(weight_map.values()):
        # A name that leads out of the folder is an attack. (The file itself may be a link: that is how hub downloads
        # are laid out.)
        if not is_base_name(file):
            raise ValueError(
                f"{index} names the file {short(repr(file))}; shards must be plain file names in its own folder"
            )
        if not _is_file(index.parent / file):
            raise ValueError(
                f"{index} names the file {short(file)}, which does not exist; copy or download the folder again"
            )
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


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The header, read here rather than by the library, which takes the last of two tensors with one name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is truncated or no safetensors file ({size} bytes)")
        if length > JSON_LIMIT:
            raise ValueError(f"{path} is no safetensors file: its header would have {length} bytes")
        header = parse_json(path, file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _describes_tensor(entry):
            raise ValueError(f"{path} is no safetensors file (its header does not describe {short(name)} as a tensor)")
    end = _end_of_data(path, header)
    # Opened once, by the first tensor that is read, and closed with the last that can be.
    opened = lru_cache(maxsize=1)(partial(safe_open, path, framework="pt"))
    out = {
        name: Stored(
            tuple(entry["shape"]),
            DTYPES.get(entry["dtype"]),
            partial(_safetensors_rows, opened, name),
            (path, 8 + length + entry["data_offsets"][0]),
        )
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
                f"{path} is damaged: its header puts {short(name)} ({dtype}, {short(str(shape))}) at bytes "
                f"{start} to {stop}, after {end} bytes of others; copy it again"
            )
        end = stop
    return end


def _safetensors_rows(opened: Callable[[], Any], name: str, start: int, stop: int) -> Tensor:
    return opened().get_slice(name)[start:stop]


def read_bin(path: Path) -> dict[str, Stored]:
    """The tensors of a file that torch.save wrote of a dictionary of tensors, such as pytorch_model.bin."""
    return as_stored(path, load_archive(path), "file")


def as_stored(path: Path, tensors: Any, what: str) -> dict[str, Stored]:
    """Name -> Stored of a dictionary that `load_archive` read. ValueError unless it holds plain tensors, each in memory
    of its own file that is no smaller than it.
    """
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in tensors.items()):
        raise ValueError(f"{path} is not a plain dictionary of tensors (named, dense, and with values): {what}")
    return {
        name: Stored(tuple(t.shape), t.dtype if t.is_floating_point() else None, partial(_tensor_rows, t.detach()))
        for name, t in tensors.items()
    }


def _is_plain(tensor: Any) -> bool:
    # A stride of 0 would make one number as large as the shape says.
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _tensor_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def load_archive(path: Path, inside: io.BytesIO | None = None, *, training_state: bool = False) -> Any:
    """What torch.save put into a file, its tensors mapped from it and not yet read; or, with `inside`, into a part of
    it, which is read.

    By torch.load with weights_only=True, and nothing else. A file may ask for tensors only; with training_state also
    for the plain values of STATE. There, objects of other packages (metrics, time stamps) become a StandIn each, which
    runs and holds nothing. ValueError names what else a file asks for, or says how it is damaged.
    """
    refused = _asked_for(path, inside) - TENSORS
    foreign: set[str] = set()
    if training_state:
        refused -= STATE
        foreign = {name for name in refused if _may_stand_in(name)}
        refused -= foreign
    if refused:
        wanted = "a training's state" if training_state else "tensors"
        raise ValueError(
            f"{path} is refused: it asks for {short(', '.join(sorted(refused)))}, which no file of {wanted} needs; "
            "take the model from a source that you trust"
        )
    stand_ins: Any = [(_stand_in(name), name) for name in sorted(foreign)]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated storages, which a user cannot change
            if inside is not None:
                inside.seek(0)
            return torch.load(inside or path, map_location="cpu", mmap=inside is None, weights_only=True)
    except Exception as error:  # the unpickler raises many kinds; each means that the file cannot be trusted
        lines = str(error).splitlines() or [type(error).__name__]
        reason = short(next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0]))
        raise ValueError(f"{path} is damaged or no file of torch.save's ({reason}); copy it again") from None


def _may_stand_in(name: str) -> bool:
    package = name.split(".")[0]
    if package == "builtins":
        return name in STATE_BUILTINS
    if package == "torch":
        return name.startswith(STATE_TORCH)
    return package in STATE_LIBRARY or package not in sys.stdlib_module_names


def _asked_for(path: Path, inside: io.BytesIO | None) -> set[str]:
    """module.name of everything that a file's pickle would import, once the archive's form is checked."""
    size = path.stat().st_size if inside is None else inside.getbuffer().nbytes
    try:
        with zipfile.ZipFile(inside or path) as archive:
            entries = archive.infolist()
            wrong = _what_is_wrong(entries, size)
            pickled = b"" if wrong else archive.read(next(entry for entry in entries if _is_pickle(entry)))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError):
        raise ValueError(f"{path} is truncated, or no file of torch.save's ({size} bytes); copy it again") from None
    if wrong:
        raise ValueError(f"{path} is refused: {wrong}")
    try:
        names = [str(argument) for op, argument, _ in pickletools.genops(pickled) if op.name == "GLOBAL"]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its pickle does not parse ({error}); copy it again") from None
    return {_present_name(*name.split(" ", 1)) for name in names}


def _what_is_wrong(entries: list[zipfile.ZipInfo], size: int) -> str | None:
    """Why an archive of `size` bytes is none of torch.save's, which stores everything once and as it is."""
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        return "it is compressed, and torch.save compresses nothing"
    if sum(entry.file_size for entry in entries) > size or any(e.file_size != e.compress_size for e in entries):
        return "its parts are together larger than the file"
    if twice := [name for name, n in Counter(entry.filename for entry in entries).items() if n > 1]:
        return f"it holds {short(repr(twice[0]))} twice"
    if (pickles := sum(map(_is_pickle, entries))) != 1:
        return f"torch.save puts one data.pkl into a file, and this holds {pickles}"
    return None


def _is_pickle(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")


def _present_name(module: str, name: str = "") -> str:
    """torch.save writes the names that Python 2 had, as every pickle of protocol 2 does."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, in which no name occurs twice."""
    if path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; no such file of a model is so large")
    return parse_json(path, path.read_bytes())


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object in which no name occurs twice; `path` is for the error."""
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
        raise ValueError(f"{path} names {short(repr(repeated[0]))} twice")
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return values


def is_base_name(file: str) -> bool:
    """Whether a name stays in its folder wherever it is joined to one."""
    return Path(file).name == file and file not in ("", "..") and "\\" not in file and "\0" not in file


def short(text: str) -> str:
    """Text for an error message, whoever wrote it."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False

"""Reading MDS folders, the sample shards that llm-foundry's users have, without the library that wrote them.

A folder holds `index.json`: {"version": 2, "shards": [...]}, each shard naming its columns (`column_names`, in file
order, `column_encodings`, `column_sizes` with null for variable ones), its number of samples, `raw_data` and, where
compressed, `zip_data`, each {basename, bytes, hashes}, and `compression` ("zstd", "zstd:7", "gz", ... or null).

A raw shard, little-endian: uint32 n; n + 1 uint32 offsets from the start of the file; the shard's settings as JSON; n
samples. A sample: one uint32 size per variable column, then the columns' bytes. Text is UTF-8; `bytes` are as they
are; `ndarray[:dtype[:shape]]` holds, as far as its name does not fix them, one byte for the dtype, one byte
ndim << 2 | log2(size of a dimension's integer), the dimensions, then the values.
(Format: the documentation and source of mosaicml-streaming, format version 2.)
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import InputError

INDEX = "index.json"
TOKENS = "tokens"
VALUE_DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64", 65: "int64"}
TOKEN_DTYPES = tuple(VALUE_DTYPES.values())

Document = str | npt.NDArray[Any]


@dataclass(frozen=True)
class MdsShard:
    """One shard of an index: where its bytes are and how its samples are laid out."""

    name: str
    raw: Path
    raw_bytes: int
    raw_hashes: dict[str, str]
    zipped: Path | None
    compression: str | None
    samples: int
    columns: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]

    @property
    def path(self) -> Path:
        """The file that is read: the raw one where it is there, else the compressed one."""
        return self.zipped if self.zipped is not None and not self.raw.is_file() else self.raw


def read_index(folder: Path) -> list[MdsShard]:
    """The shards of an MDS folder, in order; InputError names what is wrong with its index.json."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["version"] != 2:
            raise InputError(f"{path}: version is {index['version']!r}, only MDS version 2 is read")
        return [_shard(folder, entry) for entry in index["shards"]]
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: not the index of an MDS folder ({error!r}); copy the folder again") from None


def _shard(folder: Path, entry: dict[str, Any]) -> MdsShard:
    if entry["format"] != "mds":
        raise InputError(f"{folder / INDEX}: shard format is {entry['format']!r}, only 'mds' is read")
    raw, zipped = entry["raw_data"], entry["zip_data"]
    columns = entry["column_names"], entry["column_encodings"], entry["column_sizes"]
    if (
        not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
        or not all(isinstance(text, str) for text in (*columns[0], *columns[1]))
        or not all(size is None or (type(size) is int and size >= 0) for size in columns[2])
    ):
        raise ValueError("column_names, column_encodings and column_sizes do not describe columns")
    return MdsShard(
        name=raw["basename"],
        raw=_inside(folder, raw["basename"]),
        raw_bytes=int(raw["bytes"]),
        raw_hashes=dict(raw.get("hashes") or {}),
        zipped=_inside(folder, zipped["basename"]) if zipped else None,
        compression=entry["compression"],
        samples=int(entry["samples"]),
        columns=tuple(entry["column_names"]),
        encodings=tuple(entry["column_encodings"]),
        sizes=tuple(entry["column_sizes"]),
    )


def _inside(folder: Path, basename: str) -> Path:
    relative = Path(basename)
    if relative.is_absolute() or ".." in relative.parts or "\0" in basename:
        raise InputError(f"{folder / INDEX}: basename {basename!r} leaves the folder; only files inside are read")
    return folder / relative


def read_shard(shard: MdsShard, text_field: str, bytes_dtype: str) -> Iterator[Document]:
    """The documents of a shard, in order: ids as an integer array from a `tokens` column, else text.

    A `tokens` column of encoding `bytes` does not say what its integers are: they are read as `bytes_dtype` (what
    llm-foundry calls token_encoding_type, int64 unless told otherwise).
    """
    column = _column(shard, text_field)
    encoding = shard.encodings[column]
    data = _raw_bytes(shard)
    header = np.frombuffer(data, "<u4", 1) if len(data) >= 4 else np.zeros(1)
    if int(header[0]) != shard.samples or len(data) < 4 * (shard.samples + 2):
        raise InputError(f"{shard.path}: does not hold the {shard.samples} samples its index.json says; copy it again")
    offsets = np.frombuffer(data, "<u4", shard.samples + 1, offset=4).tolist()
    for number, (start, stop) in enumerate(pairwise(offsets)):
        try:
            if not start <= stop <= len(data):
                raise ValueError(f"offsets {start}..{stop} in a file of {len(data)} bytes")
            value = _value(shard, column, data[start:stop])
            if shard.columns[column] == TOKENS or encoding.startswith("ndarray"):
                yield _integers(value, encoding, bytes_dtype)
            else:
                yield value.decode("utf-8")
        except (ValueError, KeyError, IndexError) as error:
            raise InputError(f"{shard.path}: sample {number}: damaged ({error}); copy the shard again") from None


def _column(shard: MdsShard, text_field: str) -> int:
    for name in (TOKENS, text_field):
        if name in shard.columns:
            column = shard.columns.index(name)
            encoding = shard.encodings[column].split(":")[0]
            if encoding in ("bytes", "ndarray") or (encoding == "str" and name != TOKENS):
                return column
            raise InputError(
                f"{shard.path}: column {name!r} has encoding {shard.encodings[column]!r}; text must be str or bytes, "
                "tokens bytes or ndarray"
            )
    raise InputError(
        f"{shard.path}: has no column {TOKENS!r} or {text_field!r}; its columns are {', '.join(shard.columns)}: "
        "name the one to read with --text-field"
    )


def _raw_bytes(shard: MdsShard) -> bytes:
    try:
        data = shard.path.read_bytes()
    except OSError as error:
        raise InputError(f"{shard.path}: shard cannot be opened ({error.strerror}); copy the folder again") from None
    if shard.path != shard.raw:
        data = _decompress(shard, data)
    if len(data) != shard.raw_bytes:
        raise InputError(
            f"{shard.path}: holds {len(data)} bytes of samples, its index.json says {shard.raw_bytes}; copy it again"
        )
    for algorithm, expected in shard.raw_hashes.items():
        # Checksums outside the standard library (xxhash) are left to whoever needs them.
        if algorithm in hashlib.algorithms_guaranteed and not algorithm.startswith("shake"):
            found = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
            if found != expected:
                raise InputError(
                    f"{shard.path}: {algorithm} is {found}, its index.json says {expected}: altered; copy it again"
                )
    return data


def _decompress(shard: MdsShard, data: bytes) -> bytes:
    import gzip

    import zstandard

    kind = (shard.compression or "").split(":")[0]
    try:
        if kind == "zstd":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
        if kind == "gz":
            return gzip.decompress(data)
    except (zstandard.ZstdError, OSError, EOFError) as error:
        raise InputError(f"{shard.path}: damaged ({error}); copy the shard again") from None
    raise InputError(f"{shard.path}: compression {shard.compression!r} is not read; raw, zstd and gz are")


def _value(shard: MdsShard, column: int, sample: bytes) -> bytes:
    """The bytes of one column of an encoded sample."""
    variable = sum(size is None for size in shard.sizes)
    given = iter(np.frombuffer(sample, "<u4", variable).tolist())
    sizes = [next(given) if size is None else size for size in shard.sizes]
    if 4 * variable + sum(sizes) != len(sample):
        raise ValueError(f"columns of {sizes} bytes in a sample of {len(sample)}")
    start = 4 * variable + sum(sizes[:column])
    return sample[start : start + sizes[column]]


def _integers(value: bytes, encoding: str, bytes_dtype: str) -> npt.NDArray[Any]:
    kind, *fixed = encoding.split(":")
    if kind == "bytes":
        return _little_endian(value, bytes_dtype)
    place = 0
    if fixed:
        dtype = fixed[0]
    else:
        dtype, place = VALUE_DTYPES[value[0]], 1
    if len(fixed) < 2:  # a shape is stored
        ndim, log2_size = value[place] >> 2, value[place] & 3
        place += 1 + (ndim << log2_size)
    return _little_endian(value[place:], dtype)


def _little_endian(value: bytes, dtype: str) -> npt.NDArray[Any]:
    if dtype not in TOKEN_DTYPES:
        raise ValueError(f"token dtype {dtype!r} is not one of {', '.join(TOKEN_DTYPES)}")
    return np.frombuffer(value, np.dtype(dtype).newbyteorder("<"))

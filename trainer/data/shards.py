"""Token shards on disk: the manifest, cheap checks when a folder is opened, memory maps, and the full scan.

A folder holds `manifest.json`, a copy of the tokenizer, and `{train,val}/shard-00000.bin`: raw little-endian uint16 or
uint32 token ids and nothing else. The manifest says for each shard how many tokens, bytes and documents it has, its
largest id and its SHA-256, so that opening needs one `stat` per shard.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import InputError

FORMAT = "mpt-token-shards"
VERSION = 1
MANIFEST = "manifest.json"
STATE = ".prepare"  # the folder of an unfinished preparation
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
CHUNK_TOKENS = 1 << 22

_SHARD_FIELDS = {"file": str, "tokens": int, "documents": int, "max_id": int, "bytes": int, "sha256": str}
REMEDY = "prepare the data again with scripts/prepare_data.py, or copy the folder again"


@dataclass(frozen=True)
class Shard:
    """One line of the manifest: a file (path relative to the folder) and what must be true of it."""

    file: str
    tokens: int
    documents: int
    max_id: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A validated manifest.json. `splits` maps "train" and "val" to their shards in reading order. excerpt_tokens: the
    shards hold excerpts of so many tokens each, one after the other; None: a stream of documents.
    """

    folder: Path
    dtype: np.dtype[Any]
    eos_id: int
    tokenizer_sha256: str
    tokenizer_file: str
    vocab_size: int
    splits: dict[str, tuple[Shard, ...]]
    excerpt_tokens: int | None = None


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and validates DIR/manifest.json; InputError names the file, the value and the remedy."""
    if "://" in str(folder):
        raise InputError(f"{folder}: remote folders are not read; copy the shards to a local folder and name that")
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(_no_manifest(folder))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits, and deep nesting
        raise InputError(f"{path}: not readable as JSON ({error}); {REMEDY}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: format is {found!r}, expected {FORMAT!r}: this is not a folder of token shards")
    if data.get("version") != VERSION:
        raise InputError(
            f"{path}: version is {data.get('version')!r}, this program reads version {VERSION}; "
            "prepare the data again with this version's scripts/prepare_data.py"
        )
    if not isinstance(data.get("dtype"), str) or data["dtype"] not in DTYPES:
        raise InputError(f"{path}: dtype is {data.get('dtype')!r}, known are {', '.join(DTYPES)}; {REMEDY}")
    tokenizer = _field(path, data, "tokenizer", dict)
    dtype = DTYPES[data["dtype"]]
    splits = _field(path, data, "splits", dict)
    eos_id = _field(path, data, "eos_id", int)
    vocab_size = _field(path, tokenizer, "vocab_size", int, "tokenizer.")
    if not 0 <= eos_id < vocab_size:
        raise InputError(f"{path}: eos_id is {eos_id}, expected an id below vocab_size {vocab_size}; {REMEDY}")
    return Manifest(
        folder=folder,
        dtype=dtype,
        eos_id=eos_id,
        tokenizer_sha256=_field(path, tokenizer, "sha256", str, "tokenizer."),
        tokenizer_file=_plain_name(path, _field(path, tokenizer, "file", str, "tokenizer.")),
        vocab_size=vocab_size,
        splits={name: _shards(path, name, _field(path, splits, name, list, "splits."), dtype) for name in splits},
        excerpt_tokens=_excerpt_tokens(path, data),
    )


def _excerpt_tokens(path: Path, data: dict[str, Any]) -> int | None:
    if data.get("excerpt_tokens") is None:
        return None
    size: int = _field(path, data, "excerpt_tokens", int)
    if size < 1:
        raise InputError(f"{path}: excerpt_tokens is {size}, expected at least 1; {REMEDY}")
    return size


def _plain_name(path: Path, name: str) -> str:
    if Path(name).name != name or name in ("", ".") or "\0" in name:
        raise InputError(f"{path}: tokenizer.file is {name!r}, which is no file name of this folder; {REMEDY}")
    return name


def _no_manifest(folder: Path) -> str:
    if not folder.exists():
        command = f"python scripts/prepare_data.py INPUT --out {folder} --tokenizer NAME"
        return f"{folder}: there is no such folder; make it with {command}"
    if (folder / STATE).is_dir():
        return f"{folder}: an unfinished preparation; run its command (scripts/prepare_data.py) again to go on with it"
    command = f"python scripts/prepare_data.py {folder} --out DIR --tokenizer NAME"
    if (folder / "index.json").is_file() or any(folder.glob("*/index.json")):
        return f"{folder}: an MDS folder; convert it once with {command}, and name DIR"
    what = f"no token shards (there is no {MANIFEST})" if folder.is_dir() else "a file, not a folder of token shards"
    return f"{folder}: {what}; make them from text once with {command}, and name DIR"


def _field(path: Path, data: dict[str, Any], name: str, kind: type, prefix: str = "") -> Any:
    value = data.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{path}: {prefix}{name} is {value!r}, expected {kind.__name__}; {REMEDY}")
    return value


def _shards(path: Path, split: str, entries: list[Any], dtype: np.dtype[Any]) -> tuple[Shard, ...]:
    shards = []
    for i, entry in enumerate(entries):
        where = f"splits.{split}[{i}]"
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {where} is {entry!r}, expected a mapping; {REMEDY}")
        shard = Shard(**{name: _field(path, entry, name, kind, where + ".") for name, kind in _SHARD_FIELDS.items()})
        relative = Path(shard.file)
        if relative.is_absolute() or ".." in relative.parts or "\0" in shard.file:
            raise InputError(f"{path}: {where}.file is {shard.file!r}, which leaves the folder; {REMEDY}")
        if shard.tokens < 1 or shard.bytes != shard.tokens * dtype.itemsize:
            raise InputError(
                f"{path}: {where} says {shard.tokens} tokens and {shard.bytes} bytes, "
                f"which do not agree for {dtype.name}; {REMEDY}"
            )
        shards.append(shard)
    return tuple(shards)


class ShardSet:
    """One split of a folder, opened: sizes compared with the manifest, files memory-mapped when first read."""

    def __init__(self, folder: str | Path, split: str) -> None:
        self.manifest = read_manifest(folder)
        self.split = split
        if split not in self.manifest.splits:
            known = ", ".join(self.manifest.splits) or "none"
            raise InputError(f"{self.manifest.folder}: no split {split!r}; the manifest has: {known}")
        self.shards = self.manifest.splits[split]
        self.dtype = self.manifest.dtype
        self.tokens = sum(shard.tokens for shard in self.shards)
        if not self.shards:
            raise InputError(
                f"{self.manifest.folder}: split {split!r} is empty; prepare the data with a larger --val-fraction "
                "or with validation files of its own (--val)"
            )
        for shard in self.shards:
            self._check_size(shard)
        self._arrays: list[npt.NDArray[Any] | None] = [None] * len(self.shards)
        # Reading ahead warms the page cache where it can hold everything; elsewhere it only costs, many times over.
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._exceeds_memory = sum(shard.bytes for shard in self.shards) > memory // 2

    def path(self, index: int) -> Path:
        return self.manifest.folder / self.shards[index].file

    def _check_size(self, shard: Shard) -> None:
        path = self.manifest.folder / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: shard cannot be opened ({error.strerror}); {REMEDY}") from None
        if size != shard.bytes:
            word = "truncated" if size < shard.bytes else "altered"
            raise InputError(f"{path}: shard {word}: {size} bytes, the manifest says {shard.bytes}; {REMEDY}")

    def array(self, index: int) -> npt.NDArray[Any]:
        """Shard `index` as a read-only array (tokens,) of the shards' dtype, mapped from the file."""
        array = self._arrays[index]
        if array is None:
            with open(self.path(index), "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if self._exceeds_memory:
                mapped.madvise(mmap.MADV_RANDOM)
            # A plain array over the map: np.memmap would cost a microsecond at every slice.
            array = self._arrays[index] = np.frombuffer(mapped, dtype=self.dtype)
        return array

    def check_ids(self, vocab_size: int) -> None:
        """InputError when the manifest's largest id of a shard does not fit a vocabulary of `vocab_size`."""
        for index, shard in enumerate(self.shards):
            if shard.max_id >= vocab_size:
                raise InputError(
                    f"{self.path(index)}: holds token id {shard.max_id}, vocab_size is {vocab_size}; "
                    f"set vocab_size to at least {shard.max_id + 1}, or prepare the data with the model's tokenizer"
                )

    def check_tokenizer(self, sha256: str) -> None:
        """InputError when the shards were made with another tokenizer than the one with this SHA-256."""
        if sha256 != self.manifest.tokenizer_sha256:
            raise InputError(
                f"{self.manifest.folder}: the shards were made with a tokenizer of SHA-256 "
                f"{self.manifest.tokenizer_sha256[:12]}..., the configured tokenizer has {sha256[:12]}...; use "
                f"{self.manifest.folder / self.manifest.tokenizer_file}, or prepare the data with the other tokenizer"
            )

    def digest(self) -> str:
        """SHA-256 over what the split contains, in order; independent of where the folder lies."""
        content = [self.dtype.name, *((shard.tokens, shard.sha256) for shard in self.shards)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def scan(folder: str | Path, split: str, vocab_size: int, deep: bool = True) -> int:
    """Checks a split and returns its number of tokens; InputError names the shard and the place.

    deep=False compares sizes and the manifest's largest ids; deep=True also hashes every byte and reads every id.
    """
    shards = ShardSet(folder, split)
    shards.check_ids(vocab_size)
    if deep:
        for index, shard in enumerate(shards.shards):
            _scan_shard(shards, index, shard, vocab_size)
    return shards.tokens


def _scan_shard(shards: ShardSet, index: int, shard: Shard, vocab_size: int) -> None:
    digest = hashlib.sha256()
    start = 0
    for chunk in _chunks(shards, index):
        digest.update(chunk.data)
        if int(chunk.max()) >= vocab_size:
            place = int((chunk >= vocab_size).argmax())
            raise InputError(
                f"{shards.path(index)}: token {start + place} is id {int(chunk[place])}, vocab_size is {vocab_size}, "
                f"and the manifest's largest id is {shard.max_id}: the shard was altered; {REMEDY}"
            )
        start += len(chunk)
    if digest.hexdigest() != shard.sha256:
        raise InputError(
            f"{shards.path(index)}: shard altered: SHA-256 is {digest.hexdigest()[:12]}..., "
            f"the manifest says {shard.sha256[:12]}...; {REMEDY}"
        )


def _chunks(shards: ShardSet, index: int) -> Iterator[npt.NDArray[Any]]:
    """A shard from beginning to end, read rather than mapped: the maps may be set for random access."""
    with open(shards.path(index), "rb") as file:
        while data := file.read(CHUNK_TOKENS * shards.dtype.itemsize):
            yield np.frombuffer(data, shards.dtype)


def unigram_entropy(folder: str | Path, split: str) -> float:
    """Entropy of the split's token frequencies in nats per token: the loss of the best model that ignores context."""
    shards = ShardSet(folder, split)
    counts = np.zeros(max(shard.max_id for shard in shards.shards) + 1, dtype=np.int64)
    for index in range(len(shards.shards)):
        for chunk in _chunks(shards, index):
            part = np.bincount(chunk, minlength=len(counts))
            if len(part) > len(counts):
                raise InputError(f"{shards.path(index)}: holds an id above the manifest's largest, altered; {REMEDY}")
            counts += part
    p = counts[counts > 0] / shards.tokens
    return float(-(p * np.log(p)).sum())

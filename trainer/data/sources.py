"""Where documents come from: listing inputs, cutting them into pieces of work, and reading a piece's documents.

Inputs are JSON lines, Parquet, Arrow and text files (plain, .gz, .zst), MDS folders, folders and globs of all these,
and hub data sets `NAME[:CONFIG][@SPLIT]`. Reading a piece depends on nothing but the piece and the options, so pieces
can be read by any process in any order.
"""

import glob
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mpt.hub import looks_like_path
from trainer.data import mds
from trainer.data.mds import Document
from trainer.errors import InputError

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".arrow": "arrow",
         ".txt": "text", ".text": "text", ".md": "text"}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".zstd")
ZSTD_CHUNK = 1 << 16
# What `datasets.save_to_disk` writes beside its Arrow files.
NOT_DATA = ("dataset_info.json", "state.json", "dataset_dict.json")
HUB = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
ROWS = ("jsonl", "parquet", "arrow")  # kinds of files whose documents are rows of fields
T = TypeVar("T")

DOCUMENT_UNITS = ("file", "paragraph", "line")


@dataclass(frozen=True)
class Piece:
    """A run of documents in one file: bytes [start, stop) of JSON lines, row groups of Parquet, one shard of MDS.

    `size` is the piece's length in bytes of the file, for sharing out the work; stop -1 is the end of the file.
    """

    path: str
    kind: str
    validation: bool
    size: int
    start: int = 0
    stop: int = -1

    def state(self) -> list[object]:
        """What must be unchanged for earlier work on this piece to be kept."""
        path = Path(self.path) / mds.INDEX if self.kind == "mds" else Path(self.path)
        try:
            stats = [path.stat()]
            if self.kind == "mds":
                path = _mds_shards(Path(self.path))[self.start].path
                stats.append(path.stat())
        except OSError as error:
            whole = "folder" if self.kind == "mds" else "file"
            raise InputError(f"{path}: cannot be opened ({error.strerror}); copy the {whole} again") from None
        times = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        return [os.path.abspath(self.path), self.kind, self.validation, self.start, self.stop, times]


@dataclass(frozen=True)
class Reading:
    """How documents are taken out of the pieces."""

    text_field: str
    document_unit: str
    mds_dtype: str


@dataclass(frozen=True)
class InputFile:
    """A file to read, or a whole MDS folder; `size` is its bytes on disk (of an MDS folder: uncompressed)."""

    path: Path
    kind: str
    size: int


def list_files(inputs: list[str]) -> list[InputFile]:
    """The files behind all inputs, in the order given (folders and globs sorted); InputError for one without any."""
    files = []
    for name in inputs:
        for path, kind in _files(name):
            size = sum(shard.raw_bytes for shard in _mds_shards(path)) if kind == "mds" else path.stat().st_size
            files.append(InputFile(path, kind, size))
    return files


def cut_files(files: list[InputFile], validation: bool, piece_bytes: int) -> Iterator[Piece]:
    """The pieces of the files, in order, each of about `piece_bytes` or, where a file cannot be cut, larger."""
    for file in files:
        yield from _cut(file, validation, piece_bytes)


def _mds_shards(folder: Path) -> tuple[mds.MdsShard, ...]:
    index = folder / mds.INDEX
    return _read_index(folder, index.stat().st_mtime_ns if index.is_file() else 0)


@lru_cache(maxsize=8)
def _read_index(folder: Path, mtime: int) -> tuple[mds.MdsShard, ...]:
    return tuple(mds.read_index(folder))


def _files(name: str) -> list[tuple[Path, str]]:
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return [(path, _kind(path) or "text")]
    if glob.has_magic(name):
        found = []
        for match in sorted(glob.glob(name, recursive=True)):
            if os.path.isdir(match):
                found += _folder(Path(match)) if (Path(match) / mds.INDEX).is_file() else []
            else:
                found.append((Path(match), _kind(Path(match)) or "text"))
        if not found:
            raise InputError(f"{name}: no file matches")
        return found
    if HUB.fullmatch(name) and not looks_like_path(name) and not _kind(path) and path.suffix not in COMPRESSED:
        return [(file, "arrow") for file in _hub_files(name)]
    raise InputError(f"{name}: no such file or folder")


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes = suffixes[:-1]
    return KINDS.get(suffixes[-1]) if suffixes else None


def _folder(folder: Path) -> list[tuple[Path, str]]:
    if (folder / mds.INDEX).is_file():
        return [(folder, "mds")]
    splits = sorted(path.parent for path in folder.glob(f"*/{mds.INDEX}"))
    if splits:
        names = ", ".join(str(split) for split in splits)
        raise InputError(
            f"{folder}: holds MDS folders ({names}): name those to read, and give validation ones to --val"
        )
    found = []
    for path in sorted(folder.rglob("*")):
        kind = _kind(path)
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if kind and path.is_file() and path.name not in NOT_DATA and not hidden:
            found.append((path, kind))
    if not found:
        raise InputError(
            f"{folder}: no {', '.join(KINDS)} file in it (plain or {', '.join(COMPRESSED)}), no {mds.INDEX}"
        )
    return found


def _hub_files(name: str) -> list[Path]:
    """The Arrow files of a hub data set in the local cache, downloaded where they are not there yet."""
    match = HUB.fullmatch(name)
    assert match is not None
    split = match["split"] or "train"
    import datasets

    try:
        data = datasets.load_dataset(match["name"], match["config"], split=split)
    except Exception as error:  # the library raises dozens of kinds, from many layers
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(
            f"{name}: not a file or folder here, and not to be had as a hub data set NAME[:CONFIG][@SPLIT] ({reason})"
        ) from None
    return [Path(file["filename"]) for file in data.cache_files]


def _cut(file: InputFile, validation: bool, piece_bytes: int) -> Iterator[Piece]:
    path, kind, size = file.path, file.kind, file.size
    if kind == "mds":
        for number, shard in enumerate(_mds_shards(path)):
            yield Piece(str(path), kind, validation, shard.raw_bytes, number, number + 1)
        return
    if not size and path.suffix in COMPRESSED:
        raise InputError(f"{path}: has 0 bytes, which no compressed file has; copy it again or leave it out")
    if kind == "jsonl" and path.suffix not in COMPRESSED:
        for start in range(0, size, piece_bytes):
            stop = min(start + piece_bytes, size)
            yield Piece(str(path), kind, validation, stop - start, start, stop)
    elif kind == "parquet":
        yield from _cut_parquet(path, validation, piece_bytes)
    elif size:
        yield Piece(str(path), kind, validation, size)


def _cut_parquet(path: Path, validation: bool, piece_bytes: int) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as Parquet ({error}); copy it again or leave it out") from None
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= piece_bytes or group == metadata.num_row_groups - 1:
            yield Piece(str(path), "parquet", validation, size, start, group + 1)
            start, size = group + 1, 0


def read_piece(piece: Piece, reading: Reading) -> Iterator[Document]:
    """The documents of a piece in order, blank ones left out: text, or an integer array of ids (MDS `tokens`).

    InputError names the file and the line, row or sample that cannot be read.
    """
    path = Path(piece.path)
    if piece.kind == "mds":
        documents: Iterator[Document] = mds.read_shard(
            _mds_shards(path)[piece.start], reading.text_field, reading.mds_dtype
        )
    elif piece.kind == "jsonl":
        documents = (text for _, text in _read_jsonl(piece, partial(_text_of, field=reading.text_field)))
    elif piece.kind == "text":
        documents = _read_text(path, reading.document_unit)
    else:
        documents = _read_column(piece, reading.text_field)
    for document in documents:
        if len(document) and not (isinstance(document, str) and document.isspace()):
            yield document


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix in COMPRESSED:
        return io.BufferedReader(_ZstdFile(path), ZSTD_CHUNK)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """The content of a .zst file's frames, one after the other; EOFError where the file ends inside a frame.

    zstandard's own stream reader takes a truncated file for a whole one.
    """

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file = open(path, "rb")  # noqa: SIM115
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._packed, self._plain = b"", memoryview(b"")
        self._inside = True  # a frame that has not ended, or the first, which has to be there

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._packed or self._file.read(ZSTD_CHUNK)
            if not packed:
                if self._inside:
                    raise EOFError("truncated: the compressed data ends too early")
                return 0
            if not self._inside:
                self._frame = self._decompressor.decompressobj()
            self._plain = memoryview(self._frame.decompress(packed))
            self._inside = not self._frame.eof
            self._packed = b"" if self._inside else self._frame.unused_data
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_jsonl(piece: Piece, take: Callable[[object], T]) -> Iterator[tuple[int, T]]:
    """(line, take(its value)) for the lines of a piece that are not blank; lines count from 1 in the piece.

    A line belongs to the piece that holds its first byte. A ValueError of `take` is raised with the place.
    """
    path = Path(piece.path)
    with _open(path) as file:
        line_start = piece.start
        if piece.start > 0:
            file.seek(piece.start - 1)
            line_start += len(file.readline()) - 1
        number = 0
        while piece.stop < 0 or line_start < piece.stop:
            try:
                line = file.readline()
            except Exception as error:  # every decompressor has its own
                raise InputError(f"{path}: cannot be read ({error}); copy it again or leave it out") from None
            if not line:
                return
            try:
                value = (number + 1, take(json.loads(line))) if line.strip() else None
            except Exception as error:  # JSON's, UTF-8's and ours
                number += _lines_before(path, piece.start) + 1
                raise InputError(f"{path}, line {number}: {_reason(error)}; repair or remove the line") from None
            if value is not None:
                yield value
            number += 1
            line_start += len(line)


def _lines_before(path: Path, end: int) -> int:
    """Lines that start before byte `end` of a plain file, counted only for an error message."""
    if end == 0:
        return 0
    count, left = 0, end - 1
    with open(path, "rb") as file:
        while left > 0:
            chunk = file.read(min(left, 1 << 22))
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count + 1


def _text_of(row: object, field: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, expected an object with the field {field!r}")
    if field not in row:
        names = ", ".join(map(str, list(row)[:8]))
        raise ValueError(f"no field {field!r} (--text-field); the line has: {names}")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is {type(text).__name__}, expected text")
    if not text.isascii():
        text.encode("utf-8")  # a lone surrogate, which JSON can spell, is no text
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno}), which every line has to be by itself"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start})"
    if isinstance(error, UnicodeEncodeError):
        return "the text holds half of a surrogate pair, which is not Unicode text"
    return str(error)


def _read_text(path: Path, unit: str) -> Iterator[str]:
    try:
        with _open(path) as file:
            if unit == "file":
                data = file.read()
                yield data.decode("utf-8")
                return
            lines: list[bytes] = []
            for line in file:
                lines.append(line)
                if unit == "line" or not line.strip():
                    yield b"".join(lines).decode("utf-8").strip("\n")
                    lines = []
            yield b"".join(lines).decode("utf-8").strip("\n")
    except UnicodeDecodeError as error:
        # error.start counts from where the document starts, so the line is found anew.
        raise InputError(f"{path}, line {_bad_line(path)}: not UTF-8 ({error.reason}); convert the file") from None
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({error}); copy it again or leave it out") from None


def _bad_line(path: Path) -> int:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _read_column(piece: Piece, field: str) -> Iterator[str]:
    """A column of texts. The row number in an error counts from the start of the piece's row group."""
    for row, values in _read_table(piece, field):
        text = values[field]
        if not isinstance(text, str):
            raise InputError(
                f"{piece.path}: row {row} of row group {piece.start}: {field!r} is {type(text).__name__}, expected "
                "text; repair the file or leave it out"
            )
        yield text


def _read_table(piece: Piece, field: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) for the rows of a Parquet or Arrow file, counted from 0 in the piece. field: only this column."""
    import pyarrow
    import pyarrow.parquet

    try:
        if piece.kind == "parquet":
            table = pyarrow.parquet.ParquetFile(piece.path)
            columns = _columns(table.schema_arrow.names, field)
            groups = range(piece.start, table.num_row_groups if piece.stop < 0 else piece.stop)
            batches = table.iter_batches(256, row_groups=groups, columns=columns)
        else:
            stream = pyarrow.ipc.open_stream(pyarrow.memory_map(piece.path))
            columns = _columns(stream.schema.names, field)
            batches = (batch.select(columns) for batch in stream)
        row = 0
        for batch in batches:
            for values in batch.to_pylist():
                yield row, values
                row += 1
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{piece.path}: {error}; repair the file or leave it out") from None


def _columns(names: list[str], field: str | None) -> list[str]:
    if field is not None and field not in names:
        raise ValueError(f"no column {field!r} (--text-field); the columns are {', '.join(names)}")
    return names if field is None else [field]


def read_rows(file: InputFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for every line of a JSON lines file or row of a Parquet or Arrow file; the place for an error.

    Lines count from 1, rows from 0. InputError names a line that cannot be read, and a file of another kind.
    """
    piece = Piece(str(file.path), file.kind, False, file.size)
    if file.kind == "jsonl":
        for line, values in _read_jsonl(piece, _object):
            yield f"{file.path}, line {line}", values
    elif file.kind in ROWS:
        for row, values in _read_table(piece):
            yield f"{file.path}, row {row}", values
    else:
        raise InputError(f"{file.path}: holds no examples; give JSON lines (.jsonl), Parquet, or a hub data set")


def _object(row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, expected an object with an example's fields")
    return row

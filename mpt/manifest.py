"""What a checkpoint folder holds and how it is trusted: its manifest, its hashes, and a reader of its pickled index.

A checkpoint is `step-N/`: data files `__RANK_0.distcp` and the index `.metadata` of torch.distributed.checkpoint, and
our `manifest.json`, which lists size and SHA-256 of each of them. One flipped bit loads silently everywhere else.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from mpt.errors import InputError

MANIFEST = "manifest.json"
INDEX = ".metadata"
LATEST = "latest"
FORMAT, VERSION = "mpt-checkpoint", 1
_STEP = re.compile(r"step-(\d+)")
_LEFT_OVER = re.compile(rf"(step-\d+(\.damaged)?(\.old)?|{LATEST})\.tmp")

# Everything that the index of a folder of plain tensors and DTensors is made of. Tensors only: torch would unpickle
# an entry of any other kind without restrictions.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    **{
        (dcp_metadata.__name__, name): getattr(dcp_metadata, name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    **{
        ("torch", name): getattr(torch, name)
        for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
    },
}


class DamagedCheckpoint(InputError):
    """A checkpoint folder that is incomplete, altered or unsafe to read; the message names the file."""


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    step: optimizer steps behind the checkpoint. world_size: ranks that wrote it. torch: their torch version.
    fingerprint: what a run must keep to resume. model: the model's configuration. state: the run's counters.
    files: file name -> {"bytes": size, "sha256": hex digest}.
    """

    step: int
    world_size: int
    torch: str
    fingerprint: dict[str, Any]
    model: dict[str, Any]
    state: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def plain(value: Any) -> Any:
    """`value` as JSON gives it back (lists for tuples, string keys), so that saved and current ones compare equal.

    Raises TypeError for what JSON cannot hold.
    """
    return json.loads(json.dumps(value))


def write_manifest(folder: Path, manifest: Manifest, *, fsync: bool) -> None:
    """Write `manifest.json` into `folder`, with a hash of its own contents."""
    body = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    text = json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n"
    write_text(folder / MANIFEST, text, fsync=fsync)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises DamagedCheckpoint if it is missing, altered, or of a newer format.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        kind = body["format"]
        good = kind == FORMAT and body.pop("sha256") == _digest(body)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except OSError as e:
        raise _unreadable(path, e) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedCheckpoint(f"{path} is altered or truncated") from None
    if kind != FORMAT:
        raise DamagedCheckpoint(f"{path} is not a checkpoint's: its format is {kind!r}, not {FORMAT!r}")
    if not good:
        raise DamagedCheckpoint(f"{path} is altered: it does not match its own hash")
    if body["version"] != VERSION:
        raise DamagedCheckpoint(f"{path} has format version {body['version']}; this program reads {VERSION}")
    del body["format"], body["version"]
    try:
        manifest = Manifest(**body)
        complete = all(entry.keys() == {"bytes", "sha256"} for entry in manifest.files.values())
    except (TypeError, AttributeError):
        complete = False
    if not complete:
        raise DamagedCheckpoint(f"{path} lacks fields of a manifest")
    for name in manifest.files:
        if Path(name).name != name:
            raise DamagedCheckpoint(f"{path} names a file outside its folder: {name!r}")
    if INDEX not in manifest.files:
        raise DamagedCheckpoint(f"{path} does not list {INDEX}")
    return manifest


def _unreadable(path: Path, error: OSError) -> InputError:
    """Not a DamagedCheckpoint: a file system that fails now may give a good file later, so nothing goes back a step."""
    return InputError(
        f"{path} cannot be read ({error.strerror}); nothing was changed: try again once it can, "
        f"or move {path.parent} away to go on from the checkpoint before it"
    )


def file_entry(path: Path) -> dict[str, Any]:
    """A file's line in the manifest: {"bytes": size, "sha256": hex digest}."""
    with path.open("rb") as f:
        return {"bytes": os.fstat(f.fileno()).st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def check_files(folder: Path, manifest: Manifest, *, part: int = 0, parts: int = 1, hashes: bool = True) -> None:
    """Compare all sizes, and the SHA-256 of every `parts`-th file from `part` on, with the manifest.

    Ranks divide the reading by passing their rank and the world size. hashes=False compares sizes only, which reads
    nothing. Raises DamagedCheckpoint naming the file.
    """
    for i, (name, entry) in enumerate(sorted(manifest.files.items())):
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise DamagedCheckpoint(f"{path} has {size:,} bytes instead of {entry['bytes']:,}")
            if hashes and i % parts == part and file_entry(path) != entry:
                raise DamagedCheckpoint(f"{path} is altered: its SHA-256 is not the manifest's")
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path} is missing") from None
        except OSError as e:
            raise _unreadable(path, e) from None


def read_index(folder: Path, manifest: Manifest) -> dcp_metadata.Metadata:
    """The index of a checkpoint, unpickled with an allow-list: it can name tensors and places in listed files only.

    Raises DamagedCheckpoint for anything else, before any of it is used.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as f:
            index = _IndexReader(f).load()
        files = {info.relative_path for info in index.storage_data.values()}
        tensors = index.state_dict_metadata.values()
        tensors_only = all(type(t) is dcp_metadata.TensorStorageMetadata for t in tensors)
        transformed = any(info.transform_descriptors for info in index.storage_data.values())
    except Exception as e:
        # A crafted pickle can raise anything from the objects that it is allowed to build.
        raise DamagedCheckpoint(f"{path} is refused: {e}") from None
    if (
        type(index) is not dcp_metadata.Metadata
        or not tensors_only
        or transformed
        or not files <= manifest.files.keys()
    ):
        raise DamagedCheckpoint(f"{path} is refused: it describes something other than tensors in the listed files")
    return index


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every committed checkpoint under `folder`, newest first; whether they are good is not asked."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
    return sorted(found, reverse=True)


def left_over(folder: Path) -> list[Path]:
    """What a killed run left half written or half deleted under `folder`; other files are none of ours."""
    return [path for path in folder.iterdir() if _LEFT_OVER.fullmatch(path.name)]


def is_run(path: Path) -> bool:
    """Whether `find` would find a checkpoint at this folder, or say how one is damaged."""
    folders = (path, path / "checkpoints")
    return (path / MANIFEST).is_file() or bool(_STEP.fullmatch(path.name)) or any(map(list_steps, folders))


def find(path: Path | str) -> Path:
    """The checkpoint folder that `path` means: itself, or the latest of a run folder or of its `checkpoints/`.

    Raises InputError if there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    if _STEP.fullmatch(path.name) and path.is_dir():
        raise DamagedCheckpoint(f"{path / MANIFEST} is missing: not a checkpoint of this program, or not a whole one")
    for folder in (path, path / "checkpoints"):
        steps = list_steps(folder)
        if steps:
            try:
                latest = (folder / LATEST).read_text().strip()
            except (OSError, UnicodeDecodeError):
                latest = ""
            # Read from the listing, never joined from the text: that could point anywhere.
            return next((p for _, p in steps if p.name == latest), steps[0][1])
    raise InputError(f"no checkpoint at {path}: expected a step-N folder, a run folder, or a Hugging Face directory")


def write_text(path: Path, text: str, *, fsync: bool) -> None:
    """Write a small file whole or not at all: a temporary file, then a rename over `path`."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # it may be a link: what that leads to stays as it is
    with temporary.open("x", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        if fsync:
            os.fsync(f.fileno())
    temporary.replace(path)
    if fsync:
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(paths: Iterable[Path]) -> None:
    """Delete folders or files, each under a .tmp name first: one that is half deleted never looks like a checkpoint."""
    for path in list(paths):
        doomed = path if path.suffix == ".tmp" else path.with_name(path.name + ".old.tmp")
        if doomed != path:
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink(missing_ok=True)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

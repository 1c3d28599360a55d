"""The weights in a training run's checkpoint, `step-N/`: found through its index, read shard by shard."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from mpt.errors import InputError
from mpt.initialize import is_adapter, plain_name
from mpt.manifest import INDEX, DamagedCheckpoint, check_files, find, read_index, read_manifest
from mpt.tensor_files import Stored, load_archive

PREFIX = "model."  # beside it: optim., which is of no use to a model

# A part of a tensor: its first row, the row after its last, the file, and where in that it begins and how long it is.
Part = tuple[int, int, Path, int, int]


def read_step_folder(path: Path, *, check_hashes: bool) -> tuple[Path, dict[str, Stored], dict[str, Any]]:
    """(the step-N folder, its model's tensors by name, the model's configuration).

    path: a step-N folder, or a run's folder: its latest. check_hashes: compare every file with the manifest, which
    reads all of it; sizes are compared in any case. Raises InputError, a DamagedCheckpoint where it is that.
    """
    folder = find(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes=check_hashes)
    index = read_index(folder, manifest)
    if any(map(is_adapter, index.state_dict_metadata)):
        raise InputError(
            f"{folder} holds LoRA adapters, not the model that they were trained on; give the run's export/, which is "
            "written when it is done and has both, merged"
        )
    sizes = {file: entry["bytes"] for file, entry in manifest.files.items()}
    try:
        tensors = {
            plain_name(name.removeprefix(PREFIX)): _stored(folder, index, name, sizes)
            for name in index.state_dict_metadata
            if name.startswith(PREFIX)
        }
    except InputError:
        raise
    except Exception as error:  # what the allow-list built may be of any form inside
        raise DamagedCheckpoint(f"{folder / INDEX} is refused: {type(error).__name__}: {error}") from None
    return folder, tensors, manifest.model


def _stored(folder: Path, index: Metadata, name: str, sizes: dict[str, int]) -> Stored:
    entry = index.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)  # read_index has seen to it
    shape, dtype = tuple(entry.size), entry.properties.dtype
    parts: list[Part] = []
    for chunk in entry.chunks:
        place = index.storage_data.get(MetadataIndex(name, chunk.offsets))
        whole_rows = not any(chunk.offsets[1:]) and tuple(chunk.sizes[1:]) == shape[1:]
        end = 0 if place is None else place.offset + place.length
        if place is None or not whole_rows or not 0 <= place.offset <= end <= sizes[place.relative_path]:
            raise DamagedCheckpoint(f"{folder}: its index does not say where {name} is, row by row")
        rows = (chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) if shape else (0, 1)
        parts.append((*rows, folder / place.relative_path, place.offset, place.length))
    parts.sort(key=lambda part: part[:2])
    ends = [0, *(part[1] for part in parts)]
    if [part[0] for part in parts] != ends[:-1] or ends[-1] != (shape[0] if shape else 1):
        raise DamagedCheckpoint(f"{folder}: its index does not hold every row of {name} once")
    floating = dtype if dtype.is_floating_point else None
    return Stored(shape, floating, partial(_rows, tuple(parts), shape, dtype))


def _rows(parts: tuple[Part, ...], shape: tuple[int, ...], dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Rows start..stop (as many as there are), from the parts that hold some of them."""
    read = []
    for first, end, path, offset, length in parts:
        if first < stop and start < end:
            with path.open("rb") as file:
                file.seek(offset)
                tensor = load_archive(path, io.BytesIO(file.read(length)))
            if not isinstance(tensor, Tensor) or tensor.shape != (end - first, *shape[1:]) or tensor.dtype != dtype:
                raise DamagedCheckpoint(f"{path} does not hold what the index says at byte {offset}")
            read.append(tensor[max(start - first, 0) : stop - first])
    return read[0] if len(read) == 1 else torch.cat(read) if read else torch.empty(0, *shape[1:], dtype=dtype)

"""Model and optimizer as one flat dict of named tensors, and its way through torch.distributed.checkpoint.

Names: `model.NAME` for parameters and persistent buffers, `optim.NAME.SLOT` for optimizer state (SLOT: exp_avg, ...).
"""

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from mpt.initialize import is_adapter
from trainer.errors import InputError

Shape = tuple[int, ...]


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Parameter -> name, each parameter once (tied ones under their first name), in the model's order."""
    names: dict[nn.Parameter, str] = {}
    # state_dict, not named_parameters: its hooks bring FSDP's parameters back to shards after a forward alone.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            names.setdefault(tensor, name)
    return names


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """All that a checkpoint holds, sharing storage with model and optimizer. DTensors stay DTensors.

    Of a model with adapters these alone: its base does not change, and is in the checkpoint that it came from.
    Hyperparameters are not state: the configuration has them. Raises ValueError for optimizer state that is not a
    tensor, or is a bare local part of a sharded parameter's.
    """
    parameters = parameter_names(model)
    tensors = {f"model.{name}": parameter.detach() for parameter, name in parameters.items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter):
            tensors[f"model.{name}"] = tensor
    if any(map(is_adapter, tensors)):
        tensors = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
    for parameter, slots in optimizer.state.items() if optimizer is not None else ():
        for slot, value in slots.items():
            name = f"optim.{parameters[cast(nn.Parameter, parameter)]}.{slot}"
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} is a {type(value).__name__}; optimizer state has to be tensors to be saved")
            if isinstance(parameter, DTensor) and value.dim() and not isinstance(value, DTensor):
                raise ValueError(f"{name} is a local tensor of a sharded parameter; make it with torch.zeros_like")
            tensors[name] = value
    return tensors


def whole_parameters(model: nn.Module) -> list[tuple[str, partial[Tensor]]]:
    """(name, function that gathers it whole), each parameter once. All ranks call the functions in the same order."""
    return [(name, partial(_whole, parameter.detach())) for parameter, name in parameter_names(model).items()]


def write(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None, *, fsync: bool) -> None:
    """Write `tensors` into `folder`: `__RANK_0.distcp` per rank, and `.metadata`. Collective.

    Raises CheckpointException, on all ranks, if any rank failed.
    """
    _accept_one_process()
    dcp.save(tensors, storage_writer=_Writer(folder, fsync), process_group=group)


def read(
    folder: Path,
    index: Metadata,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Read a verified folder into the model in place, and into the optimizer if one is given. Collective.

    Each rank reads its parts of DTensors only, at any world size. Raises InputError, before anything is changed, if
    names or shapes are not the model's; and if reading fails.
    """
    tensors = named_state(model, None)
    compare_shapes(folder, {n.removeprefix("model."): tuple(t.shape) for n, t in tensors.items()}, model_shapes(index))
    slots = list(_slots(index, model, optimizer)) if optimizer is not None else []
    tensors |= {name: tensor for _, _, name, tensor in slots}
    _accept_one_process()
    try:
        dcp.load(tensors, storage_reader=_Reader(folder, index), process_group=group)
    except CheckpointException as e:
        raise InputError(f"checkpoint {folder} could not be loaded: {reason(e)}") from e
    if optimizer is not None:
        optimizer.state.clear()
        for parameter, slot, _, tensor in slots:
            optimizer.state[parameter][slot] = tensor


def model_shapes(index: Metadata) -> dict[str, Shape]:
    """Name -> shape of the parameters and buffers in a checkpoint."""
    entries = _entries(index).items()
    return {name.removeprefix("model."): tuple(entry.size) for name, entry in entries if name.startswith("model.")}


def compare_shapes(path: Path | str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise InputError with a table of the names whose shapes differ between a model and the checkpoint at `path`."""
    names = {**expected, **found}
    rows = [
        (name, str(expected.get(name, "-")), str(found.get(name, "missing")))
        for name in names
        if expected.get(name) != found.get(name)
    ]
    if not rows:
        return
    shown = [("name", "this model", "checkpoint"), *rows[:20]]
    width = [max(len(row[i]) for row in shown) for i in range(3)]
    table = "".join(f"\n  {a:{width[0]}}  {b:{width[1]}}  {c}" for a, b, c in shown)
    more = f"\n  and {len(rows) - 20} more" if len(rows) > 20 else ""
    raise InputError(
        f"checkpoint {path} does not fit the model: {len(rows)} of {len(names)} tensors differ{table}{more}\n"
        "set the model section to the checkpoint's shapes, or choose another checkpoint"
    )


def reason(error: BaseException) -> str:
    """An error in one line, without the traces that torch.distributed.checkpoint collects from the ranks."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"{reason(e)} (process {rank})" for rank, (e, _) in error.failures.items())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


class _Writer(dcp.FileSystemWriter):
    """torch's writer, one file per rank, with the cause of a failed write in place of the zip library's complaint."""

    def __init__(self, folder: Path, fsync: bool) -> None:
        # No copy-ahead: it would issue CUDA work from the background thread for tensors that are on the host already.
        super().__init__(folder, sync_files=fsync, per_thread_copy_ahead=0)

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as e:
            raise _cause(e) from None

    def storage_meta(self) -> StorageMeta:
        # Without the path: the folder is renamed afterwards.
        return StorageMeta()


class _Reader(dcp.FileSystemReader):
    """torch's reader, given an index that was read with the allow-list: torch itself never unpickles one."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


def _slots(
    index: Metadata, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[nn.Parameter, str, str, Tensor]]:
    """(parameter, slot, name, tensor to read it into) of all optimizer state in a checkpoint: the optimizer's own where
    it has one, so that no state is held twice.
    """
    by_name = {name: parameter for parameter, name in parameter_names(model).items()}
    on_device = {p: g.get("fused") or g.get("capturable") for g in optimizer.param_groups for p in g["params"]}
    for full_name, entry in _entries(index).items():
        if not full_name.startswith("optim."):
            continue
        name, _, slot = full_name.removeprefix("optim.").rpartition(".")
        parameter = by_name.get(name)
        if parameter is None or parameter not in on_device:
            raise InputError(f"the checkpoint has optimizer state for {name}, which this run does not train")
        dtype, own = entry.properties.dtype, optimizer.state.get(parameter, {}).get(slot)
        if own is not None and own.shape == entry.size and own.dtype == dtype:
            yield parameter, slot, full_name, own
        elif not entry.size:
            # A count of steps: torch keeps it where the update that reads it runs.
            device = parameter.device if on_device[parameter] else torch.device("cpu")
            yield parameter, slot, full_name, torch.empty((), dtype=dtype, device=device)
        elif entry.size == parameter.shape:
            yield parameter, slot, full_name, torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            raise InputError(f"{full_name} has shape {tuple(entry.size)}, its parameter {tuple(parameter.shape)}")


def _entries(index: Metadata) -> dict[str, TensorStorageMetadata]:
    return cast(dict[str, TensorStorageMetadata], index.state_dict_metadata)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _cause(error: BaseException) -> BaseException:
    """The OSError behind an error, if any: torch reports a full disk as an unexpected position in a zip file."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def _accept_one_process() -> None:
    if not dist.is_initialized():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

"""Processes, the device mesh, and how a model is laid over it: activation checkpointing, compilation, FSDP2."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from mpt import MptForCausalLM
from mpt.context import ContextGroup
from trainer.errors import InputError

M_MMAP_THRESHOLD = -3  # of glibc's mallopt: from which size on a piece has pages of its own


@dataclass(frozen=True)
class FsdpConfig:
    """How parameters, gradients and optimizer state are divided among ranks.

    replicate: number of groups that each hold the whole model, sharded inside the group (HSDP). It divides the
        world size; 1 shards over all ranks.
    reshard_after_forward: free a block's gathered weights after its forward and gather them again for the backward.
        False saves that second gather and costs the weights' memory.
    reduce_dtype: dtype in which gradients are summed over ranks.
    reduce_every_microbatch: sum gradients over ranks after every micro-batch. False does so once per step, and while
        micro-batches accumulate each rank holds the whole model's gradients in reduce_dtype; a large model needs True.
    cpu_offload: keep shards, gradients and optimizer state in host memory (CUDA only).
    """

    replicate: int = 1
    reshard_after_forward: bool = True
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    reduce_every_microbatch: bool = False
    cpu_offload: bool = False


@dataclass(frozen=True)
class World:
    """This process among the others. `mesh` is FSDP's: 1-D (shard) or 2-D (replicate, shard).

    context: the neighbouring ranks with which this one shares sequences; None where it has its own. They shard the
    model too: context is the innermost dimension of replicate x shard x context, and `mesh` has the last two as one.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh
    context: ContextGroup | None = None

    @property
    def data_rank(self) -> int:
        """Which part of a global batch this rank reads: equal for ranks that share sequences."""
        return self.rank if self.context is None else self.rank // self.context.size

    @property
    def data_size(self) -> int:
        """The number of parts."""
        return self.size if self.context is None else self.size // self.context.size

    @property
    def counts(self) -> bool:
        """Whether this rank is the one, of those that share its sequences, that counts what all of them know."""
        return self.context is None or self.context.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over ranks, in float64, over the CPU backend: no device is waited for."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank brings an error: its own where it has one, else the first rank's that has."""
        errors = self.gather(str(error) if error else None)
        if error:
            raise error
        for rank, text in enumerate(errors):
            if text:
                raise InputError(f"{text} (process {rank})")


def world_size() -> int:
    """The number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def choose_device(name: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """The device of this process; one GPU per local rank.

    Raises InputError if CUDA is asked for and absent, or if there are more processes than GPUs.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("device=cuda, but torch sees no GPU; set device=cpu or install a CUDA build of torch")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this node has no GPU of its own: there are {torch.cuda.device_count()}; "
            f"start torchrun with --nproc-per-node={torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


def check_sizes(world_size: int, fsdp_config: FsdpConfig, context_parallel_size: int) -> None:
    """Raises InputError unless the processes make replicate x shard x context."""
    replicate, context = fsdp_config.replicate, context_parallel_size
    for name, size in (("fsdp_config.replicate", replicate), ("context_parallel_size", context)):
        if size < 1 or world_size % size:
            raise InputError(f"{name}={size} does not divide the {world_size} processes; choose a divisor of it")
    if world_size % (replicate * context):
        raise InputError(
            f"fsdp_config.replicate={replicate} and context_parallel_size={context} need a multiple of "
            f"{replicate * context} processes, and there are {world_size}; lower one of them, or start more processes"
        )


@contextlib.contextmanager
def join_world(
    device_name: Literal["auto", "cpu", "cuda"],
    fsdp_config: FsdpConfig,
    timeout_s: float,
    context_parallel_size: int = 1,
) -> Iterator[World]:
    """Initialise torch.distributed (gloo for CPU tensors, NCCL for CUDA ones), also for one process without torchrun.

    timeout_s: seconds after which a collective that a rank never joins is an error. context_parallel_size: ranks that
    share each sequence.
    """
    size, rank = world_size(), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(device_name, local_rank)
    check_sizes(size, fsdp_config, context_parallel_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # torchrun keeps one store for all attempts: without a prefix a restart would read the dead ranks'
            # addresses. On several nodes the counts may differ; docs/training.md says what to set there.
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        shard = size // fsdp_config.replicate
        if fsdp_config.replicate > 1:
            mesh = init_device_mesh(device.type, (fsdp_config.replicate, shard), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        context = None
        if (n := context_parallel_size) > 1:
            groups = init_device_mesh(device.type, (size // n, n), mesh_dim_names=("data", "context"))
            context = ContextGroup(groups.get_group("context"))
        yield World(rank, size, local_rank, device, mesh, context)
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End one of several processes at once, without Python's own end.

    DTensor caches layouts, and with them FSDP's mesh: the group that is destroyed lives on, its gloo threads too, and
    where one lets go of a tensor while Python ends, the process aborts.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def shard_model(model: MptForCausalLM, mesh: DeviceMesh, config: FsdpConfig, *, bf16: bool) -> None:
    """Apply FSDP2 in place: each block its own group; embeddings, final norm and head together in the root's.

    The root keeps wte because lm_head is tied to it: a group of its own would leave the head with a sharded weight.
    bf16: compute in bf16, with fp32 parameters, gradients and optimizer state.
    """
    reduce_dtype = torch.float32 if config.reduce_dtype == "fp32" else torch.bfloat16
    precision = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        if bf16
        else MixedPrecisionPolicy(reduce_dtype=reduce_dtype if config.reduce_dtype != "fp32" else None)
    )
    offload = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()
    blocks = list(model.transformer.blocks)
    for i, block in enumerate(blocks):
        # The backward wants the last block at once: freeing it would gather it twice in a row.
        reshard = config.reshard_after_forward and i < len(blocks) - 1
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=False)


def synchronise_gradients(model: MptForCausalLM, on: bool) -> None:
    """Whether the next backward sums gradients over ranks, or only adds them up on each."""
    cast(FSDPModule, model).set_requires_gradient_sync(on)


def compile_blocks(model: MptForCausalLM) -> None:
    """torch.compile each block in place: the blocks are alike, so one compilation serves all."""
    for block in model.transformer.blocks:
        block.compile()


def give_back_freed_memory() -> None:
    """Have glibc return freed tensors of 4 MiB and more to the system, unless MALLOC_MMAP_THRESHOLD_ says otherwise.

    It learns to keep pieces of up to 32 MiB for the next of their kind. Gathered weights come and go between
    activations that stay, and leave holes that fit nothing: resident memory grew to 1.8 times what a run on a CPU used.
    This costs 3 to 10 % of a step's CPU time. Other C libraries are left as they are.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 << 20)


def materialize(model: nn.Module, device: torch.device, *, cpu_offload: bool) -> None:
    """Give a model on meta (uninitialised) storage on its device: the shards only, once it is sharded."""
    model.to_empty(device="cpu" if cpu_offload else device)

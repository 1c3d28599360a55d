"""What a run will take before it starts: parameters, tokens, FLOPs, and the memory of one rank by kind."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpt import MptConfig
from mpt.config import count_parameters, parameter_shapes
from mpt.context import deal, slopes_of
from trainer.metrics import flops_per_token

if TYPE_CHECKING:
    from trainer.config import Resolved, TrainConfig

GIB = 2**30
CPU_TOKENS = 4096  # of a micro-batch: more brings no speed on a CPU, only memory
DEVICE_SHARE = 0.92  # of a GPU's memory that the estimate may fill; the rest is CUDA's context and fragmentation
FP32 = 4
LOSS_CHUNK = {"cpu": 2**24, "cuda": 2**28}  # logits at once, as kernels.linear_cross_entropy chooses them


@dataclass(frozen=True)
class Plan:
    """A run in numbers. `memory`: bytes on one rank by kind; `host_memory`: the same in host memory (cpu_offload).
    `context`: ranks that share a sequence; `context_balance`: the most attention work expected of one over their mean.
    `notes`: what a reader should know before starting it.
    """

    name: str
    run_folder: str
    parameters: int
    steps: int
    tokens: int
    tokens_per_step: int
    flops_per_token: float
    batch: int
    world_size: int
    replicate: int
    context: int
    context_balance: float
    micro_batch: int
    accumulation: int
    seq_len: int
    memory: dict[str, int]
    host_memory: dict[str, int]
    notes: tuple[str, ...]

    @property
    def total_memory(self) -> int:
        """Bytes of device memory on one rank."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        groups = f"{self.replicate} x " if self.replicate > 1 else ""
        shared = f" x {self.context}" if self.context > 1 else ""
        processes = f"{groups}{self.world_size // self.replicate // self.context}{shared} processes"
        whole = self.tokens_per_step == self.batch * self.seq_len
        length = f"{self.seq_len:,}" if whole else f"up to {self.seq_len:,}, on average"
        per_parameter, flops = self.tokens / self.parameters, self.flops_per_token
        rows = [
            ("run", f"{self.name} -> {self.run_folder}"),
            ("parameters", f"{self.parameters:,}"),
            ("length", f"{self.steps:,} steps, {self.tokens:,} tokens ({per_parameter:.3g} per parameter)"),
            ("step", f"{self.batch:,} sequences of {length} = {self.tokens_per_step:,} tokens"),
            ("", f"{processes} x micro-batch {self.micro_batch} x {self.accumulation} accumulated"),
            *self._context_row(),
            ("compute", f"{_si(flops)}FLOPs per token, {flops * self.tokens:.3g} FLOPs in all"),
            ("memory", "of one process, estimated:"),
        ]
        kinds = [*self.memory.items(), *((f"{kind} (host)", size) for kind, size in self.host_memory.items())]
        rows += [("", f"{_bytes(size):>9}  {kind}") for kind, size in kinds]
        rows.append(("", f"{_bytes(self.total_memory):>9}  in all" + (" on the device" if self.host_memory else "")))
        rows += [("note", text) for text in self.notes]
        return "\n".join(f"{name:<14}{text}".rstrip() for name, text in rows)

    def _context_row(self) -> list[tuple[str, str]]:
        if self.context == 1:
            return []
        tokens, ratio = _ceil(self.seq_len, self.context), self.context_balance
        share = f"{self.context} processes share each sequence, {tokens:,} tokens each"
        return [("", f"{share}; the busiest has {ratio:.2f} x the mean attention")]


def plan(config: "TrainConfig", resolved: "Resolved", world_size: int) -> Plan:
    """The run in numbers; the memory is what this implementation keeps, see `memory`."""
    device = memory(config, resolved.model_config, world_size, resolved.micro_batch)
    context, slopes = config.context_parallel_size, slopes_of(resolved.model_config)
    host: dict[str, int] = {}
    if config.fsdp_config.cpu_offload:
        host = {kind: device.pop(kind) for kind in ("weights", "gradients", "optimizer state")}
    return Plan(
        name=config.run_name,
        run_folder=str(resolved.run_folder),
        parameters=count_parameters(resolved.model_config),
        steps=resolved.steps,
        tokens=resolved.steps * resolved.tokens_per_step,
        tokens_per_step=resolved.tokens_per_step,
        flops_per_token=flops_per_token(resolved.model_config, config.max_seq_len),
        batch=config.global_train_batch_size,
        world_size=world_size,
        replicate=config.fsdp_config.replicate,
        context=context,
        context_balance=deal(config.max_seq_len, context, slopes)[1] if context > 1 else 1.0,
        micro_batch=resolved.micro_batch,
        accumulation=resolved.accumulation,
        seq_len=config.max_seq_len,
        memory=device,
        host_memory=host,
        notes=tuple(_notes(config, resolved, sum(device.values()))),
    )


def _notes(config: "TrainConfig", resolved: "Resolved", device_bytes: int) -> Iterator[str]:
    yield from resolved.notes
    if resolved.warmup_steps >= min(resolved.steps, resolved.decay_steps):
        yield f"scheduler.t_warmup={config.scheduler.t_warmup} covers the whole run: optimizer.lr is not reached"
    if resolved.device_bytes is not None and device_bytes > resolved.device_bytes:
        yield (
            f"the estimate is above the device's {_bytes(resolved.device_bytes)}: use more processes, "
            "activation_checkpointing=full, a smaller device_train_microbatch_size, context_parallel_size or "
            "fsdp_config.cpu_offload=true"
        )


def memory(config: "TrainConfig", model_config: MptConfig, world_size: int, micro_batch: int) -> dict[str, int]:
    """Bytes that one rank holds at the fullest moment of a step, by kind.

    weights, gradients, optimizer state: fp32 shards. gathered weights: the root (embedding, final norm, head) and two
    blocks (in use, and fetched ahead) in the compute dtype, or all blocks without reshard_after_forward. unreduced
    gradients: the root's and one block's; with accumulation the whole model's, unless ranks sum after every
    micro-batch. activations: what every block keeps for the backward. block: one block's recomputation and the
    temporaries of its backward. keys of the group: with context_parallel_size, keys and values of whole sequences, kept
    by every block, or with activation checkpointing by one; their gradients, the sum of these, and what is sent. loss:
    a chunk of logits, and the head's gradient summed in fp32. margin: 5 %.
    """
    c, fsdp = model_config, config.fsdp_config
    width = 2 if config.precision == "amp_bf16" else FP32
    reduce_width = FP32 if config.precision == "fp32" or fsdp.reduce_dtype == "fp32" else 2
    shard = world_size // fsdp.replicate
    n = count_parameters(c)
    block = sum(math.prod(shape) for name, shape in parameter_shapes(c).items() if ".blocks.0." in name)
    root = n - c.n_layers * block
    context = config.context_parallel_size
    tokens = micro_batch * _ceil(config.max_seq_len, context)
    accumulates = (
        config.global_train_batch_size > micro_batch * (world_size // context) and not fsdp.reduce_every_microbatch
    )
    kept_blocks = min(2, c.n_layers) if fsdp.reshard_after_forward else c.n_layers
    states = 1 if config.optimizer.name == "decoupled_lionw" else 2
    per_block = saved_per_block(c, tokens, width)
    recomputed = per_block["none"] - per_block[config.activation_checkpointing]

    out = {
        "weights": _ceil(n, shard) * FP32,
        "gradients": _ceil(n, shard) * FP32,
        "optimizer state": _ceil(n, shard) * FP32 * states,
        "gathered weights": width * (root + kept_blocks * block),
        "unreduced gradients": n * reduce_width if accumulates else width * root + (width + reduce_width) * block,
        "activations": c.n_layers * per_block[config.activation_checkpointing] + 3 * tokens * c.d_model * width,
        "one block's work": recomputed + _backward_temporaries(c, tokens, width),
        "loss": _loss(c, tokens, width, "cpu" if config.device == "cpu" else "cuda"),
    }
    if context > 1:
        keys = 2 * micro_batch * config.max_seq_len * c.kv_heads * c.d_head * width
        out["keys of the group"] = keys * (3 + (c.n_layers if config.activation_checkpointing == "none" else 1))
    out["margin"] = sum(out.values()) // 20
    return out


def saved_per_block(c: MptConfig, tokens: int, width: int) -> dict[str, int]:
    """Bytes that one block keeps for its backward over `tokens` tokens of `width` bytes, by activation checkpointing.

    none: both norms' input and output (their statistics in fp32), q k v, attention's output and LSE, the MLP's
    pre-activation; clipping and the norms of q and k keep their input too. full: the block's input.
    selective: the block's input, attention's output and LSE.
    """
    qkv = (c.n_heads + 2 * c.kv_heads) * c.d_head
    attention = tokens * (c.n_heads * c.d_head * width + c.n_heads * FP32)
    extra = (qkv if c.attn_config.clip_qkv else 0) + ((qkv - c.kv_heads * c.d_head) if c.attn_config.qk_ln else 0)
    dropout = 2 * tokens * c.d_model if c.resid_pdrop else 0  # masks, one byte each
    statistics = 2 * 2 * FP32 * tokens
    rest = tokens * width * (4 * c.d_model + qkv + extra + c.d_ffn) + statistics + dropout
    block_input = tokens * c.d_model * width
    return {"none": rest + attention, "full": block_input, "selective": block_input + attention}


def choose_micro_batch(
    config: "TrainConfig", model_config: MptConfig, world_size: int, device_bytes: int | None
) -> int:
    """Sequences per forward for device_train_microbatch_size=auto: a divisor of each rank's share of the batch.

    device_bytes: the GPU's memory; the largest that the estimate of `memory` fits into, at least 1. None: a CPU; the
    largest of up to 4,096 tokens.
    """
    context = config.context_parallel_size
    largest_first = divisors(config.global_train_batch_size * context // world_size)[::-1]
    if device_bytes is None:
        return next((n for n in largest_first if n * config.max_seq_len <= CPU_TOKENS * context), 1)
    for n in largest_first:
        needed = memory(config, model_config, world_size, n)
        if config.fsdp_config.cpu_offload:
            needed = {k: v for k, v in needed.items() if k not in ("weights", "gradients", "optimizer state")}
        if sum(needed.values()) <= DEVICE_SHARE * device_bytes:
            return n
    return 1


def divisors(number: int) -> list[int]:
    """Every divisor of `number`, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def _backward_temporaries(c: MptConfig, tokens: int, width: int) -> int:
    """The largest set of gradients alive at once inside a block: the MLP's hidden width, or attention's q k v."""
    qkv = (c.n_heads + 2 * c.kv_heads) * c.d_head
    return tokens * width * max(2 * c.d_ffn, 2 * qkv + 2 * c.d_model) + tokens * width * c.d_model


def _loss(c: MptConfig, tokens: int, width: int, device_type: str) -> int:
    """A chunk of logits in fp32 and the compute dtype; the head's gradient likewise: the sum, a chunk's, the result."""
    chunk = min(tokens, max(1, LOSS_CHUNK[device_type] // c.vocab_size))
    head = c.vocab_size * c.d_model
    narrow = 0 if width == FP32 else width
    return chunk * c.vocab_size * (FP32 + narrow) + head * (FP32 + 2 * narrow) + 2 * tokens * c.d_model * width


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _bytes(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"


def _si(value: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "

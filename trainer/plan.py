"""What a run will take before it starts: parameters, tokens, FLOPs, and the memory of one process by kind."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mpt import MptConfig
from mpt.config import count_parameters, parameter_shapes
from mpt.context import deal, slopes_of
from trainer.lora import LoraConfig, count_adapters, target_shapes
from trainer.metrics import flops_per_token
from trainer.optim import OFFLOAD_PIECE
from trainer.quantized import stored_bytes

if TYPE_CHECKING:
    from trainer.config import Resolved, TrainConfig

GIB = 2**30
CPU_TOKENS = 4096  # of a micro-batch: more brings no speed on a CPU, only memory
MANY_EPOCHS = 100  # passes over the data above which a model learns it by heart
DEVICE_SHARE = 0.92  # of a GPU's memory that the estimate may fill; the rest is CUDA's context and fragmentation
FP32 = 4
GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GiB of those that there are
LOSS_CHUNK = {"cpu": 2**26, "cuda": 2**29}  # bytes of logits at once, as kernels.linear_cross_entropy chooses them
STATE = "optimizer state"
SHARDS = ("weights", "gradients", STATE)  # the kinds that cpu_offload moves
MLP_CHUNK = 8192  # tokens, as a setting to propose: enough for matrix products that fill a GPU


@dataclass(frozen=True)
class Plan:
    """A run in numbers. `memory`: bytes on one rank by kind; `host_memory`: the same in host memory (cpu_offload).
    `adapters`: parameters of LoRA's, where these train alone. `fits`: into which GPU, where that is known.
    `context`: ranks that share a sequence; `context_balance`: the most attention work expected of one over their mean.
    `epochs`: passes over the training split, of a mix over all together; None where it was not opened.
    `notes`: what a reader should know before starting it. `stages`: of the length curriculum, (end in steps, length).
    `less`: a setting that is not used -> the device's memory with it, where that saves at least 2 %.
    """

    name: str
    run_folder: str
    parameters: int
    adapters: int | None
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
    fits: str
    notes: tuple[str, ...]
    epochs: float | None = None
    stages: tuple[tuple[int, int], ...] = ()
    less: dict[str, int] = field(default_factory=dict)

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
        epochs = "" if self.epochs is None else f", {self.epochs:,.3g} epochs"
        rows = [
            ("run", f"{self.name} -> {self.run_folder}"),
            ("parameters", f"{self.parameters:,}"),
            *self._adapters_row(),
            ("length", f"{self.steps:,} steps, {self.tokens:,} tokens ({per_parameter:.3g} per parameter){epochs}"),
            ("step", f"{self.batch:,} sequences of {length} = {self.tokens_per_step:,} tokens"),
            ("", f"{processes} x micro-batch {self.micro_batch} x {self.accumulation} accumulated"),
            *self._context_row(),
            *self._curriculum(),
            ("compute", f"{_si(flops)}FLOPs per token, {flops * self.tokens:.3g} FLOPs in all"),
            ("memory", "of one process when it is fullest, estimated:"),
        ]
        kinds = [*self.memory.items(), *((f"{kind} (host)", size) for kind, size in self.host_memory.items())]
        rows += [("", f"{_bytes(size):>9}  {kind}") for kind, size in kinds]
        rows.append(("", f"{_bytes(self.total_memory):>9}  in all" + (" on the device" if self.host_memory else "")))
        rows += [("", f"{_bytes(size):>9}  with {setting}") for setting, size in self.less.items()]
        if self.fits:
            rows.append(("", self.fits))
        rows += [("note", text) for text in self.notes]
        return "\n".join(f"{name:<14}{text}".rstrip() for name, text in rows)

    def _adapters_row(self) -> list[tuple[str, str]]:
        if self.adapters is None:
            return []
        share = self.adapters / self.parameters
        return [("", f"{self.adapters:,} more train, those of the adapters ({share:.2%}); the model itself is frozen")]

    def _context_row(self) -> list[tuple[str, str]]:
        if self.context == 1:
            return []
        tokens, ratio = _ceil(self.seq_len, self.context), self.context_balance
        share = f"{self.context} processes share each sequence, {tokens:,} tokens each"
        return [("", f"{share}; the busiest has {ratio:.2f} x the mean attention")]

    def _curriculum(self) -> list[tuple[str, str]]:
        if not self.stages:
            return []
        stages = ", ".join(f"{length:,} to step {end:,}" for end, length in self.stages)
        return [("", f"in pieces of so many tokens: {stages}, then {self.seq_len:,}")]


def plan(config: "TrainConfig", resolved: "Resolved", world_size: int) -> Plan:
    """The run in numbers; the memory is what this implementation keeps, see `memory`."""
    device = memory(config, resolved.model_config, world_size, resolved.micro_batch)
    context, slopes = config.context_parallel_size, slopes_of(resolved.model_config)
    host = host_memory(config, resolved.model_config, device, resolved.micro_batch)
    adapters = None if config.lora is None else count_adapters(config.lora, resolved.model_config)
    return Plan(
        name=config.run_name,
        run_folder=str(resolved.run_folder),
        parameters=count_parameters(resolved.model_config),
        adapters=adapters,
        steps=resolved.steps,
        tokens=resolved.steps * resolved.tokens_per_step,
        tokens_per_step=resolved.tokens_per_step,
        flops_per_token=flops_per_token(resolved.model_config, config.max_seq_len, adapters),
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
        fits=_fits(config, resolved, sum(device.values())),
        notes=tuple(_notes(config, resolved, sum(device.values()))),
        epochs=_epochs(config, resolved),
        stages=resolved.stages,
        less=_less(config, resolved, world_size, sum(device.values())),
    )


def host_memory(
    config: "TrainConfig", model_config: MptConfig, device: dict[str, int], micro_batch: int
) -> dict[str, int]:
    """What is kept in host memory, by kind; offloaded shards are taken out of `device`, as `memory` gives it."""
    host = {kind: device.pop(kind) for kind in _offloaded(config) if kind in device}
    if config.activation_offload and config.device != "cpu":
        width = 2 if config.precision == "amp_bf16" else FP32
        tokens = micro_batch * _ceil(config.max_seq_len, config.context_parallel_size)
        host["block inputs"] = model_config.n_layers * tokens * model_config.d_model * width
    return host


def _offloaded(config: "TrainConfig") -> tuple[str, ...]:
    """The kinds of shards that are in host memory, where the device's is another."""
    if config.fsdp_config.cpu_offload:
        return SHARDS
    return (STATE,) if config.optimizer.offload and config.device != "cpu" else ()


def _less(config: "TrainConfig", resolved: "Resolved", world_size: int, device_bytes: int) -> dict[str, int]:
    """Settings that would take less of the device's memory, each alone, and then all together."""
    fsdp, optimizer = config.fsdp_config, config.optimizer
    long = config.max_seq_len * resolved.micro_batch > 2 * MLP_CHUNK
    changes: dict[str, dict[str, Any]] = {}
    if config.activation_checkpointing != "full":
        changes["activation_checkpointing=full"] = {"activation_checkpointing": "full"}
    elif not config.activation_offload and config.device != "cpu":
        changes["activation_offload=true"] = {"activation_offload": True}
    if config.mlp_chunk_size is None and long and config.lora is None:
        changes[f"mlp_chunk_size={MLP_CHUNK}"] = {"mlp_chunk_size": MLP_CHUNK}
    if optimizer.name == "decoupled_lionw" and optimizer.state_dtype == "fp32":
        changes["optimizer.state_dtype=bf16"] = {"optimizer": replace(optimizer, state_dtype="bf16")}
    if config.lora is not None and config.lora.base_bits is None and not fsdp.cpu_offload:
        changes["lora.base_bits=4"] = {"lora": replace(config.lora, base_bits=4)}
    if config.lora is None and not fsdp.cpu_offload and not optimizer.offload and config.device != "cpu":
        both = {k: v for change in changes.values() for k, v in change.items()}
        changes["optimizer.offload=true"] = {"optimizer": replace(optimizer, offload=True)}
        changes["fsdp_config.cpu_offload=true"] = {"fsdp_config": replace(fsdp, cpu_offload=True)}
        if both:
            changes["all of these but optimizer.offload"] = both | changes["fsdp_config.cpu_offload=true"]
    elif len(changes) > 1:
        changes["all of these"] = {k: v for change in changes.values() for k, v in change.items()}
    out = {}
    for setting, change in changes.items():
        other = replace(config, **change)
        device = memory(other, resolved.model_config, world_size, resolved.micro_batch)
        host_memory(other, resolved.model_config, device, resolved.micro_batch)
        if (size := sum(device.values())) < 0.98 * device_bytes:
            out[setting] = size
    return out


def _fits(config: "TrainConfig", resolved: "Resolved", device_bytes: int) -> str:
    """Which GPU has room, or whether this one has; nothing where the run is to be on a CPU."""
    if config.device == "cpu":
        return ""
    if resolved.device_bytes is not None:
        verb = "fits" if device_bytes <= DEVICE_SHARE * resolved.device_bytes else "does not fit"
        return f"{verb} into this GPU's {_bytes(resolved.device_bytes)}"
    smallest = next((size for size in GPUS if device_bytes <= DEVICE_SHARE * size * GIB), None)
    return "fits into no GPU of today" if smallest is None else f"fits into a GPU of {smallest} GiB"


def _epochs(config: "TrainConfig", resolved: "Resolved") -> float | None:
    if resolved.train_data is None:
        return None
    return resolved.steps * config.global_train_batch_size / resolved.train_data.sequences


def _notes(config: "TrainConfig", resolved: "Resolved", device_bytes: int) -> Iterator[str]:
    yield from resolved.notes
    data, batch = resolved.train_data, config.global_train_batch_size
    if config.device == "cuda" and resolved.device_bytes is None:
        yield "device=cuda, but torch sees no GPU here: this is planned for another machine"
    if data is not None and batch > data.sequences:
        yield (
            f"global_train_batch_size={batch:,} is more than the {data.sequences:,} sequences of the training split: "
            "one step reads some of them more than once; lower it, or prepare more data"
        )
    if (epochs := _epochs(config, resolved)) is not None and epochs > MANY_EPOCHS:
        yield (
            f"max_duration={config.max_duration} passes over the training split {epochs:,.0f} times: lower it, or "
            "prepare more data"
        )
    if resolved.warmup_steps >= min(resolved.steps, resolved.decay_steps):
        yield f"scheduler.t_warmup={config.scheduler.t_warmup} covers the whole run: optimizer.lr is not reached"
    if resolved.device_bytes is not None and device_bytes > resolved.device_bytes:
        yield (
            f"the estimate is above the device's {_bytes(resolved.device_bytes)}: use more processes, "
            "activation_checkpointing=full, a smaller device_train_microbatch_size, context_parallel_size or "
            "fsdp_config.cpu_offload=true"
        )


def memory(config: "TrainConfig", model_config: MptConfig, world_size: int, micro_batch: int) -> dict[str, int]:
    """Bytes that one rank holds at the fullest moment of a step, by kind, and a margin of 5 % for fragmentation.

    weights, gradients, optimizer state: fp32 shards (Lion's average perhaps bf16); with LoRA of the adapters alone, and
    the frozen weights in the compute dtype, or in base_bits and not divided. gathered weights: the root
    (embedding, final norm, head) and two blocks (in use, and fetched ahead) in the compute dtype, or all blocks without
    reshard_after_forward. unreduced gradients: the root's and one block's; with accumulation the whole model's, unless
    ranks sum after every micro-batch. activations: what every block keeps for the backward; with checkpointing they are
    called block inputs. one block's work: its recomputation and the temporaries of its backward. keys of the group:
    with context_parallel_size, keys and values of whole sequences, kept by every block, or with activation
    checkpointing by one; in attention's backward their gradients, the sum of these, and what is sent. loss: a chunk of
    logits, the head's gradient summed in fp32, the last hidden states. optimizer step: its temporaries, and what of an
    offloaded state is on the device.
    """
    every = _moments(config, model_config, world_size, micro_batch)
    elsewhere = _offloaded(config)

    def held(parts: dict[str, int]) -> int:
        return sum(size for kind, size in parts.items() if kind not in elsewhere)

    fullest = max(every, key=held)
    fullest |= {kind: max(parts.get(kind, 0) for parts in every) for kind in elsewhere}
    out = {kind: size for kind, size in fullest.items() if size}
    out["margin"] = held(out) // 20
    return out


def _moments(config: "TrainConfig", model_config: MptConfig, world_size: int, micro_batch: int) -> list[dict[str, int]]:
    """What is held while the loss is computed, in the backward of the last and of the first block, and in the step."""
    c, fsdp, lora = model_config, config.fsdp_config, config.lora
    device_type = "cpu" if config.device == "cpu" else "cuda"
    width = 2 if config.precision == "amp_bf16" else FP32
    reduce_width = FP32 if config.precision == "fp32" or fsdp.reduce_dtype == "fp32" else 2
    shard = world_size // fsdp.replicate
    own = count_parameters(c)
    block = sum(math.prod(shape) for name, shape in parameter_shapes(c).items() if ".blocks.0." in name)
    root = own - c.n_layers * block
    trained, frozen, trained_block, trained_root = own, 0, block, root
    quantized = whole_weight = 0
    if lora is not None:
        trained, frozen, trained_root = count_adapters(lora, c), own, 0
        trained_block = trained // c.n_layers
        if lora.base_bits is not None:
            sizes = [out * in_ for out, in_ in target_shapes(LoraConfig(), c).values()]
            quantized = c.n_layers * sum(stored_bytes(size, lora.base_bits) for size in sizes)
            whole_weight = width * max(sizes)
            frozen, block = frozen - c.n_layers * sum(sizes), block - sum(sizes)
        block += trained_block
    context = config.context_parallel_size
    tokens = micro_batch * _ceil(config.max_seq_len, context)
    accumulates = config.global_train_batch_size > micro_batch * (world_size // context)
    whole = accumulates and not fsdp.reduce_every_microbatch  # gradients of the whole model wait on every rank
    lion = config.optimizer.name == "decoupled_lionw"
    average = 2 if config.optimizer.state_dtype == "bf16" else FP32

    mode, chunk = config.activation_checkpointing, config.mlp_chunk_size
    per_block = saved_per_block(c, tokens, width, chunked=chunk is not None)
    if lora is not None:
        per_block["none"] += saved_per_adapters(c, lora, tokens, width)
    inputs = "activations" if mode == "none" else "block inputs"
    kept = c.n_layers * per_block[mode]
    if config.activation_offload:  # their copies on the way to the host and back
        block_input = tokens * c.d_model * width
        kept += (min(2, c.n_layers) - c.n_layers) * block_input if device_type == "cuda" else 0
    again = per_block["none"] - per_block[mode] + whole_weight  # one at a time is made from its bits
    blocks = len(deal(config.max_seq_len, context, slopes_of(c))[0][0]) if context > 1 else 0
    mlp, attention = _backward_temporaries(c, tokens, width, chunk, device_type, blocks)
    shards = _ceil(trained, shard) * FP32
    one_block = width * trained_root + (width + reduce_width) * trained_block
    state = {
        "weights": shards + _ceil(frozen, shard) * width + quantized,
        STATE: _ceil(trained, shard) * average if lion else 2 * shards,
    }
    model = state | {"gathered weights": width * (root + (min(2, c.n_layers) if fsdp.reshard_after_forward
                                                          else c.n_layers) * block)}  # fmt: skip
    keys = 2 * micro_batch * config.max_seq_len * c.kv_heads * c.d_head * width if context > 1 else 0
    fetched = keys * (c.n_layers if mode == "none" else 1)
    backward = [
        {"one block's work": again + mlp, "keys of the group": fetched},
        {"one block's work": again + attention, "keys of the group": fetched + 3 * keys},
    ]
    lion_temporaries = lion and device_type == "cpu" and lora is None  # the adapters' are small
    step = _step_temporaries(c, config.optimizer.decay_all, shard, average) if lion_temporaries else 0
    if config.optimizer.offload:  # a piece of the state on the device
        largest = max(math.prod(shape) for shape in parameter_shapes(c).values()) * state[STATE] // own
        step += min(state[STATE], max(OFFLOAD_PIECE, largest))
    early = {"gradients": shards if accumulates and not whole else 0}
    unreduced = trained * reduce_width
    late = {"gradients": shards, inputs: kept // c.n_layers}
    return [
        model | early | {"unreduced gradients": unreduced if whole else 0, inputs: kept,
                         "keys of the group": keys * c.n_layers if mode == "none" else 0,
                         "loss": _loss(c, tokens, width, device_type, frozen=lora is not None)},
        *(model | early | {"unreduced gradients": unreduced if whole else one_block, inputs: kept} | part
          for part in backward),
        *(model | late | {"unreduced gradients": one_block} | part for part in backward),
        state | {"gradients": shards, "optimizer step": step},
    ]  # fmt: skip


def saved_per_block(c: MptConfig, tokens: int, width: int, *, chunked: bool = False) -> dict[str, int]:
    """Bytes that one block keeps for its backward over `tokens` tokens of `width` bytes, by activation checkpointing.

    none: both norms' input and output (their statistics in fp32), q k v, attention's output and LSE, the MLP's
    pre-activation unless the MLP runs in chunks; clipping and the norms of q and k keep their input too. full: the
    block's input. selective: the block's input, attention's output and LSE.
    """
    qkv = (c.n_heads + 2 * c.kv_heads) * c.d_head
    attention = tokens * (c.n_heads * c.d_head * width + c.n_heads * FP32)
    extra = (qkv if c.attn_config.clip_qkv else 0) + ((qkv - c.kv_heads * c.d_head) if c.attn_config.qk_ln else 0)
    dropout = 2 * tokens * c.d_model if c.resid_pdrop else 0  # masks, one byte each
    statistics = 2 * 2 * FP32 * tokens
    hidden = 0 if chunked else c.d_ffn
    rest = tokens * width * (4 * c.d_model + qkv + extra + hidden) + statistics + dropout
    block_input = tokens * c.d_model * width
    return {"none": rest + attention, "full": block_input, "selective": block_input + attention}


def saved_per_adapters(c: MptConfig, lora: LoraConfig, tokens: int, width: int) -> int:
    """Bytes that one block's adapters keep besides: what lies between A and B, dropout's result and mask, and the
    activated hidden width, which the fused MLP does without.
    """
    shapes = target_shapes(lora, c)
    dropped = sum(in_features for _, in_features in shapes.values()) * (width + 1) if lora.dropout else 0
    hidden = c.d_ffn * width if "down_proj" in shapes else 0
    return tokens * (lora.rank * width * len(shapes) + dropped + hidden)


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
        host_memory(config, model_config, needed, n)
        if sum(needed.values()) <= DEVICE_SHARE * device_bytes:
            return n
    return 1


def divisors(number: int) -> list[int]:
    """Every divisor of `number`, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def _backward_temporaries(
    c: MptConfig, tokens: int, width: int, chunk: int | None, device_type: str, blocks: int
) -> tuple[int, int]:
    """What a block's backward holds beyond what the block has saved: in its MLP, and later in its attention, when what
    the MLP had saved is gone.

    MLP: gradient and activation of the hidden width, the gradients of its output and input. Attention, in Triton: the
    gradients of its output and of q, k, v, before and after they are joined. On plain torch: q, k, v, the output, its
    gradient and the results in another layout, those of keys in fp32 (kernels.flash_attention_torch), with dropout
    more of them in fp32; where ranks share sequences, of one of a rank's `blocks` of queries at a time, and those of
    keys are counted as the group's.
    """
    d, q, kv = c.d_model, c.n_heads * c.d_head, c.kv_heads * c.d_head
    part = tokens if chunk is None else min(chunk, tokens)
    mlp = width * (part * (2 if chunk is None else 3) * c.d_ffn + 2 * tokens * d)
    if device_type == "cuda":
        attention = width * (2 * (q + 2 * kv) + d)
    else:
        of_queries, of_keys = q * 4 * width, kv * (4 * width + 2 * FP32)
        if c.attn_config.attn_pdrop:
            of_queries = q * (7 * FP32 if width == FP32 else 4 * width + 2 * FP32)
            of_keys = kv * (4 * FP32 if width == FP32 else 3 * width + 3 * FP32)
        attention = width * d + (of_queries // blocks if blocks else of_queries + of_keys)
    gone = width * (2 * d + (c.d_ffn if chunk is None else 0))
    return mlp, tokens * (attention - gone)


def _loss(c: MptConfig, tokens: int, width: int, device_type: str, *, frozen: bool) -> int:
    """A chunk of logits in the compute dtype beside the head's gradient in fp32, or, later, that gradient scaled; and
    the last block's output, normed, with its gradient. A frozen head has no gradient.
    """
    count = _ceil(tokens, max(1, LOSS_CHUNK[device_type] // (c.vocab_size * width)))
    logits = _ceil(tokens, count) * c.vocab_size * width
    head = 0 if frozen else c.vocab_size * c.d_model
    in_place = device_type == "cuda" or width == FP32
    part = 0 if in_place else head * width  # a chunk's, before it is added
    scaled = head * (width if in_place else FP32 + width)
    return head * FP32 + max(logits + part, scaled) + 4 * tokens * c.d_model * width


def _step_temporaries(c: MptConfig, decay_all: bool, shard: int, average: int) -> int:
    """Lion's updates on plain torch, and its averages in fp32 where they are kept in bf16: of one group of parameters
    at a time, the matrices or (almost only) the embeddings.
    """
    n = count_parameters(c)
    embeddings = c.d_model * (c.vocab_size + (c.max_seq_len if c.learned_positions else 0))
    largest = n if decay_all else max(embeddings, n - embeddings)
    return _ceil(largest, shard) * FP32 * (1 if average == FP32 else 2)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _bytes(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"


def _si(value: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "

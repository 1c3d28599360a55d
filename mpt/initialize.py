"""How an MPT's weights start: values that depend on (seed, name, configuration) only, not on how they are sharded.

Each parameter is drawn in blocks of rows, every block from its own generator, on the CPU in fp32. A rank that holds a
shard draws only the blocks its rows lie in, so a sharded model costs each rank its share, and any world size gives the
same weights.
"""

import hashlib
import math
from collections.abc import Container
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mpt.config import MptConfig, MptInitConfig

BLOCK_ELEMENTS = 1 << 20  # drawn from one generator; part of what the values depend on, so never to be changed


@dataclass(frozen=True)
class Draw:
    """normal: mean a, standard deviation b. uniform: in [a, b). constant: a."""

    kind: Literal["normal", "uniform", "constant"]
    a: float
    b: float = 0.0


def init_weights(model: nn.Module, seed: int, *, only: Container[str] | None = None) -> None:
    """Fill every parameter of an MptModel or a model with a head in place, as `model.config` says (`init_config`, else
    normal(0, initializer_range)); or only those of the given names.

    Parameters may be DTensors sharded along rows (`fully_shard`), in any dtype, on any device but meta. ValueError for
    meta, or another sharding.
    """
    config: MptConfig = model.config  # type: ignore[assignment]
    for raw_name, parameter in model.named_parameters():
        name = plain_name(raw_name)
        if only is not None and name not in only:
            continue
        if not hasattr(model, "transformer"):
            name = f"transformer.{name}"
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device; call model.to_empty(device=...) first")
        local, first_row = local_rows(name, parameter.detach())
        for start, stop, draw in _segments(name, tuple(parameter.shape), config):
            _fill(local, first_row, start, stop, draw, f"{seed}:{name}")


def plain_name(name: str) -> str:
    """A parameter's name in a checkpoint: without what activation checkpointing, torch.compile and an adapter around
    its layer put into the path.
    """
    for part in ("_checkpoint_wrapped_module.", "_orig_mod.", "base_layer."):
        name = name.replace(part, "")
    return name


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is a LoRA adapter's, by peft's names, and none of the model's own."""
    return ".lora_A." in name or ".lora_B." in name


def local_rows(name: str, tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a tensor sharded along its first dimension, and the first row of it; a plain tensor whole,
    and 0.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    local = tensor.to_local()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if any(offset[1:]) or tuple(shape[1:]) != tuple(tensor.shape[1:]):
        raise ValueError(f"{name} is sharded as {tensor.placements}; only sharding along rows, Shard(0), is supported")
    return local, offset[0]


def _segments(name: str, shape: tuple[int, ...], config: MptConfig) -> list[tuple[int, int, Draw]]:
    """What to draw for a parameter: (first row, last row + 1, distribution). Wqkv is three weights, drawn apart.

    Adapters begin as peft's do, A as torch's Linear and B at 0: the model is the base.
    """
    init, rows = config.init_config, shape[0]
    if is_adapter(name):
        limit = 1.0 / math.sqrt(shape[1])
        return [(0, rows, Draw("uniform", -limit, limit) if ".lora_A." in name else Draw("constant", 0.0))]
    if init is not None and init.name == "default_":
        return [(0, rows, _torch_default(name, shape, config))]
    if len(shape) == 1:
        return [(0, rows, Draw("constant", 0.0 if name.endswith(".bias") else 1.0))]
    if init is None:
        return [(0, rows, Draw("normal", 0.0, config.initializer_range))]
    if name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
        return [(0, rows, _embedding(init, rows, shape[1], config.d_model))]
    if name.endswith("attn.Wqkv.weight"):
        q, kv = config.d_model, config.kv_heads * config.d_head
        edges = (0, q, q + kv, q + 2 * kv)
        return [(a, b, _scheme(init, b - a, shape[1], config.d_model)) for a, b in pairwise(edges)]
    draw = _scheme(init, rows, shape[1], config.d_model)
    if name.endswith(("attn.out_proj.weight", "ffn.down_proj.weight")):
        divisor = init.residual_divisor(config.n_layers)
        draw = Draw(draw.kind, draw.a / divisor, draw.b / divisor)
    return [(0, rows, draw)]


def _scheme(init: MptInitConfig, fan_out: int, fan_in: int, d_model: int) -> Draw:
    """llm-foundry's schemes for a (fan_out, fan_in) matrix; Glorot and Bengio 2010, He et al. 2015, Nguyen and Salazar
    2019 (small).
    """
    if init.name == "baseline_":
        assert init.init_std is not None
        return Draw("normal", 0.0, init.init_std)
    if init.name in ("small_init_", "neox_init_"):
        return Draw("normal", 0.0, math.sqrt(2.0 / (5.0 * d_model)))
    if init.name.startswith("xavier"):
        std = init.init_gain * math.sqrt(2.0 / (fan_in + fan_out))
    else:
        gain = nn.init.calculate_gain(init.init_nonlinearity, init.init_gain)  # type: ignore[arg-type]
        std = gain / math.sqrt(fan_in if init.fan_mode == "fan_in" else fan_out)
    if init.name.endswith("normal_"):
        return Draw("normal", 0.0, std)
    return Draw("uniform", -math.sqrt(3.0) * std, math.sqrt(3.0) * std)


def _embedding(init: MptInitConfig, rows: int, columns: int, d_model: int) -> Draw:
    if init.emb_init_std is not None:
        return Draw("normal", 0.0, init.emb_init_std)
    limits = init.emb_init_uniform_lim
    if limits is None:
        return _scheme(init, rows, columns, d_model)
    low, high = limits if isinstance(limits, list) else (-limits, limits)
    return Draw("uniform", low, high)


def _torch_default(name: str, shape: tuple[int, ...], config: MptConfig) -> Draw:
    """What nn.Linear, nn.Embedding and the norms do in reset_parameters: nothing is divided, and a Linear's bias is
    drawn too.
    """
    if name.endswith(("wte.weight", "wpe.weight")):
        return Draw("normal", 0.0, 1.0)
    layer = name.split(".")[-2]
    if "norm" in layer or layer in ("q_ln", "k_ln"):
        return Draw("constant", 0.0 if name.endswith(".bias") else 1.0)
    fan_in = config.d_ffn if layer == "down_proj" else config.d_model
    return Draw("uniform", -1.0 / math.sqrt(fan_in), 1.0 / math.sqrt(fan_in))


@torch.no_grad()
def _fill(local: Tensor, first_row: int, start: int, stop: int, draw: Draw, key: str) -> None:
    """Fill those rows of `local` (the parameter's rows from first_row on) that lie in start..stop."""
    begin, end = max(start, first_row), min(stop, first_row + local.shape[0])
    if begin >= end:
        return
    if draw.kind == "constant":
        local[begin - first_row : end - first_row] = draw.a
        return
    columns = math.prod(local.shape[1:])
    size = max(1, BLOCK_ELEMENTS // columns)  # rows per block, counted from `start`
    for block in range((begin - start) // size, (end - start - 1) // size + 1):
        top = start + block * size
        values = torch.empty(min(size, stop - top), columns)
        digest = hashlib.sha256(f"{key}:{start}:{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if draw.kind == "normal":
            values.normal_(draw.a, draw.b, generator=generator)
        else:
            values.uniform_(draw.a, draw.b, generator=generator)
        a, b = max(begin, top), min(end, top + len(values))
        local[a - first_row : b - first_row] = values[a - top : b - top].view(b - a, *local.shape[1:]).to(local)

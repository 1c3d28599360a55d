"""The linear layers of a frozen model in 4 or 8 bit, through bitsandbytes, for LoRA on a small GPU.

4 bit: NormalFloat in blocks of 64 weights, whose scales are kept in 8 bit in turn (QLoRA: Dettmers et al.,
arXiv:2305.14314). 8 bit: the dynamic type in blocks of 256, with scales in fp32 (Dettmers et al., arXiv:2110.02861).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpt.checkpoint import Source
from mpt.initialize import plain_name

BLOCK = {4: 64, 8: 256}  # weights that share a scale, by bits
SCALES_BLOCK = 256  # of 4 bit's scales share one of theirs


class QuantizedLinear(nn.Module):
    """y = x W^T + bias in the place of `layer`; W is frozen, and what `load` gave last.

    Every product, forward and backward, makes W whole in x's dtype, for as long as it takes. The quantized weight is
    neither parameter nor buffer: each process holds all of it, FSDP does not divide it and no checkpoint has it.
    """

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias, self.bits = (
            layer.in_features, layer.out_features, layer.bias, bits,
        )  # fmt: skip
        self._quantized: tuple[Tensor, Any] | None = None  # numbers, bitsandbytes' QuantState

    def load(self, weight: Tensor) -> None:
        """Take the values of `weight` (out, in), a float tensor on the device where the layer computes."""
        from bitsandbytes import functional

        if self.bits == 4:
            self._quantized = functional.quantize_4bit(
                weight, blocksize=BLOCK[4], compress_statistics=True, quant_type="nf4"
            )
        else:
            self._quantized = functional.quantize_blockwise(weight, blocksize=BLOCK[8])

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) as it is computed with. RuntimeError before `load`."""
        from bitsandbytes import functional

        if self._quantized is None:
            raise RuntimeError("a quantized layer is used before its weight is loaded")
        numbers, state = self._quantized
        state.dtype = dtype
        out: Tensor = (functional.dequantize_4bit if self.bits == 4 else functional.dequantize_blockwise)(
            numbers, state
        )
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x W^T; the backward makes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight(grad.dtype), None


def quantize(model: nn.Module, names: tuple[str, ...], bits: int) -> None:
    """Put a QuantizedLinear, without a weight yet, in the place of every linear layer of these names, in place; also
    where an adapter is around it.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in (*names, "base_layer") and isinstance(layer, nn.Linear):
                setattr(parent, name, QuantizedLinear(layer, bits))


def load_quantized(model: nn.Module, source: Source) -> Source:
    """Load the quantized layers' weights, one after the other, and return what is left of the checkpoint."""
    stored, device = source.with_head(), next(model.parameters()).device
    for name, layer in _layers(model):
        weight = stored.pop(f"{name}.weight")
        layer.load(weight.rows(0, weight.shape[0]).to(device, torch.float32))
    return replace(source, tensors=stored)


def stored_bytes(weights: int, bits: int) -> int:
    """What so many weights take, scales included."""
    scales = weights // BLOCK[bits]
    return weights * bits // 8 + (scales + scales // SCALES_BLOCK * 4 if bits == 4 else scales * 4)


def _layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield plain_name(f"{name}.").removesuffix("."), module

"""MPT's feed-forward layer: y = down(gelu(up(x))), GELU exact (erf), which keeps one 4d-wide tensor for the backward,
or none.

    pre = x up_weight^T + up_bias,  y = gelu(pre) down_weight^T + down_bias

x (N, d), up_weight (f, d), down_weight (d', f), as torch.nn.Linear holds them. Matrix products are in x's dtype;
weights may be wider (under autocast the fp32 ones come as they are: what is saved then is no copy) and get their
gradients in their own dtype. Saved for the backward: x and pre; GELU is recomputed. With chunk_size only x is saved and
everything runs over that many tokens at a time, so that nothing f wide exists whole; pre is then recomputed too, and
weight gradients are summed in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.backend import (
    autocast_dtype,
    check_dtypes,
    check_tensors,
    choose,
    no_autocast,
    refuse_second_derivative,
    wide,
)
from kernels.product import product


def _cast(x: Tensor, up: Tensor, down: Tensor, up_b: Tensor | None, down_b: Tensor | None) -> list[Any]:
    return [None if w is None else w.to(x.dtype) for w in (up, down, up_b, down_b)]


def _chunks(tokens: int, chunk_size: int | None) -> list[tuple[int, int]]:
    size = chunk_size or max(tokens, 1)
    return [(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]


def _plus(total: Tensor | None, part: Tensor, alone: bool) -> Tensor:
    """A weight's gradient: of one chunk as it comes, of several summed in fp32."""
    if alone:
        return part
    return part.to(wide(part.dtype)) if total is None else total.add_(part)


# ---- the boundary ----------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype != torch.float32:
        return F.linear(x, weight, bias)  # adds the bias before it rounds
    out = product(x, weight)
    return out if bias is None else out.add_(bias)


@torch.library.custom_op("mpt::mlp", mutates_args=())
def _op(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """y (N, d') and pre (N, f), empty with chunk_size."""
    with no_autocast(x):
        up, down, up_b, down_b = _cast(x, up_weight, down_weight, up_bias, down_bias)
        if chunk_size is None:
            pre = _linear(x, up, up_b)
            return _linear(F.gelu(pre), down, down_b), pre
        y = x.new_empty(x.shape[0], down_weight.shape[0])
        for i, j in _chunks(x.shape[0], chunk_size):
            y[i:j] = _linear(F.gelu(_linear(x[i:j], up, up_b)), down, down_b)
        return y, x.new_empty(0, up_weight.shape[0])


@_op.register_fake
def _(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    return x.new_empty((n, down_weight.shape[0])), x.new_empty((n if chunk_size is None else 0, up_weight.shape[0]))


@torch.library.custom_op("mpt::mlp_backward", mutates_args=())
def _op_backward(
    dy: Tensor,
    pre: Tensor,
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    chunk_size: int | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, up_weight, down_weight, up_bias, down_bias; empty where `wanted` is false."""
    with no_autocast(x):
        up, down, up_b, _ = _cast(x, up_weight, down_weight, up_bias, None)
        ranges, acc = _chunks(x.shape[0], chunk_size), wide(x.dtype)
        dx = torch.empty_like(x) if wanted[0] else x.new_empty(0)
        sums: list[Tensor | None] = [None] * 4
        for i, j in ranges:
            x_c, dy_c, alone = x[i:j], dy[i:j], len(ranges) == 1
            pre_c = pre if chunk_size is None else _linear(x_c, up, up_b)
            if wanted[2]:
                sums[1] = _plus(sums[1], product(dy_c.mT, F.gelu(pre_c).mT), alone)
            if wanted[4]:
                sums[3] = _plus(sums[3], dy_c.sum(0, dtype=acc), alone)
            if not (wanted[0] or wanted[1] or wanted[3]):
                continue
            dpre = torch.ops.aten.gelu_backward(product(dy_c, down.mT), pre_c)
            if wanted[0]:
                dx[i:j] = product(dpre, up.mT)
            if wanted[1]:
                sums[0] = _plus(sums[0], product(dpre.mT, x_c.mT), alone)
            if wanted[3]:
                sums[2] = _plus(sums[2], dpre.sum(0, dtype=acc), alone)
        weights = (up_weight, down_weight, up_bias, down_bias)
        dup, ddown, dub, ddb = (
            x.new_empty(0) if w is None or s is None else s.to(w.dtype) for w, s in zip(weights, sums)
        )
        return dx, dup, ddown, dub, ddb


@_op_backward.register_fake
def _(
    dy: Tensor,
    pre: Tensor,
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    chunk_size: int | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    given = (x, up_weight, down_weight, up_bias, down_bias)
    return tuple(t.new_empty(t.shape) if want and t is not None else x.new_empty(0) for want, t in zip(wanted, given))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for pre, which is nobody's
    ctx.save_for_backward(output[1], *inputs[:5])
    ctx.chunk_size = inputs[5]


def _differentiate(ctx: Any, dy: Tensor | None, dpre: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    wanted = list(ctx.needs_input_grad[:5])
    grads = _op_backward(dy, *ctx.saved_tensors, ctx.chunk_size, wanted)
    return (*(grad if want else None for want, grad in zip(wanted, grads)), None)


_op.register_autograd(_differentiate, setup_context=_save)
_op_backward.register_autograd(refuse_second_derivative("mlp"), setup_context=lambda ctx, inputs, output: None)


def mlp(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """down(gelu(up(x))) with the exact GELU.

    x (..., d), up_weight (f, d), down_weight (d', f), up_bias (f), down_bias (d'), of one floating dtype (under
    autocast: x is cast to its dtype and so are the matrix products; weights keep theirs). Returns (..., d') in x's
    dtype. chunk_size: tokens at a time; f wide tensors then never exist whole, for one more matrix product in the
    backward. None: all at once.

    TypeError on dtypes, devices, DTensors; ValueError on shapes and chunk_size. No second derivative.
    """
    given = {"x": x, "up_weight": up_weight, "down_weight": down_weight, "up_bias": up_bias, "down_bias": down_bias}
    check_tensors("mlp", **given)
    dtype = autocast_dtype(x)
    if dtype is None:
        check_dtypes("mlp", **given)
    else:
        x = x.to(dtype)
    _check(x, up_weight, down_weight, up_bias, down_bias, chunk_size)
    if choose("mlp", x, backend) == "reference":
        with no_autocast(x):
            up, down, up_b, down_b = _cast(x, up_weight, down_weight, up_bias, down_bias)
            return reference.mlp(x, up, down, up_b, down_b)
    y, _ = _op(x.reshape(-1, x.shape[-1]), up_weight, down_weight, up_bias, down_bias, chunk_size)
    return y.view(*x.shape[:-1], y.shape[-1])


def _check(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    chunk_size: int | None,
) -> None:
    up, down = tuple(up_weight.shape), tuple(down_weight.shape)
    if len(up) != 2 or len(down) != 2 or x.dim() < 1 or x.shape[-1] != up[1] or up[0] != down[1]:
        raise ValueError(
            f"mlp: x {tuple(x.shape)}, up_weight {up}, down_weight {down}; pass (..., d), (f, d) and (d', f)"
        )
    for name, bias, width in (("up_bias", up_bias, up[0]), ("down_bias", down_bias, down[0])):
        if bias is not None and tuple(bias.shape) != (width,):
            raise ValueError(f"mlp: {name} is {tuple(bias.shape)}; pass ({width},)")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"mlp: chunk_size is {chunk_size}; it counts tokens, at least 1 (None: all at once)")

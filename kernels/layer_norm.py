"""LayerNorm and RMSNorm in low precision with fp32 statistics, with the residual addition that precedes them in a
block.

    layer_norm: y = (h - mean(h)) * rstd * weight + bias,  rstd = 1/sqrt(mean((h - mean)^2) + eps)
    rms_norm:   y = h * rstd * weight,                      rstd = 1/sqrt(mean(h^2) + eps)
    h = x, or x + residual, which is returned as well

Over the last dimension. Statistics, arithmetic and the sums of dweight and dbias over rows are in fp32 (float64 for
float64) whatever the dtype of x; y has the weight's dtype. Saved for the backward: x (with a residual: the sum, an
output anyway), mean and rstd. Ba et al. 2016 (arXiv 1607.06450), Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

from typing import Any

import torch
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


def _normalise(h: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y in weight's dtype, mean (empty for RMSNorm), rstd; h in fp32."""
    weight_, bias_ = weight.to(h.dtype), None if bias is None else bias.to(h.dtype)
    if rms:
        rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        return (h * rstd * weight_).to(weight.dtype), rstd.new_empty(0), rstd
    y, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], weight_, bias_, eps)
    return y.to(weight.dtype), mean, rstd


def _normalise_backward(
    dy: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dweight, dbias (empty without a bias); all in fp32: torch's own low-precision backward sums dweight in bf16
    on a CPU.
    """
    weight_, bias_ = weight.to(h.dtype), None if bias is None else bias.to(h.dtype)
    if not rms:
        wanted = [True, True, bias is not None]
        args = (h.shape[-1:], mean, rstd, weight_, bias_, wanted)
        dh, dw, db = torch.ops.aten.native_layer_norm_backward(dy.contiguous(), h, *args)
        return dh, dw, dw.new_empty(0) if bias is None else db
    unit, g = h * rstd, dy * weight_
    dw = (dy * unit).view(-1, h.shape[-1]).sum(0)
    return rstd * (g - unit * (g * unit).mean(-1, keepdim=True)), dw, dw.new_empty(0)


# ---- the boundary: one operation for both norms ----------------------------------------------------------------------


def _read(total: Tensor, weight: Tensor) -> Tensor:
    """What is normalised: the sum as the weight's dtype has it, in fp32."""
    return total.to(weight.dtype).to(wide(weight.dtype)).contiguous()


@torch.library.custom_op("mpt::layer_norm", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in weight's dtype, x + residual (empty without), mean, rstd."""
    with no_autocast(x):
        total = x if residual is None else x + residual
        y, mean, rstd = _normalise(_read(total, weight), weight, bias, eps, rms)
        return y, x.new_empty(0) if residual is None else total, mean, rstd


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0)
    if residual is not None:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=wide(weight.dtype))
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    return x.new_empty(x.shape, dtype=weight.dtype), total, mean, rstd


@torch.library.custom_op("mpt::layer_norm_backward", mutates_args=())
def _op_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the sum (of x, without a residual), weight and bias (empty without)."""
    with no_autocast(dy):
        h = _read(total, weight)
        dh, dw, db = _normalise_backward(dy.to(h.dtype), h, weight, bias, mean, rstd, rms)
        dh = dh if dtotal is None else dh.add_(dtotal)
        return dh.to(total.dtype), dw.to(weight.dtype), db.to(weight.dtype)


@_op_backward.register_fake
def _(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        total.new_empty(total.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if bias is None else weight.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    x, weight, bias, residual, _, ctx.rms = inputs
    ctx.fused = residual is not None
    ctx.dtypes = (x.dtype, x.dtype if residual is None else residual.dtype)
    ctx.save_for_backward(output[1] if ctx.fused else x, weight, bias, *output[2:])


def _differentiate(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    total, weight, bias, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(total, dtype=weight.dtype) if dy is None else dy
    dh, dw, db = _op_backward(dy, dtotal if ctx.fused else None, total, weight, bias, mean, rstd, ctx.rms)
    dx, dresidual = (dh.to(dtype) for dtype in ctx.dtypes)
    return dx, dw, None if bias is None else db, dresidual if ctx.fused else None, None, None


_op.register_autograd(_differentiate, setup_context=_save)
_op_backward.register_autograd(refuse_second_derivative("layer_norm"), setup_context=lambda ctx, inputs, output: None)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of x, or of x + residual.

    x, residual (..., d), weight, bias (d), of one floating dtype. Returns y (..., d) in that dtype, with `residual` (y,
    x + residual). Statistics are in fp32 (fp64 for fp64). Under autocast x, weight and bias are cast to its dtype first
    and y has it, while x + residual is formed from what was given, and keeps the wider dtype of the two.

    TypeError on dtypes, devices, DTensors; ValueError on shapes and eps. No second derivative.
    """
    return _norm("layer_norm", x, weight, bias, eps, residual, backend)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None, *, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension of x, or of x + residual; all else as `layer_norm`."""
    return _norm("rms_norm", x, weight, None, eps, residual, backend)


def _norm(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    check_tensors(op, x=x, weight=weight, bias=bias, residual=residual)
    dtype = autocast_dtype(x)
    if dtype is None:
        check_dtypes(op, x=x, weight=weight, bias=bias, residual=residual)
    else:
        x = x if residual is not None else x.to(dtype)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None and w.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} is {tuple(w.shape)}; x is {tuple(x.shape)}: pass one value per last dimension"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{op}: residual is {tuple(residual.shape)}; it must have x's shape {tuple(x.shape)}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}; it must be at least 0")
    rms = op == "rms_norm"
    if choose(op, x, backend) == "reference":
        with no_autocast(x):
            total = x if residual is None else x + residual
            h = total.to(weight.dtype)
            y = reference.rms_norm(h, weight, eps) if rms else reference.layer_norm(h, weight, bias, eps)
            assert isinstance(y, Tensor)
            return y if residual is None else (y, total)
    y, total, _, _ = _op(x, weight, bias, residual, float(eps), rms)
    return y if residual is None else (y, total)

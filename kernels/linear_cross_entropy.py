"""The output projection and its cross-entropy in one operation: logits exist for one chunk of tokens at a time.

    z = logit_scale * hidden weight^T,  lse_i = log sum_v exp(z_iv)
    loss_i = lse_i - (1 - e) z_i,label - e mean_v(z_iv) + z_loss * lse_i^2          e = label_smoothing
    dz_iv = softmax(z_i)_v (1 + 2 z_loss lse_i) - (1 - e) [v = label] - e / V

hidden (N, d), weight (V, d), labels (N); matrix products in hidden's dtype, everything between them and the sum of
dweight over chunks in fp32 (float64 for float64). Tokens whose label is ignored take no part and no time. With a mean
or a sum the gradients are formed in the forward, while a chunk's logits are there, and scaled in the backward (three
matrix products in all, as for whole logits; saved: dhidden and dweight). With reduction "none" the backward recomputes
the logits. The chunked form is known from Liger-Kernel (arXiv 2410.10989) and Cut Cross-Entropy (arXiv 2411.09009).
"""

from typing import Any, NamedTuple

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
from kernels.product import product

_CPU_ELEMENTS = 2**25  # logits of a chunk: enough that adding to dweight costs little beside the matrix products
_GPU_ELEMENTS = 2**28
_CACHED_ELEMENTS = 2**20  # logits between whose passes nothing leaves a CPU's cache


class _Loss(NamedTuple):
    ignore_index: int
    logit_scale: float
    label_smoothing: float
    z_loss: float


def _chunks(tokens: int, vocab: int, chunk_size: int | None, device: torch.device) -> list[tuple[int, int]]:
    """Nearly equal ranges of tokens."""
    limit = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
    size = chunk_size or max(1, limit // vocab)
    count = max(1, -(-tokens // size))
    size = max(1, -(-tokens // count))
    return [(i, min(i + size, tokens)) for i in range(0, tokens, size)]


def _run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: _Loss,
    chunk_size: int | None,
    grads: tuple[bool, bool],
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N) fp32, and sum_i factor_i * loss_i's gradients as asked (empty tensors otherwise): hidden's in its
    dtype, weight's in fp32.
    """
    (n, d), vocab, low, up = hidden.shape, weight.shape[0], hidden.dtype, wide(hidden.dtype)
    counted = _counted(labels, vocab, loss.ignore_index)
    every = len(counted) == n
    h, target = (hidden, labels) if every else (hidden[counted], labels[counted])
    factor = factor if factor is None or every else factor[counted]
    w, tokens = weight.to(low), len(counted)
    losses = torch.zeros(tokens, dtype=up, device=hidden.device)
    dh = torch.empty(tokens if grads[0] else 0, d, dtype=low, device=hidden.device)
    dw = torch.zeros(weight.shape if grads[1] else (0, d), dtype=up, device=hidden.device)
    ranges = _chunks(tokens, vocab, chunk_size, hidden.device)
    block = max(1, _CACHED_ELEMENTS // vocab) if hidden.device.type == "cpu" else n
    for i, j in ranges:
        z_low = product(h[i:j], w)
        for first in range(i, j, block):
            last = min(first + block, j)
            z = z_low[first - i : last - i].to(up)
            losses[first:last] = _row_losses(z, target[first:last], loss, any(grads))
            if factor is not None and any(grads):
                z.mul_(factor[first:last, None])
            if low != up and any(grads):
                z_low[first - i : last - i] = z
        if grads[0]:
            dh[i:j] = product(z_low, w.mT)
        if grads[1] and low == up:
            dw.addmm_(z_low.mT, h[i:j])
        elif grads[1]:
            dw.add_(torch.mm(z_low.mT, h[i:j]))
        del z_low  # before the next chunk's is made
    if not every:
        losses = losses.new_zeros(n).index_copy_(0, counted, losses)
        dh = dh.new_zeros(n, d).index_copy_(0, counted, dh) if grads[0] else dh
    return losses, dh, dw


def _counted(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Where labels count. IndexError for one outside the vocabulary (on a CPU; a GPU asserts where it is used)."""
    counts = labels != ignore_index
    if labels.device.type == "cpu":
        wrong = counts & ((labels < 0) | (labels >= vocab))
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise IndexError(
                f"label {int(labels[at])} at position {at} of {len(labels)}; "
                f"labels are 0 to {vocab - 1}, or ignore_index ({ignore_index})"
            )
    return counts.nonzero().squeeze(-1)


def _row_losses(z: Tensor, target: Tensor, loss: _Loss, grad: bool) -> Tensor:
    """Losses of the chunk with logits z (n, V), unscaled; with `grad`, z becomes their derivative by the unscaled
    logits.
    """
    e, zw = loss.label_smoothing, loss.z_loss
    if loss.logit_scale != 1.0:
        z.mul_(loss.logit_scale)
    at = target[:, None]
    chosen = z.gather(1, at)
    mean = z.mean(-1, keepdim=True) if e else chosen
    top = z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    lse = total.log() + top
    losses = lse - (1 - e) * chosen - e * mean + zw * lse.square()
    if grad:
        scale = loss.logit_scale
        z.mul_(scale * (1 + 2 * zw * lse) / total)
        z.scatter_add_(1, at, torch.full_like(chosen, -(1 - e) * scale))
        if e:
            z.sub_(e / z.shape[1] * scale)
    return losses.squeeze(-1)


# ---- the boundary ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("mpt::linear_cross_entropy", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    chunk_size: int | None,
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the factor of the gradients, and the gradients of the sum (empty where not asked for, and for reduction
    none).
    """
    loss = _Loss(ignore_index, logit_scale, label_smoothing, z_loss)
    grads = (grad_hidden and reduction != "none", grad_weight and reduction != "none")
    with no_autocast(hidden):
        losses, dh, dw = _run(hidden, weight, labels, loss, chunk_size, grads)
        factor = torch.ones((), dtype=losses.dtype, device=losses.device)
        if reduction == "mean":
            factor = 1 / (labels != ignore_index).sum().clamp(min=1).to(losses.dtype)
        return losses if reduction == "none" else losses.sum() * factor, factor, dh, dw


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    chunk_size: int | None,
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, d), formed, up = hidden.shape, reduction != "none", wide(hidden.dtype)
    dh = hidden.new_empty((n if grad_hidden and formed else 0, d))
    dw = weight.new_empty((weight.shape[0] if grad_weight and formed else 0, d), dtype=up)
    return hidden.new_empty(() if formed else (n,), dtype=up), hidden.new_empty((), dtype=up), dh, dw


@torch.library.custom_op("mpt::linear_cross_entropy_backward", mutates_args=())
def _op_backward(
    dloss: Tensor,
    factor: Tensor,
    dh: Tensor,
    dw: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    chunk_size: int | None,
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    with no_autocast(hidden):
        if reduction != "none":
            factor = dloss * factor
            return (dh * factor).to(hidden.dtype), (dw * factor).to(weight.dtype)
        loss = _Loss(ignore_index, logit_scale, label_smoothing, z_loss)
        grads = (grad_hidden, grad_weight)
        _, dh, dw = _run(hidden, weight, labels, loss, chunk_size, grads, factor=dloss)
        return dh, dw.to(weight.dtype)


@_op_backward.register_fake
def _(
    dloss: Tensor, factor: Tensor, dh: Tensor, dw: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    grad_hidden, grad_weight = rest[-2:]
    d = hidden.shape[1]
    return (
        hidden.new_empty((hidden.shape[0] if grad_hidden else 0, d)),
        weight.new_empty((weight.shape[0] if grad_weight else 0, d)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the gradients among the outputs, which are nobody's
    ctx.save_for_backward(*output[1:], *inputs[:3])
    ctx.settings = inputs[3:]


def _differentiate(ctx: Any, dloss: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 11
    dh, dw = _op_backward(dloss, *ctx.saved_tensors, *ctx.settings)
    return (dh if ctx.needs_input_grad[0] else None, dw if ctx.needs_input_grad[1] else None, *[None] * 9)


_op.register_autograd(_differentiate, setup_context=_save)
_op_backward.register_autograd(
    refuse_second_derivative("linear_cross_entropy"), setup_context=lambda ctx, inputs, output: None
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy, in nats, of the logits logit_scale * hidden weight^T, which never exist whole.

    hidden (..., d), weight (V, d), one floating dtype (under autocast: hidden is cast to its dtype and so are the
    matrix products; weight keeps its own, and gets its gradient in it, summed in fp32); labels (...) int64, 0..V-1 or
    ignore_index. Returns fp32 (fp64 for fp64): a scalar for reduction "mean" (over the labels that count; none: loss 0,
    gradients 0) or "sum", and (...) with 0 where ignored for "none". label_smoothing as in torch's cross_entropy;
    z_loss * lse^2 is added per label. chunk_size: tokens whose logits exist at once (None: by memory).

    TypeError on dtypes, devices, DTensors; ValueError on shapes and settings; IndexError for a label outside the
    vocabulary. No second derivative.
    """
    check_tensors("linear_cross_entropy", hidden=hidden, weight=weight, labels=labels)
    dtype = autocast_dtype(hidden)
    if dtype is None:
        check_dtypes("linear_cross_entropy", hidden=hidden, weight=weight)
    else:
        hidden = hidden.to(dtype)
    _check(hidden, weight, labels, label_smoothing, reduction, chunk_size)
    if choose("linear_cross_entropy", hidden, backend) == "reference":
        with no_autocast(hidden):
            return reference.linear_cross_entropy(
                hidden,
                weight.to(hidden.dtype),
                labels,
                ignore_index=ignore_index,
                logit_scale=logit_scale,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                reduction=reduction,
            )
    recording = torch.is_grad_enabled()
    out = _op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        ignore_index,
        float(logit_scale),
        float(label_smoothing),
        float(z_loss),
        reduction,
        chunk_size,
        recording and hidden.requires_grad,
        recording and weight.requires_grad,
    )[0]
    return out.view(labels.shape) if reduction == "none" else out


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, reduction: str, chunk_size: int | None
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}; pass (..., d) and (V, d)")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)}; hidden has tokens {tuple(hidden.shape[:-1])}: pass one label each"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}; pass int64 (`.long()`)")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it counts tokens, at least 1 (None: chosen by memory)")

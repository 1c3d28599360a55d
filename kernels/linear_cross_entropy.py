"""The output projection and its cross-entropy in one operation: logits exist for one chunk of tokens at a time.

    z = logit_scale * hidden weight^T,  lse_i = log sum_v exp(z_iv)
    loss_i = lse_i - (1 - e) z_i,label - e mean_v(z_iv) + z_loss * lse_i^2          e = label_smoothing
    dz_iv = softmax(z_i)_v (1 + 2 z_loss lse_i) - (1 - e) [v = label] - e / V

hidden (N, d), weight (V, d), labels (N); matrix products in hidden's dtype, everything between them and the sum of
dweight over chunks in fp32 (float64 for float64). Tokens whose label is ignored take no part. With a mean or a sum the
gradients are formed in the forward, while a chunk's logits are there, and scaled in the backward (three matrix products
in all, as for whole logits; saved: dhidden and dweight). With reduction "none" the backward recomputes the logits. The
chunked form is known from Liger-Kernel (arXiv 2410.10989) and Cut Cross-Entropy (arXiv 2411.09009).

On a GPU the matrix products are the library's, on chunks large enough to fill it, and one kernel between them turns a
chunk's logits into losses and, in place, into dz: read twice (the second time from the L2 cache) and written once, in
hidden's dtype. There nothing waits for the GPU, so that CUDA graphs can record it: ignored tokens stay in their chunk
with dz = 0 and take their part of the time, and a label outside the vocabulary gives NaN, as loss and as gradients.
With torch, ignored tokens are left out beforehand and take no time.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.backend import (
    architecture,
    autocast_dtype,
    check_chunk_size,
    check_dtypes,
    check_tensors,
    choose,
    no_autocast,
    on_device,
    refuse_second_derivative,
    wide,
)
from kernels.compile import Variant
from kernels.product import product

_CPU_BYTES = 2**26  # of a chunk's logits: enough that adding to dweight costs little beside the matrix products
_GPU_BYTES = 2**29
_CPU_ROWS = 64  # a multiple of it, so that few shapes of products occur
_CACHED_ELEMENTS = 2**20  # logits between whose passes nothing leaves a CPU's cache


class _Loss(NamedTuple):
    ignore_index: int
    logit_scale: float
    label_smoothing: float
    z_loss: float


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def _linear_cross_entropy_fwd_kernel(  # type: ignore[no-untyped-def]
    Z, LABELS, FACTOR, LOSS, width, vocab, ignore_index, scale, smoothing, z_loss,
    GRAD: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of unscaled logits Z (n, width), of which the first vocab count: its loss into LOSS (n) fp32 and, with
    GRAD, FACTOR (n; None: 1) times the loss's gradient by the row in its place. LABELS (n) int64. What lies between
    vocab and width may be overwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    Z += row * width
    offs = tl.arange(0, BLOCK_V)
    label = tl.load(LABELS + row)
    if label == ignore_index:
        tl.store(LOSS + row, 0.0)
        if GRAD:
            for start in range(0, width, BLOCK_V):
                offs_v = start + offs
                tl.store(Z + offs_v, tl.zeros([BLOCK_V], Z.dtype.element_ty), offs_v < width)
    else:
        known = (label >= 0) & (label < vocab)
        chosen = tl.load(Z + label, known, other=0.0).to(tl.float32) * scale
        m = -3.0e38  # finite, so that logits of -inf weigh 0
        l = tl.zeros([BLOCK_V], tl.float32)  # sums of exp(z - m), one per lane
        sums = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, width, BLOCK_V):
            offs_v = start + offs
            z = tl.load(Z + offs_v, offs_v < width, other=0.0).to(tl.float32) * scale
            inside = offs_v < vocab
            if SMOOTH:
                sums += tl.where(inside, z, 0.0)
            z = tl.where(inside, z, float("-inf"))
            m_new = tl.maximum(m, tl.max(z, 0))
            l = l * tl.exp(m - m_new) + tl.exp(z - m_new)
            m = m_new
        total = tl.sum(l, 0)
        log_total = tl.log(total)
        lse = m + log_total
        # lse - z of the label, with the difference of the two large numbers taken first
        loss = log_total + (1.0 - smoothing) * (m - chosen)
        if SMOOTH:
            loss += smoothing * (m - tl.sum(sums, 0) / vocab)
        loss += z_loss * lse * lse
        loss = tl.where(known, loss, float("nan"))
        tl.store(LOSS + row, loss)
        if GRAD:
            factor = scale
            if FACTOR is not None:
                factor *= tl.load(FACTOR + row).to(tl.float32)
            factor = tl.where(known, factor, float("nan"))
            each = factor * (1.0 + 2.0 * z_loss * lse) / total
            at_label = factor * (1.0 - smoothing)
            everywhere = factor * smoothing / vocab
            at = label.to(tl.int32)
            for start in range(0, width, BLOCK_V):
                offs_v = start + offs
                z = tl.load(Z + offs_v, offs_v < width, other=0.0).to(tl.float32) * scale
                dz = tl.exp(z - m) * each - tl.where(offs_v == at, at_label, 0.0)
                if SMOOTH:
                    dz -= everywhere
                tl.store(Z + offs_v, dz.to(Z.dtype.element_ty), offs_v < width)


class _Tile(NamedTuple):
    """For a row: 1024 threads, twice in a multiprocessor (32 registers each), keep memory busy with so few rows at a
    time that the second pass still finds them in the L2 cache.
    """

    block_v: int
    warps: int


_NVIDIA, _AMD = _Tile(8192, 32), _Tile(8192, 16)
_TILES = {
    "sm_80": _NVIDIA,
    "sm_86": _Tile(4096, 16),  # holds 1536 threads
    "sm_90": _NVIDIA,
    "sm_100": _NVIDIA,
    "gfx90a": _AMD,
    "gfx942": _AMD,
    "interpreter": _Tile(128, 1),
}
_ALIGNED = 64  # elements between whose multiples a row of logits is padded: whole cache lines, and GEMMs that load them
_ROWS = 128  # tokens in whose multiples chunks come: tiles of the library's matrix products


def _linear_cross_entropy_fwd(
    z: Tensor, vocab: int, labels: Tensor, factor: Tensor | None, loss: _Loss, out: Tensor, grad: bool
) -> None:
    """Losses of the chunk with unscaled logits z (n, width) into out (n); with `grad`, z becomes their gradient."""
    tile = _TILES[architecture(z.device)]
    with on_device(z):
        _linear_cross_entropy_fwd_kernel[(len(z),)](
            z,
            labels,
            factor,
            out,
            z.stride(0),
            vocab,
            *loss,
            GRAD=grad,
            SMOOTH=loss.label_smoothing != 0.0,
            BLOCK_V=tile.block_v,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )


def _run_triton(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: _Loss,
    chunk_size: int | None,
    grads: tuple[bool, bool],
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_run`, without waiting for the GPU."""
    (n, d), vocab, low = hidden.shape, weight.shape[0], hidden.dtype
    w, labels = weight.to(low), labels.contiguous()
    factor = None if factor is None else factor.contiguous()
    losses = torch.empty(n, dtype=torch.float32, device=hidden.device)
    dh = torch.empty(n if grads[0] else 0, d, dtype=low, device=hidden.device)
    dw = None
    ranges = _chunks(n, vocab, chunk_size, hidden.device, low, _ROWS)
    width = triton.cdiv(vocab, _ALIGNED) * _ALIGNED
    # Not empty: on a CPU with AMX a product in bf16 reads the columns after the view, and 0 * NaN is NaN.
    buffer = torch.zeros(max((j - i for i, j in ranges), default=0), width, dtype=low, device=hidden.device)
    for i, j in ranges:
        # 0 * NaN is not 0: ignored tokens must not reach dweight
        h = hidden[i:j].masked_fill((labels[i:j] == loss.ignore_index)[:, None], 0.0)
        padded = buffer[: j - i]
        z = torch.mm(h, w.mT, out=padded[:, :vocab])
        part = None if factor is None else factor[i:j]
        _linear_cross_entropy_fwd(padded, vocab, labels[i:j], part, loss, losses[i:j], any(grads))
        if grads[0]:
            torch.mm(z, w, out=dh[i:j])
        if grads[1]:
            dw = _add_product(dw, z.mT, h)
    if dw is None:
        dw = torch.zeros(weight.shape if grads[1] else (0, d), dtype=torch.float32, device=hidden.device)
    return losses, dh, dw


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in fp32 or float64 (None: a b). Changes total."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.device.type == "cuda" and not torch.version.hip:
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    part = torch.mm(a, b)
    if total is None:
        return part.float()
    rows = max(1, _CACHED_ELEMENTS // total.shape[1]) if total.device.type == "cpu" else len(total)
    for sums, terms in zip(total.split(rows), part.split(rows)):
        sums.add_(terms)  # a CPU makes an fp32 copy of the terms
    return total


def variants(architecture: str) -> list[Variant]:
    """The loss alone; with the gradient; with everything that is optional."""
    tile = _TILES[architecture]
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for grad, smooth, factor in ((False, False, False), (True, False, False), (True, True, True)):
            types = {"Z": f"*{dtype}", "LABELS": "*i64", "LOSS": "*fp32"}
            types |= dict.fromkeys(("width", "vocab", "ignore_index"), "i32")
            types |= dict.fromkeys(("scale", "smoothing", "z_loss"), "fp32")
            constants: dict[str, Any] = {"GRAD": grad, "SMOOTH": smooth, "BLOCK_V": tile.block_v}
            if factor:
                types["FACTOR"] = "*fp32"
            else:
                constants["FACTOR"] = None
            words = [word for word, on in (("gradient", grad), ("smoothing", smooth), ("factor", factor)) if on]
            label = " ".join(("_linear_cross_entropy_fwd_kernel", dtype, *words))
            # labels, losses and factors of a chunk begin where the chunk does
            divisible = ("Z", "width")
            found.append(
                Variant(
                    "linear_cross_entropy",
                    label,
                    _linear_cross_entropy_fwd_kernel,
                    types,
                    constants,
                    divisible,
                    tile.warps,
                    num_stages=1,
                    options={"enable_fp_fusion": True},
                )
            )
    return found


# ---- torch -----------------------------------------------------------------------------------------------------------


def _chunks(
    tokens: int, vocab: int, chunk_size: int | None, device: torch.device, dtype: torch.dtype, multiple: int = 1
) -> list[tuple[int, int]]:
    """Nearly equal ranges of tokens, of a multiple of so many where that does not make them larger than chunk_size."""
    limit = _CPU_BYTES if device.type == "cpu" else _GPU_BYTES
    largest = chunk_size or max(1, limit // (vocab * dtype.itemsize))
    count = max(1, -(-tokens // largest))
    size = max(1, -(-tokens // count))
    whole = -(-size // multiple) * multiple
    size = whole if whole <= largest else size
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
    ranges = _chunks(tokens, vocab, chunk_size, hidden.device, low, _CPU_ROWS)
    dw: Tensor | None = None
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
        if grads[1]:
            dw = _add_product(dw, z_low.mT, h[i:j])
        del z_low, z  # before the next chunk's is made; z may be a view of it
    if dw is None:
        dw = torch.zeros(weight.shape if grads[1] else (0, d), dtype=up, device=hidden.device)
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
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the factor of the gradients, and the gradients of the sum (empty where not asked for, and for reduction
    none).
    """
    loss = _Loss(ignore_index, logit_scale, label_smoothing, z_loss)
    grads = (grad_hidden and reduction != "none", grad_weight and reduction != "none")
    with no_autocast(hidden):
        run = _run_triton if triton else _run
        losses, dh, dw = run(hidden, weight, labels, loss, chunk_size, grads)
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
    triton: bool,
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
    triton: bool,
) -> tuple[Tensor, Tensor]:
    with no_autocast(hidden):
        if reduction != "none":
            factor = dloss * factor
            # Into weight's dtype at once: a GPU then holds no second fp32 copy.
            return (dh * factor).to(hidden.dtype), torch.mul(dw, factor, out=torch.empty_like(dw, dtype=weight.dtype))
        loss = _Loss(ignore_index, logit_scale, label_smoothing, z_loss)
        grads = (grad_hidden, grad_weight)
        run = _run_triton if triton else _run
        _, dh, dw = run(hidden, weight, labels, loss, chunk_size, grads, factor=dloss)
        return dh, dw.to(weight.dtype)


@_op_backward.register_fake
def _(
    dloss: Tensor, factor: Tensor, dh: Tensor, dw: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    grad_hidden, grad_weight = rest[-3:-1]
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
        return (None,) * 12
    dh, dw = _op_backward(dloss, *ctx.saved_tensors, *ctx.settings)
    return (dh if ctx.needs_input_grad[0] else None, dw if ctx.needs_input_grad[1] else None, *[None] * 10)


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

    TypeError on dtypes, devices, DTensors; ValueError on shapes and settings. A label outside the vocabulary is an
    IndexError from torch on a CPU and a device-side assertion on a GPU; Triton's loss and gradients are NaN. No second
    derivative.
    """
    check_tensors("linear_cross_entropy", hidden=hidden, weight=weight, labels=labels)
    dtype = autocast_dtype(hidden)
    check_dtypes("linear_cross_entropy", mixed=dtype is not None, hidden=hidden, weight=weight)
    hidden = hidden if dtype is None else hidden.to(dtype)
    _check(hidden, weight, labels, ignore_index, logit_scale, label_smoothing, z_loss, reduction)
    check_chunk_size("linear_cross_entropy", chunk_size)
    which = choose("linear_cross_entropy", hidden, backend)
    if which == "reference":
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
        which == "triton",
    )[0]
    return out.view(labels.shape) if reduction == "none" else out


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or not len(weight):
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
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is {ignore_index!r}; it must be an integer, such as -100")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale is {logit_scale}; it must be finite")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss is {z_loss}; it must be finite and at least 0")

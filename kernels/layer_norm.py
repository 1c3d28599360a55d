"""LayerNorm and RMSNorm in low precision with fp32 statistics, with the residual addition that precedes them in a
block.

    layer_norm: y = (h - mean(h)) * rstd * weight + bias,  rstd = 1/sqrt(mean((h - mean)^2) + eps)
    rms_norm:   y = h * rstd * weight,                      rstd = 1/sqrt(mean(h^2) + eps)
    h = x, or x + residual, which is returned as well

Over the last dimension. Statistics, arithmetic and the sums of dweight and dbias over rows are in fp32 (float64 for
float64) whatever the dtype of x; y has the weight's dtype. Saved for the backward: x (with a residual: the sum, an
output anyway), mean and rstd. Ba et al. 2016 (arXiv 1607.06450), Zhang and Sennrich 2019 (arXiv 1910.07467).

Backward, with u = (h - mean) * rstd, g = dy * weight, and dsum the gradient of the returned sum:

    dh = rstd * (g - mean(g) - u * mean(g * u)) + dsum  (no mean(g) for RMSNorm)
    dweight = sum of dy * u over rows,  dbias = sum of dy

Memory bounds both directions, so the kernels read each input once and write each output once. In the backward a few
programs per multiprocessor walk the rows and keep their part of dweight and dbias in registers; a second kernel adds
the parts in a fixed order. Rows too long for that are read twice: for dh, and by columns for dweight and dbias.
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
    check_dtypes,
    check_tensors,
    choose,
    eager,
    no_autocast,
    on_device,
    refuse_second_derivative,
    wide,
)
from kernels.compile import Variant

# ---- kernels: tiles of BLOCK_R rows x BLOCK_D columns; the rows of inputs lie x_stride etc. elements apart -----------


@triton.jit
def _load_total(X, RESIDUAL, TOTAL, row, x_stride, r_stride, offs_d, mask):  # type: ignore[no-untyped-def]
    """A tile of x, or of x + residual in TOTAL's dtype."""
    total = tl.load(X + row[:, None] * x_stride + offs_d[None, :], mask, other=0.0)
    if RESIDUAL is not None:
        residual = tl.load(RESIDUAL + row[:, None] * r_stride + offs_d[None, :], mask, other=0.0)
        total = (total.to(tl.float32) + residual.to(tl.float32)).to(TOTAL.dtype.element_ty)
    return total


@triton.jit(do_not_specialize=("rows",))
def _layer_norm_fwd_kernel(  # type: ignore[no-untyped-def]
    X, RESIDUAL, W, B, Y, TOTAL, MEAN, RSTD, x_stride, r_stride, rows, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of whole rows. X, RESIDUAL (rows, D); Y, TOTAL (rows, D) contiguous; MEAN, RSTD (rows) fp32; W, B (D).
    May be None: RESIDUAL with TOTAL, B, MEAN (for RMSNorm).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    in_rows, in_d = row < rows, offs_d[None, :] < D
    mask = in_rows[:, None] & in_d
    offs = row[:, None] * D + offs_d[None, :]
    total = _load_total(X, RESIDUAL, TOTAL, row, x_stride, r_stride, offs_d, mask)
    if RESIDUAL is not None:
        tl.store(TOTAL + offs, total, mask)
    h = total.to(W.dtype.element_ty).to(tl.float32)
    if MEAN is not None:
        mean = tl.sum(h, 1) * (1.0 / D)
        tl.store(MEAN + row, mean, in_rows)
        h = tl.where(in_d, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(h * h, 1) * (1.0 / D) + eps)
    tl.store(RSTD + row, rstd, in_rows)
    y = h * rstd[:, None] * tl.load(W + offs_d, offs_d < D, other=0.0).to(tl.float32)[None, :]
    if B is not None:
        y += tl.load(B + offs_d, offs_d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + offs, y.to(Y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=("rows",))
def _layer_norm_fwd_wide_kernel(  # type: ignore[no-untyped-def]
    X, RESIDUAL, W, B, Y, TOTAL, MEAN, RSTD, x_stride, r_stride, rows, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `_layer_norm_fwd_kernel`, for rows of several blocks: the later passes read them from the cache."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < rows
    mean = tl.zeros([BLOCK_R], tl.float32)
    if MEAN is not None:
        sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask = in_rows[:, None] & (offs_d[None, :] < D)
            total = _load_total(X, RESIDUAL, TOTAL, row, x_stride, r_stride, offs_d, mask)
            sums += total.to(W.dtype.element_ty).to(tl.float32)
        mean = tl.sum(sums, 1) * (1.0 / D)
        tl.store(MEAN + row, mean, in_rows)
    squares = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = in_rows[:, None] & (offs_d[None, :] < D)
        total = _load_total(X, RESIDUAL, TOTAL, row, x_stride, r_stride, offs_d, mask)
        if RESIDUAL is not None:
            tl.store(TOTAL + row[:, None] * D + offs_d[None, :], total, mask)
        h = tl.where(mask, total.to(W.dtype.element_ty).to(tl.float32) - mean[:, None], 0.0)
        squares += h * h
    rstd = tl.rsqrt(tl.sum(squares, 1) * (1.0 / D) + eps)
    tl.store(RSTD + row, rstd, in_rows)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        in_d = offs_d[None, :] < D
        mask = in_rows[:, None] & in_d
        total = _load_total(X, RESIDUAL, TOTAL, row, x_stride, r_stride, offs_d, mask)
        h = total.to(W.dtype.element_ty).to(tl.float32) - mean[:, None]
        y = h * rstd[:, None] * tl.load(W + offs_d, offs_d < D, other=0.0).to(tl.float32)[None, :]
        if B is not None:
            y += tl.load(B + offs_d, offs_d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(Y + row[:, None] * D + offs_d[None, :], y.to(Y.dtype.element_ty), mask)


@triton.jit
def _load_unit(H, W, MEAN, rstd, row, in_rows, h_stride, offs_d, mask):  # type: ignore[no-untyped-def]
    """A tile of u = (h - mean) * rstd; 0 in the rows outside, anything finite in the columns outside."""
    h = tl.load(H + row[:, None] * h_stride + offs_d[None, :], mask, other=0.0)
    h = h.to(W.dtype.element_ty).to(tl.float32)
    if MEAN is not None:
        h -= tl.load(MEAN + row, in_rows, other=0.0)[:, None]
    return h * rstd[:, None]


@triton.jit(do_not_specialize=("rows",))
def _layer_norm_bwd_kernel(  # type: ignore[no-untyped-def]
    DY, DTOTAL, H, W, MEAN, RSTD, DH, PARTIAL, dy_stride, dt_stride, h_stride, rows,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of whole rows in turn: dh of each, and the sums of dy * u (and of dy, with BIAS) over this program's rows
    into PARTIAL (1 or 2, programs, D) fp32. DY, DTOTAL (or None), H (the sum) (rows, D); DH (rows, D) contiguous.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d[None, :] < D
    w = tl.load(W + offs_d, offs_d < D, other=0.0)[None, :]
    dw = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in tl.range(program * BLOCK_R, rows, programs * BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)
        in_rows = row < rows
        mask = in_rows[:, None] & in_d
        dy = tl.load(DY + row[:, None] * dy_stride + offs_d[None, :], mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, in_rows, other=0.0)
        unit = _load_unit(H, W, MEAN, rstd, row, in_rows, h_stride, offs_d, mask)
        g = dy * w.to(tl.float32)
        dh = g - unit * (tl.sum(g * unit, 1) * (1.0 / D))[:, None]
        if MEAN is not None:
            dh -= (tl.sum(g, 1) * (1.0 / D))[:, None]
        dh *= rstd[:, None]
        if DTOTAL is not None:
            dh += tl.load(DTOTAL + row[:, None] * dt_stride + offs_d[None, :], mask, other=0.0).to(tl.float32)
        tl.store(DH + row[:, None] * D + offs_d[None, :], dh.to(DH.dtype.element_ty), mask)
        dw += dy * unit
        if BIAS:
            db += dy
    offs = program * D + offs_d
    tl.store(PARTIAL + offs, tl.sum(dw, 0), offs_d < D)
    if BIAS:
        tl.store(PARTIAL + programs * D + offs, tl.sum(db, 0), offs_d < D)


@triton.jit(do_not_specialize=("rows",))
def _layer_norm_bwd_wide_kernel(  # type: ignore[no-untyped-def]
    DY, DTOTAL, H, W, MEAN, RSTD, DH, dy_stride, dt_stride, h_stride, rows,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dh as in `_layer_norm_bwd_kernel`, for rows of several blocks: the second pass reads them from the cache."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < rows
    rstd = tl.load(RSTD + row, in_rows, other=0.0)
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    products = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        in_d = offs_d[None, :] < D
        mask = in_rows[:, None] & in_d
        dy = tl.load(DY + row[:, None] * dy_stride + offs_d[None, :], mask, other=0.0).to(tl.float32)
        g = dy * tl.load(W + offs_d, offs_d < D, other=0.0).to(tl.float32)[None, :]
        sums += g
        products += g * _load_unit(H, W, MEAN, rstd, row, in_rows, h_stride, offs_d, mask)
    mean_g = tl.sum(sums, 1) * (1.0 / D)
    mean_product = tl.sum(products, 1) * (1.0 / D)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        in_d = offs_d[None, :] < D
        mask = in_rows[:, None] & in_d
        dy = tl.load(DY + row[:, None] * dy_stride + offs_d[None, :], mask, other=0.0).to(tl.float32)
        g = dy * tl.load(W + offs_d, offs_d < D, other=0.0).to(tl.float32)[None, :]
        unit = _load_unit(H, W, MEAN, rstd, row, in_rows, h_stride, offs_d, mask)
        dh = g - unit * mean_product[:, None]
        if MEAN is not None:
            dh -= mean_g[:, None]
        dh *= rstd[:, None]
        if DTOTAL is not None:
            dh += tl.load(DTOTAL + row[:, None] * dt_stride + offs_d[None, :], mask, other=0.0).to(tl.float32)
        tl.store(DH + row[:, None] * D + offs_d[None, :], dh.to(DH.dtype.element_ty), mask)


@triton.jit(do_not_specialize=("rows",))
def _layer_norm_bwd_columns_kernel(  # type: ignore[no-untyped-def]
    DY, H, W, MEAN, RSTD, PARTIAL, dy_stride, h_stride, rows,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """PARTIAL as in `_layer_norm_bwd_kernel`, one block of columns per program_id(0), programs along program_id(1)."""
    program, programs = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d[None, :] < D
    dw = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in tl.range(program * BLOCK_R, rows, programs * BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)
        in_rows = row < rows
        mask = in_rows[:, None] & in_d
        dy = tl.load(DY + row[:, None] * dy_stride + offs_d[None, :], mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, in_rows, other=0.0)
        dw += dy * _load_unit(H, W, MEAN, rstd, row, in_rows, h_stride, offs_d, mask)
        if BIAS:
            db += dy
    offs = program * D + offs_d
    tl.store(PARTIAL + offs, tl.sum(dw, 0), offs_d < D)
    if BIAS:
        tl.store(PARTIAL + programs * D + offs, tl.sum(db, 0), offs_d < D)


@triton.jit
def _layer_norm_bwd_reduce_kernel(  # type: ignore[no-untyped-def]
    PARTIAL, DW, DB, programs, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The sums of PARTIAL over programs, [0] into DW and [1] into DB, one of them per program_id(1)."""
    which = tl.program_id(1)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, programs, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        mask = (part < programs)[:, None] & (offs_d < D)[None, :]
        offs = (which.to(tl.int64) * programs + part)[:, None] * D + offs_d[None, :]
        sums += tl.load(PARTIAL + offs, mask, other=0.0)
    out = tl.sum(sums, 0).to(DW.dtype.element_ty)
    if which == 0:
        tl.store(DW + offs_d, out, offs_d < D)
    else:
        tl.store(DB + offs_d, out, offs_d < D)


# ---- launchers -------------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """widest: the longest row, in elements, that the one-block kernels take; twice a longer row's block. tile: elements
    of a tile of several rows. per_thread: elements of a tile per thread, 16 being two loads of 16 bytes in bf16. lanes:
    threads of a warp. ahead: bytes of tiles that the backward's loop may load ahead of their turn, into shared memory
    (NVIDIA) or registers (AMD). resident: threads of the backward that a multiprocessor
    holds at a time, which its registers decide.
    """

    widest: int
    tile: int
    per_thread: int
    lanes: int
    ahead: int
    resident: int


_SM_90 = _Table(widest=8192, tile=2048, per_thread=16, lanes=32, ahead=224 * 1024, resident=512)
_GFX942 = _SM_90._replace(lanes=64, ahead=64 * 1024)
_TABLES = {
    "sm_80": _SM_90._replace(ahead=160 * 1024),
    "sm_86": _SM_90._replace(ahead=98 * 1024),
    "sm_90": _SM_90,
    "sm_100": _SM_90,
    "gfx90a": _GFX942,
    "gfx942": _GFX942,
    "interpreter": _SM_90._replace(widest=128, ahead=0),
}
_REDUCE = {"BLOCK_P": 32, "BLOCK_D": 32}  # the tile that adds up the programs' parts: 128 bytes of a row


def _tile(table: _Table, d: int) -> tuple[dict[str, int], int]:
    """The tile for rows of d elements, and its warps."""
    block_d = triton.next_power_of_2(d) if d <= table.widest else table.widest // 2
    block_r = max(1, table.tile // block_d)
    warps = block_r * block_d // (table.per_thread * table.lanes)
    return {"BLOCK_R": block_r, "BLOCK_D": block_d}, min(max(warps, 1), 16)


def _stages(table: _Table, tile: dict[str, int], size: int) -> int:
    """Stages of a loop that loads so many bytes for each element of a tile: at most two tiles are on their way."""
    return 1 + min(2, table.ahead // (tile["BLOCK_R"] * tile["BLOCK_D"] * size))


def _programs(table: _Table, device: torch.device, warps: int) -> int:
    """How many programs of so many warps the device holds at a time."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return processors * max(1, table.resident // (warps * table.lanes))


def _outputs(x: Tensor, weight: Tensor, residual: Tensor | None, rms: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fresh memory for y, x + residual (empty without), mean (empty for RMSNorm), rstd."""
    total = x.new_empty(0)
    if residual is not None:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=wide(weight.dtype))
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    return x.new_empty(x.shape, dtype=weight.dtype), total, mean, rstd


def _gradients(total: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh memory for the gradients of the sum, weight and bias (empty without)."""
    db = weight.new_empty(0 if bias is None else weight.shape)
    return total.new_empty(total.shape), weight.new_empty(weight.shape), db


def _rows(t: Tensor, d: int) -> Tensor:
    """(rows, d) with neighbouring elements of a row adjacent; a view where the strides allow it."""
    t = t.reshape(-1, d)
    return t if t.stride(1) == 1 else t.contiguous()


def _layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `_op`, of an x with elements."""
    y, total, mean, rstd = _outputs(x, weight, residual, rms)
    d = x.shape[-1]
    table = _TABLES[architecture(x.device)]
    x, residual = _rows(x, d), None if residual is None else _rows(residual, d)
    tile, warps = _tile(table, d)
    kernel = _layer_norm_fwd_kernel if d <= table.widest else _layer_norm_fwd_wide_kernel
    with on_device(x):
        kernel[(triton.cdiv(len(x), tile["BLOCK_R"]),)](
            x,
            residual,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            None if residual is None else total,
            None if rms else mean,
            rstd,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            len(x),
            eps,
            D=d,
            **tile,
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return y, total, mean, rstd


def _layer_norm_bwd(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `_op_backward`, of a total with elements."""
    dh, dw, db = _gradients(total, weight, bias)
    d = total.shape[-1]
    table = _TABLES[architecture(total.device)]
    dy, h, dtotal = _rows(dy, d), _rows(total, d), None if dtotal is None else _rows(dtotal, d)
    weight = weight.contiguous()
    statistics = (None if rms else mean.contiguous(), rstd.contiguous())
    dt_stride = 0 if dtotal is None else dtotal.stride(0)
    tile, warps = _tile(table, d)
    tiles = triton.cdiv(len(h), tile["BLOCK_R"])
    options: dict[str, Any] = {"D": d, **tile, "num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    size = sum(t.element_size() for t in (dy, h, dtotal) if t is not None)
    loop = {"BIAS": bias is not None, "STAGES": _stages(table, tile, size)}
    programs = _programs(table, h.device, warps)
    blocks = triton.cdiv(d, tile["BLOCK_D"])
    programs = min(triton.cdiv(programs, blocks), tiles)
    partial = torch.empty((1 if bias is None else 2, programs, d), dtype=torch.float32, device=h.device)
    with on_device(h):
        if d <= table.widest:
            _layer_norm_bwd_kernel[(programs,)](
                *(dy, dtotal, h, weight, *statistics, dh, partial),
                *(dy.stride(0), dt_stride, h.stride(0), len(h)),
                **options,
                **loop,
            )
        else:
            _layer_norm_bwd_wide_kernel[(tiles,)](
                *(dy, dtotal, h, weight, *statistics, dh),
                *(dy.stride(0), dt_stride, h.stride(0), len(h)),
                **options,
            )
            _layer_norm_bwd_columns_kernel[(blocks, programs)](
                *(dy, h, weight, *statistics, partial), *(dy.stride(0), h.stride(0), len(h)), **options, **loop
            )
        _layer_norm_bwd_reduce_kernel[(triton.cdiv(d, _REDUCE["BLOCK_D"]), len(partial))](
            partial,
            dw,
            dw if bias is None else db,
            programs,
            D=d,
            **_REDUCE,
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return dh, dw, db


_OPTIONAL = ("RESIDUAL", "TOTAL", "B", "MEAN", "DTOTAL")


def variants(architecture: str) -> list[Variant]:
    """Every kernel at MPT's widths (7168 does not fill its block) and a wide one, with all that is optional; RMSNorm
    without.
    """
    table = _TABLES[architecture]
    found = []
    for d in (128, 768, 2048, 4096, 7168, 8192, 12288):
        found += _variants(table, "layer_norm", "bf16", d)
    return found + _variants(table, "layer_norm", "fp32", 8192) + _variants(table, "rms_norm", "bf16", 4096)


def _variants(table: _Table, op: str, dtype: str, d: int) -> list[Variant]:
    """The kernels of both directions for rows of d elements."""
    tile, warps = _tile(table, d)
    full = op == "layer_norm"
    size = (3 if full else 2) * (4 if dtype == "fp32" else 2)
    given: dict[str, Any] = {"D": d, **tile, "BIAS": full, "STAGES": _stages(table, tile, size)}
    given |= {} if full else dict.fromkeys(_OPTIONAL)
    if d <= table.widest:
        kernels = [_layer_norm_fwd_kernel, _layer_norm_bwd_kernel]
    else:
        kernels = [_layer_norm_fwd_wide_kernel, _layer_norm_bwd_wide_kernel, _layer_norm_bwd_columns_kernel]
    found = []
    shipped = [(kernel, warps, given) for kernel in kernels] + [(_layer_norm_bwd_reduce_kernel, 4, given | _REDUCE)]
    for kernel, num_warps, values in shipped:
        constants = {name: value for name, value in values.items() if name in kernel.arg_names}
        signature = {name: _type(name, dtype) for name in kernel.arg_names if name not in constants}
        divisible = tuple(name for name in signature if name.isupper() or name.endswith("_stride"))
        found.append(
            Variant(
                op=op,
                label=f"{kernel.fn.__name__} {op} d {d} {dtype}",
                kernel=kernel,
                signature=signature,
                constants=constants,
                divisible=divisible,
                num_warps=num_warps,
                num_stages=1,
                options={"enable_fp_fusion": True},
            )
        )
    return found


def _type(name: str, dtype: str) -> str:
    """Triton's type of a kernel's argument."""
    if name.isupper():
        return "*fp32" if name in ("MEAN", "RSTD", "PARTIAL") else f"*{dtype}"
    return "fp32" if name == "eps" else "i32"


# ---- on plain torch --------------------------------------------------------------------------------------------------


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


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, rms: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in weight's dtype, x + residual (empty without), mean (empty for RMSNorm), rstd."""
    if triton:
        return _layer_norm_fwd(x, weight, bias, residual, eps, rms)
    with no_autocast(x):
        total = x if residual is None else (x + residual).contiguous()
        y, mean, rstd = _normalise(_read(total, weight), weight, bias, eps, rms)
        return y, x.new_empty(0) if residual is None else total, mean, rstd


_op = torch.library.custom_op("mpt::layer_norm", mutates_args=())(_run)


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, rms: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, weight, residual, rms)


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
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the sum (of x, without a residual), weight and bias (empty without)."""
    if triton:
        return _layer_norm_bwd(dy, dtotal, total, weight, bias, mean, rstd, rms)
    with no_autocast(dy):
        h = _read(total, weight)
        dh, dw, db = _normalise_backward(dy.to(h.dtype), h, weight, bias, mean, rstd, rms)
        dh = dh if dtotal is None else dh.add_(dtotal)
        return dh.to(total.dtype), dw.to(weight.dtype), db.to(weight.dtype)


@_op_backward.register_fake
def _(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(total, weight, bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    x, weight, bias, residual, _, ctx.rms, ctx.triton = inputs
    ctx.fused = residual is not None
    ctx.dtypes = (x.dtype, x.dtype if residual is None else residual.dtype)
    ctx.save_for_backward(output[1] if ctx.fused else x, weight, bias, *output[2:])


def _differentiate(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    total, weight, bias, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(total, dtype=weight.dtype) if dy is None else dy
    dh, dw, db = _op_backward(dy, dtotal if ctx.fused else None, total, weight, bias, mean, rstd, ctx.rms, ctx.triton)
    dx, dresidual = (dh.to(dtype) for dtype in ctx.dtypes)
    return dx, dw, None if bias is None else db, dresidual if ctx.fused else None, None, None, None


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
    check_dtypes(op, mixed=dtype is not None, x=x, weight=weight, bias=bias, residual=residual)
    if dtype is not None:
        x = x if residual is not None else x.to(dtype)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None and (w.dim() != 1 or w.shape != x.shape[-1:]):
            raise ValueError(
                f"{op}: {name} is {tuple(w.shape)}; x is {tuple(x.shape)}: pass one value per last dimension"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{op}: residual is {tuple(residual.shape)}; it must have x's shape {tuple(x.shape)}")
    if isinstance(eps, Tensor):
        raise TypeError(f"{op}: eps is a tensor; pass a number (rms_norm takes no bias)")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps is {eps}; it must be finite and at least 0")
    rms = op == "rms_norm"
    widest = x if residual is None or residual.dtype != torch.float64 else residual
    which = choose(op, widest, backend)
    if which == "reference":
        with no_autocast(x):
            total = x if residual is None else x + residual
            h = total.to(weight.dtype)
            y = reference.rms_norm(h, weight, eps) if rms else reference.layer_norm(h, weight, bias, eps)
            assert isinstance(y, Tensor)
            return y if residual is None else (y, total)
    run = _run if eager(x) else _op
    y, total, _, _ = run(x, weight, bias, residual, float(eps), rms, which == "triton" and x.numel() > 0)
    return y if residual is None else (y, total)

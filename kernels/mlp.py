"""MPT's feed-forward layer: y = down(gelu(up(x))), GELU exact (erf), which keeps one 4d-wide tensor for the backward,
or none.

    pre = x up_weight^T + up_bias,  y = gelu(pre) down_weight^T + down_bias
    dpre = (dy down_weight) * gelu'(pre),  dx = dpre up_weight,  dup = dpre^T x,  ddown = dy^T gelu(pre)

x (N, d), up_weight (f, d), down_weight (d', f), as torch.nn.Linear holds them. Matrix products are in x's dtype;
weights may be wider (under autocast the fp32 ones come as they are: what is saved then is no copy) and get their
gradients in their own dtype. Saved for the backward: x and pre; GELU is recomputed. With chunk_size only x is saved and
everything runs over that many tokens at a time, so that nothing f wide exists whole; pre is then recomputed too, and
weight gradients are summed in fp32.

On a GPU gelu(pre), and dpre with gelu(pre) in the backward, come in one of two forms: a Triton product whose epilogue
computes them, or the library's product followed by one pointwise kernel. The other products are the library's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
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
    eager,
    fp32_products,
    no_autocast,
    on_device,
    refuse_second_derivative,
    wide,
)
from kernels.compile import Variant
from kernels.product import product

# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _gelu(x):  # type: ignore[no-untyped-def]
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_derivative(x):  # type: ignore[no-untyped-def]
    """Phi(x) + x phi(x), of the standard normal distribution."""
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))


@triton.jit
def _product_tile(  # type: ignore[no-untyped-def]
    A, W, a_stride, rows, columns, K,
    TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """This program's tile of A W, fp32, and where it begins. A (rows, K); W (K, columns), or (columns, K) if
    TRANSPOSED, contiguous. EVEN_K: K is a multiple of BLOCK_K. Programs go down GROUP_M tiles, then to the right, so
    that those which run together share what the L2 cache holds.
    """
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    start_m = (group * GROUP_M + within % height) * BLOCK_M
    start_n = (within // height) * BLOCK_N
    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = (offs_m < rows - start_m)[:, None], (offs_n < columns - start_n)[None, :]
    # 64 bits for where tiles begin, 32 within them: half the registers
    A += start_m.to(tl.int64) * a_stride
    offs_a = offs_m[:, None] * a_stride + offs_k[None, :]
    if TRANSPOSED:
        W += start_n.to(tl.int64) * K
        offs_w = offs_n[None, :] * K + offs_k[:, None]
        w_step = BLOCK_K
    else:
        W += start_n
        offs_w = offs_k[:, None] * columns + offs_n[None, :]
        w_step = BLOCK_K * columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(A + offs_a, in_m, other=0.0)
            w = tl.load(W + offs_w, in_n, other=0.0)
        else:
            in_k = offs_k < K - start
            a = tl.load(A + offs_a, in_m & in_k[None, :], other=0.0)
            w = tl.load(W + offs_w, in_n & in_k[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        A += BLOCK_K
        W += w_step
    return acc, start_m, start_n


@triton.jit
def _output_tile(start_m, start_n, rows, f, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the tile of a (rows, f) matrix begins, its elements' places from there, and which of them exist."""
    offs_m, offs_n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask = (offs_m < rows - start_m) & (offs_n < f - start_n)
    return start_m.to(tl.int64) * f + start_n, offs_m * f + offs_n, mask


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and the right half of a tile: what follows a product on whole ones does not fit into the registers."""
    return tl.split(tl.permute(tl.reshape(tile, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def _mlp_fwd_tile(acc, B, PRE, ACT, start_m, start_n, rows, f, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    begin, offs, mask = _output_tile(start_m, start_n, rows, f, BLOCK_M, BLOCK_N)
    if B is not None:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        acc += tl.load(B + offs_n, offs_n < f, other=0.0).to(tl.float32)[None, :]
    pre = acc.to(ACT.dtype.element_ty)
    if PRE is not None:
        tl.store(PRE + begin + offs, pre, mask)
    tl.store(ACT + begin + offs, _gelu(pre.to(tl.float32)).to(ACT.dtype.element_ty), mask)


@triton.jit(do_not_specialize=("rows",))
def _mlp_fwd_kernel(  # type: ignore[no-untyped-def]
    X, W, B, PRE, ACT, x_stride, rows, f, d,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of PRE = X W^T + B (None: not written; B None: 0) and of ACT = gelu(PRE). X (rows, d), W (f, d), B (f);
    PRE and ACT (rows, f), contiguous. GELU is of PRE as it is rounded, from which the backward recomputes it.
    """
    acc, start_m, start_n = _product_tile(
        X, W, x_stride, rows, f, d, True, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M
    )
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    _mlp_fwd_tile(left, B, PRE, ACT, start_m, start_n, rows, f, BLOCK_M, BLOCK_N // 2)
    _mlp_fwd_tile(right, B, PRE, ACT, start_m, start_n + BLOCK_N // 2, rows, f, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _mlp_bwd_tile(dact, PRE, DPRE, ACT, start_m, start_n, rows, f, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    begin, offs, mask = _output_tile(start_m, start_n, rows, f, BLOCK_M, BLOCK_N)
    pre = tl.load(PRE + begin + offs, mask, other=0.0).to(tl.float32)
    tl.store(DPRE + begin + offs, (dact * _gelu_derivative(pre)).to(DPRE.dtype.element_ty), mask)
    if ACT is not None:
        tl.store(ACT + begin + offs, _gelu(pre).to(ACT.dtype.element_ty), mask)


@triton.jit(do_not_specialize=("rows",))
def _mlp_bwd_kernel(  # type: ignore[no-untyped-def]
    DY, W, PRE, DPRE, ACT, dy_stride, rows, f, d,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of DPRE = (DY W) * gelu'(PRE) and of ACT = gelu(PRE) (None: not written). DY (rows, d), W (d, f); PRE,
    DPRE and ACT (rows, f), contiguous. ACT may be PRE.
    """
    acc, start_m, start_n = _product_tile(
        DY, W, dy_stride, rows, f, d, False, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M
    )
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    _mlp_bwd_tile(left, PRE, DPRE, ACT, start_m, start_n, rows, f, BLOCK_M, BLOCK_N // 2)
    _mlp_bwd_tile(right, PRE, DPRE, ACT, start_m, start_n + BLOCK_N // 2, rows, f, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _mlp_gelu_fwd_kernel(PRE, ACT, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """ACT = gelu(PRE), of so many elements. ACT may be PRE."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pre = tl.load(PRE + offs, offs < size, other=0.0).to(tl.float32)
    tl.store(ACT + offs, _gelu(pre).to(ACT.dtype.element_ty), offs < size)


@triton.jit
def _mlp_gelu_bwd_kernel(DACT, PRE, DPRE, ACT, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """DPRE = DACT * gelu'(PRE) and ACT = gelu(PRE) (None: not written), of so many elements. DPRE may be DACT, and ACT
    may be PRE.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    pre = tl.load(PRE + offs, mask, other=0.0).to(tl.float32)
    dact = tl.load(DACT + offs, mask, other=0.0).to(tl.float32)
    tl.store(DPRE + offs, (dact * _gelu_derivative(pre)).to(DPRE.dtype.element_ty), mask)
    if ACT is not None:
        tl.store(ACT + offs, _gelu(pre).to(ACT.dtype.element_ty), mask)


# ---- launchers -------------------------------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """Shapes for which the Triton product with its epilogue was faster than the library's product and a pointwise
    kernel: both ends included. machine: the GPU, and the versions of torch and Triton, that said so.
    """

    direction: Literal["forward", "backward"]
    tokens: tuple[int, int]
    f: tuple[int, int]
    machine: str


# No GPU has been measured yet, so the library's products run everywhere.
_FUSED_IS_FASTER: dict[str, tuple[_Measured, ...]] = {}

_only: Literal["fused", "pointwise"] | None = None


@contextmanager
def only(form: Literal["fused", "pointwise"]) -> Iterator[None]:
    """Triton's path in one form while this lasts, both directions and all shapes: to measure what the table shall say,
    and to test. For the whole process, since autograd runs a backward on a GPU in a thread of its own.
    """
    global _only
    before, _only = _only, form
    try:
        yield
    finally:
        _only = before


def _fused(direction: str, name: str, tokens: int, d: int, f: int) -> bool:
    """Whether the Triton product runs, for an architecture. Its loads are slow on rows that are not aligned."""
    if _only is not None:
        return _only == "fused"
    return (d % 16 == 0 and f % 16 == 0) and any(
        direction == m.direction and m.tokens[0] <= tokens <= m.tokens[1] and m.f[0] <= f <= m.f[1]
        for m in _FUSED_IS_FASTER.get(name, ())
    )


class _Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


class _Tiles(NamedTuple):
    """forward, backward: of 16 bit, as large as registers allow, of which the backward's epilogue takes more."""

    forward: _Tile
    backward: _Tile
    fp32: _Tile


_SM_80 = _Tile(128, 128, 32, warps=8, stages=4)
_SM_90 = _Tiles(_Tile(128, 256, 64, 8, 3), _Tile(128, 128, 64, 8, 4), _Tile(64, 64, 32, 4, 3))
_GFX = _Tile(128, 128, 64, 8, 2)
_SMALL = _Tile(32, 64, 32, 1, 1)
_TILES = {
    "sm_80": _Tiles(_SM_80, _SM_80, _SM_90.fp32),
    "sm_86": _Tiles(_SM_80, _SM_80, _SM_90.fp32),
    "sm_90": _SM_90,
    "sm_100": _SM_90,
    "gfx90a": _Tiles(_GFX, _GFX, _Tile(64, 64, 32, 4, 2)),
    "gfx942": _Tiles(_GFX, _GFX, _Tile(64, 64, 32, 4, 2)),
    "interpreter": _Tiles(_SMALL, _SMALL, _SMALL),
}
_GROUP_M = 8
_POINTWISE = {"BLOCK": 2048, "num_warps": 8, "enable_fp_fusion": True}  # 16 bytes a thread in bf16


def _launch(direction: str, a: Tensor, f: int, d: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the options of a product A W with A (rows, d) and f columns."""
    tile = getattr(_TILES[architecture(a.device)], "fp32" if a.dtype == torch.float32 else direction)
    tf32 = a.dtype == torch.float32 and fp32_products(a.device) == "tf32"
    options = {
        "EVEN_K": d % tile.k == 0,
        "PRECISION": "tf32" if tf32 else "ieee",
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP_M": _GROUP_M,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
    return (triton.cdiv(len(a), tile.m) * triton.cdiv(f, tile.n),), options


def _rows(a: Tensor) -> Tensor:
    """a, with neighbouring elements of a row adjacent."""
    return a if a.stride(1) == 1 and a.shape[1] <= a.stride(0) < 2**24 else a.contiguous()  # 32 bits within a tile


def _mlp_fwd(x: Tensor, up: Tensor, up_b: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
    """gelu(pre) and, with `keep`, pre."""
    (rows, d), f = x.shape, up.shape[0]
    if not _fused("forward", architecture(x.device), rows, d, f):
        pre = _linear(x, up, up_b)
        act = torch.empty_like(pre) if keep else pre
        if pre.numel():
            with on_device(x):
                _mlp_gelu_fwd_kernel[(triton.cdiv(pre.numel(), _POINTWISE["BLOCK"]),)](
                    pre, act, pre.numel(), **_POINTWISE
                )
        return act, pre if keep else None
    x = _rows(x)
    act = x.new_empty(rows, f)
    kept = torch.empty_like(act) if keep else None
    grid, options = _launch("forward", x, f, d)
    if grid[0]:
        with on_device(x):
            bias = None if up_b is None else up_b.contiguous()
            _mlp_fwd_kernel[grid](x, up.contiguous(), bias, kept, act, x.stride(0), rows, f, d, **options)
    return act, kept


def _mlp_bwd(dy: Tensor, down: Tensor, pre: Tensor, want_act: bool, own: bool) -> tuple[Tensor, Tensor | None]:
    """dpre and, if wanted, gelu(pre), in pre's memory where that is our own."""
    (rows, d), f = dy.shape, down.shape[1]
    pre = pre.contiguous()
    act = None if not want_act else pre if own else torch.empty_like(pre)
    if not _fused("backward", architecture(dy.device), rows, d, f):
        dpre = product(dy, down.mT)
        if dpre.numel():
            with on_device(dy):
                _mlp_gelu_bwd_kernel[(triton.cdiv(dpre.numel(), _POINTWISE["BLOCK"]),)](
                    dpre, pre, dpre, act, dpre.numel(), **_POINTWISE
                )
        return dpre, act
    dy = _rows(dy)
    dpre = torch.empty_like(pre)
    grid, options = _launch("backward", dy, f, d)
    if grid[0]:
        with on_device(dy):
            _mlp_bwd_kernel[grid](dy, down.contiguous(), pre, dpre, act, dy.stride(0), rows, f, d, **options)
    return dpre, act


def variants(architecture: str) -> list[Variant]:
    """Both products, at depths that fill their tiles and ones that do not, and the pointwise kernels."""
    found = []

    def add(kernel: Any, words: str, dtype: str, constants: dict[str, Any], warps: int, stages: int) -> None:
        names = [name for name in kernel.arg_names if name not in constants]
        types = {name: f"*{dtype}" if name.isupper() else "i32" for name in names}
        divisible = tuple(name for name in names if name != "rows")
        label = f"{kernel.fn.__name__} {dtype} {words}".strip()
        options = {"enable_fp_fusion": True}
        found.append(Variant("mlp", label, kernel, types, constants, divisible, warps, stages, options=options))

    tiles = _TILES[architecture]
    for dtype, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
        if precision == "tf32" and not architecture.startswith("sm_"):
            continue
        for kernel, tile in ((_mlp_fwd_kernel, tiles.forward), (_mlp_bwd_kernel, tiles.backward)):
            tile = tiles.fp32 if dtype == "fp32" else tile
            for even in (True, False):
                constants = {"EVEN_K": even, "PRECISION": precision, "GROUP_M": _GROUP_M}
                constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
                words = [f"{tile.m}x{tile.n}x{tile.k}", *([] if even else ["ragged"])]
                add(
                    kernel, " ".join(words + [precision] * (dtype == "fp32")), dtype, constants, tile.warps, tile.stages
                )
        if precision == "ieee":
            for kernel in (_mlp_gelu_fwd_kernel, _mlp_gelu_bwd_kernel):
                add(kernel, "", dtype, {"BLOCK": _POINTWISE["BLOCK"]}, int(_POINTWISE["num_warps"]), 1)
    return found


# ---- on plain torch --------------------------------------------------------------------------------------------------


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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype != torch.float32:
        return F.linear(x, weight, bias)  # adds the bias before it rounds
    out = product(x, weight)
    return out if bias is None else out.add_(bias)


def _torch_fwd(x: Tensor, up: Tensor, up_b: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
    """As `_mlp_fwd`."""
    pre = _linear(x, up, up_b)
    return F.gelu(pre), pre if keep else None


# ---- the boundary ----------------------------------------------------------------------------------------------------


def _run(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    chunk_size: int | None,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """y (N, d') and pre (N, f), empty with chunk_size."""
    with no_autocast(x):
        up, down, up_b, down_b = _cast(x, up_weight, down_weight, up_bias, down_bias)
        forward = _mlp_fwd if triton else _torch_fwd
        if chunk_size is None:
            act, pre = forward(x, up, up_b, True)
            assert pre is not None
            return _linear(act, down, down_b), pre
        y = x.new_empty(x.shape[0], down_weight.shape[0])
        for i, j in _chunks(x.shape[0], chunk_size):
            y[i:j] = _linear(forward(x[i:j], up, up_b, False)[0], down, down_b)
        return y, x.new_empty(0, up_weight.shape[0])


_op = torch.library.custom_op("mpt::mlp", mutates_args=())(_run)


@_op.register_fake
def _(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    chunk_size: int | None,
    triton: bool,
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
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, up_weight, down_weight, up_bias, down_bias; empty where `wanted` is false."""
    with no_autocast(x):
        up, down, up_b, _ = _cast(x, up_weight, down_weight, up_bias, None)
        ranges, acc = _chunks(x.shape[0], chunk_size), wide(x.dtype)
        dx = torch.empty_like(x) if wanted[0] else x.new_empty(0)
        sums: list[Tensor | None] = [None, None, None, dy.sum(0, dtype=acc) if wanted[4] else None]
        for i, j in ranges:
            x_c, dy_c, alone = x[i:j], dy[i:j], len(ranges) == 1
            pre_c = pre if chunk_size is None else _linear(x_c, up, up_b)
            through = wanted[0] or wanted[1] or wanted[3]
            dpre, act = pre_c, None
            if triton and through:
                dpre, act = _mlp_bwd(dy_c, down, pre_c, wanted[2], own=chunk_size is not None)
            if wanted[2]:
                sums[1] = _plus(sums[1], product(dy_c.mT, (F.gelu(pre_c) if act is None else act).mT), alone)
            if not through:
                continue
            if not triton:
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
    triton: bool,
) -> tuple[Tensor, ...]:
    given = (x, up_weight, down_weight, up_bias, down_bias)
    return tuple(t.new_empty(t.shape) if want and t is not None else x.new_empty(0) for want, t in zip(wanted, given))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for pre, which is nobody's
    ctx.save_for_backward(output[1], *inputs[:5])
    ctx.chunk_size, ctx.triton = inputs[5:]


def _differentiate(ctx: Any, dy: Tensor | None, dpre: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    wanted = list(ctx.needs_input_grad[:5])
    grads = _op_backward(dy, *ctx.saved_tensors, ctx.chunk_size, wanted, ctx.triton)
    return (*(grad if want else None for want, grad in zip(wanted, grads)), None, None)


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
    check_dtypes("mlp", mixed=dtype is not None, **given)
    x = x if dtype is None else x.to(dtype)
    _check(x, up_weight, down_weight, up_bias, down_bias)
    check_chunk_size("mlp", chunk_size)
    which = choose("mlp", x, backend)
    if which == "reference":
        with no_autocast(x):
            up, down, up_b, down_b = _cast(x, up_weight, down_weight, up_bias, down_bias)
            return reference.mlp(x, up, down, up_b, down_b)
    run = _run if eager(x) else _op
    y, _ = run(x.reshape(-1, x.shape[-1]), up_weight, down_weight, up_bias, down_bias, chunk_size, which == "triton")
    return y.view(*x.shape[:-1], y.shape[-1])


def _check(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    up, down = tuple(up_weight.shape), tuple(down_weight.shape)
    if len(up) != 2 or len(down) != 2 or x.dim() < 1 or x.shape[-1] != up[1] or up[0] != down[1]:
        raise ValueError(
            f"mlp: x {tuple(x.shape)}, up_weight {up}, down_weight {down}; pass (..., d), (f, d) and (d', f)"
        )
    for name, bias, width in (("up_bias", up_bias, up[0]), ("down_bias", down_bias, down[0])):
        if bias is not None and tuple(bias.shape) != (width,):
            raise ValueError(f"mlp: {name} is {tuple(bias.shape)}; pass ({width},)")

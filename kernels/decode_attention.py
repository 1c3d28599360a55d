"""Attention of a few new queries on a long key/value cache, with ALiBi, reading only the keys that can matter.

    p_j = softmax over j <= i of (softmax_scale * q_i.k_j - m_h * (i - j)),   out_i = sum_j p_j v_j

Layouts: q and out (B, S, H, D) with S from 1 to 16, caches (B, G, T, D), H % G == 0 (query head h reads kv head h //
(H/G)). Row b holds lengths[b] keys, the new ones included; its queries are the last S of them: query s stands at
position i = lengths[b] - S + s. Scores, softmax and sums are in fp32 (float64 for float64). The row's own constant m*i
leaves softmax unchanged, so the bias is -m * (lengths[b] - 1 - j): one value per key, exact near the end, where keys
matter. There is no derivative.

Exact skipping: with the running maxima of key norms (`update_key_norms` keeps them) the bound of `alibi.first_kept`
gives each query head its first needed key without reading the far ones; the row's total is bounded from below by its
sum over the newest keys.

Triton: the keys of a row from its first needed one are split into pieces of one length. A program of the split kernel
takes a piece for up to 64 rows (S queries times the H/G query heads that share a kv head) and writes maximum, sum and
unnormalised output; the combine kernel merges the pieces (Flash-Decoding, Dao et al. 2023; partial softmax as in
Milakov and Gimelshein, arXiv 1805.02867). The host never waits for `lengths`: the number of pieces follows from T, and
programs beyond a row's end leave at once.

torch: a batched product per run of kv heads with the same end, over the run's window of the cache.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import alibi, reference
from kernels.alibi import GRAIN
from kernels.backend import (
    FP32_MAX,
    architecture,
    autocast_dtype,
    check_dtypes,
    check_slopes,
    check_tensors,
    choose,
    eager,
    fp32_products,
    no_autocast,
    on_device,
    wide,
)
from kernels.compile import Variant
from kernels.product import mkl_at_its_best

MAX_QUERIES = 16
MAX_HEAD_DIM = 256
_BITS = 24

_LOG2E = tl.constexpr(alibi._LOG2E)
_BIG = tl.constexpr(alibi._BIG)
_TINY_SQUARED = tl.constexpr(alibi._TINY**2)
_FAR = tl.constexpr(alibi._FAR)
_LIMIT = tl.constexpr(-(_BITS + 1 / 16))
_GRAIN = tl.constexpr(GRAIN)
_ROWS = tl.constexpr(MAX_QUERIES)
_PART = tl.constexpr(16)  # blocks of key norms that one program finds


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _norms(x):  # type: ignore[no-untyped-def]
    """Euclidean norms of rows, never too small by more than rounding, finite; inf and NaN become the largest."""
    size = tl.sqrt(tl.sum(x * x, 1) + _TINY_SQUARED)
    return tl.where(size < _BIG, size, _BIG)


@triton.jit
def _length(LENGTHS, b, T):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(tl.load(LENGTHS + b), 0), T).to(tl.int32)


@triton.jit
def _rows_first(FIRST, b, heads, H, valid):  # type: ignore[no-untyped-def]
    """The first key that any row of a tile needs, () int32; heads: of its rows."""
    return tl.min(tl.load(FIRST + b * H + heads, mask=valid, other=2147483647), 0)


@triton.jit(do_not_specialize=("S", "blocks", "parts"))
def _update_key_norms_kernel(  # type: ignore[no-untyped-def]
    K, START, NORMS, S, G, blocks, parts, skb, skg, sks, snb, sng, snc, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """K (B, G, S, D) goes to positions START[b].. of the cache. A program takes _PART blocks of a kv head and carries
    the maximum along; that of the blocks before, the first one alone.
    """
    part = tl.program_id(0) % parts
    b = (tl.program_id(0) // parts // G).to(tl.int64)
    g = (tl.program_id(0) // parts % G).to(tl.int64)
    start = tl.load(START + b)
    norms = NORMS + b * snb + g * sng
    before = (start + _GRAIN - 1) // _GRAIN  # blocks that hold a key already
    known = (before > 0) & (before <= blocks) & (part == 0)
    high = tl.load(norms + (before - 1) * snc, mask=known, other=0.0)
    first = tl.maximum(start, 0) // _GRAIN + part * _PART
    end = tl.minimum((start + S + _GRAIN - 1) // _GRAIN, blocks)
    offs_d = tl.arange(0, BLOCK_D)
    for c in range(first, tl.minimum(first + _PART, end)):
        new = c * _GRAIN + tl.arange(0, _GRAIN) - start
        valid = (new >= 0) & (new < S)
        k = tl.load(
            K + b * skb + g * skg + new.to(tl.int64)[:, None] * sks + offs_d[None, :],
            mask=valid[:, None] & (offs_d < D)[None, :],
            other=0.0,
        )
        high = tl.maximum(high, tl.max(tl.where(valid, _norms(k.to(tl.float32)), 0.0), 0))
        tl.store(norms + c * snc, high)


@triton.jit(do_not_specialize=("S", "blocks", "parts"))
def _carry_key_norms_kernel(START, NORMS, S, G, blocks, parts, snb, sng, snc):  # type: ignore[no-untyped-def]
    """After `_update_key_norms_kernel`: each part's maxima count for the parts after it. One program per kv head."""
    b = (tl.program_id(0) // G).to(tl.int64)
    g = (tl.program_id(0) % G).to(tl.int64)
    start = tl.load(START + b)
    norms = NORMS + b * snb + g * sng
    first = tl.maximum(start, 0) // _GRAIN
    end = tl.minimum((start + S + _GRAIN - 1) // _GRAIN, blocks)
    high = tl.load(norms + (first + _PART - 1) * snc, mask=first + _PART <= end, other=0.0)
    for part in range(1, parts):
        c = first + part * _PART + tl.arange(0, _PART)
        found = tl.maximum(tl.load(norms + c * snc, mask=c < end, other=0.0), high)
        tl.store(norms + c * snc, found, mask=c < end)
        high = tl.max(found, 0)


@triton.jit(do_not_specialize=("T", "piece", "pieces"))
def _decode_attention_first_kernel(  # type: ignore[no-untyped-def]
    Q, K, SLOPES, LENGTHS, NORMS, FIRST, scale2, S, H, R, T,
    sqb, sqs, sqh, skb, skg, skt, snb, sng, snc,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEAR: tl.constexpr, CUTS: tl.constexpr, RHO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """FIRST[b, h]: a multiple of 64 such that the keys before it weigh at most 2^-24 of any query's total; 0 keeps all.

    One program per query head: its S queries on the NEAR newest keys, then the search, CUTS candidates at a time.
    """
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    g = h // R
    length = _length(LENGTHS, b, T)
    offs_s = tl.arange(0, _ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(
        Q + b * sqb + h * sqh + offs_s[:, None] * sqs + offs_d[None, :],
        mask=(offs_s < S)[:, None] & (offs_d < D)[None, :],
        other=0.0,
    )
    slope = tl.load(SLOPES + h) * _LOG2E
    position = length - S + offs_s
    near = tl.maximum(length - NEAR, 0) + tl.arange(0, NEAR)
    k = tl.load(
        K + b * skb + g * skg + near.to(tl.int64)[:, None] * skt + offs_d[None, :],
        mask=(near < length)[:, None] & (offs_d < D)[None, :],
        other=0.0,
    )
    away = position[:, None] - near[None, :]
    scores = tl.dot(q, k.T, input_precision=PRECISION) * scale2 - slope * away.to(tl.float32)
    scores = tl.where(away >= 0, scores, float("-inf"))
    top = tl.max(scores, 1)  # -inf, and then low is NaN, where a query sees nothing: it keeps everything
    low = top + tl.log2(tl.sum(tl.exp2(scores - top[:, None]), 1))

    norms = NORMS + b * snb + g * sng
    size = _norms(q.to(tl.float32) * scale2)
    own = tl.load(norms + tl.maximum(length - 1, 0) // _GRAIN * snc)
    rest = RHO * size * tl.where(own < _BIG, own, _BIG) - low
    size *= 1.0 + RHO
    weight = _LOG2E / slope + 0.5 + slope * (1 / (12 * _LOG2E))  # >= 1 / (1 - exp(-slope))

    best = tl.full([], 0, tl.int32)
    span = tl.maximum(length - S, 0) // _GRAIN  # candidates above `best`, which passes
    while span > 0:
        step = (span + CUTS - 1) // CUTS
        c = best + (tl.arange(0, CUTS) + 1) * step
        valid = c <= best + span
        high = tl.load(norms + (c - 1) * snc, mask=valid, other=0.0)
        high = tl.where(high < _BIG, high, _BIG)
        cut = c * _GRAIN
        total = size[:, None] * high[None, :] + rest[:, None]
        total -= _FAR * slope * (position[:, None] + 1 - cut[None, :]).to(tl.float32)
        total += tl.log2(tl.minimum(cut.to(tl.float32), weight))[None, :]
        passes = (total <= _LIMIT) | (offs_s >= S)[:, None]  # false for NaN
        passes = (tl.min(passes.to(tl.int32), 0) > 0) & valid
        found = tl.max(tl.where(passes, c, best), 0)
        span = tl.minimum(step - 1, best + span - found)
        best = found
    tl.store(FIRST + b * H + h, best * _GRAIN)


@triton.jit(do_not_specialize=("T", "piece", "pieces"))
def _decode_attention_split_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, SLOPES, LENGTHS, FIRST, ACC, M, L, scale2, S, H, R, T, piece,
    sqb, sqs, sqh, skb, skg, skt, svb, svg, svt,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys first + i * piece .. first + (i + 1) * piece, i = program 1, of one kv head (program 0) for BLOCK_M rows
    (program 2). Writes ACC (B * H * S, pieces, D), M and L (B * H * S, pieces): maximum in base 2, sum and output
    relative to it.
    """
    G = H // R
    b = (tl.program_id(0) // G).to(tl.int64)
    g = (tl.program_id(0) % G).to(tl.int64)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)  # query s of the group's head r is row r * S + s
    valid = rows < R * S
    heads = g * R + rows // S
    length = _length(LENGTHS, b, T)
    begin = tl.program_id(1) * piece
    if FIRST is not None:
        begin += _rows_first(FIRST, b, heads, H, valid)
    if begin >= length:
        return
    end = tl.minimum(begin + piece, length)

    offs_d = tl.arange(0, BLOCK_D)
    inside_d = (offs_d < D)[None, :]
    q = tl.load(
        Q + b * sqb + heads[:, None] * sqh + (rows % S)[:, None] * sqs + offs_d[None, :],
        mask=valid[:, None] & inside_d,
        other=0.0,
    )
    position = length - S + rows % S
    if SLOPES is not None:
        slope = tl.load(SLOPES + heads, mask=valid, other=0.0) * _LOG2E
    k_head = K + b * skb + g * skg + offs_d[None, :]
    v_head = V + b * svb + g * svg + offs_d[None, :]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n0 in tl.range(begin, end, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        inside = (offs_n < length)[:, None] & inside_d  # what lies beyond the length may be anything, NaN included
        k = tl.load(k_head + offs_n.to(tl.int64)[:, None] * skt, mask=inside, other=0.0)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale2
        if SLOPES is not None:
            scores += slope[:, None] * (offs_n - (length - 1)).to(tl.float32)[None, :]
        scores = tl.where(offs_n[None, :] <= position[:, None], scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - base[:, None])
        alpha = tl.exp2(m_i - base)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(v_head + offs_n.to(tl.int64)[:, None] * svt, mask=inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    out = (tl.program_id(0).to(tl.int64) * (R * S) + rows) * tl.num_programs(1) + tl.program_id(1)
    tl.store(M + out, m_i, mask=valid)
    tl.store(L + out, l_i, mask=valid)
    tl.store(ACC + out[:, None] * D + offs_d[None, :], acc, mask=valid[:, None] & inside_d)


@triton.jit(do_not_specialize=("T", "piece", "pieces"))
def _decode_attention_combine_kernel(  # type: ignore[no-untyped-def]
    ACC, M, L, LENGTHS, FIRST, OUT, S, H, R, T, piece, pieces,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Merges the pieces of one row (program 1) of one kv head (program 0). OUT (B, S, H, D) contiguous."""
    G = H // R
    b = (tl.program_id(0) // G).to(tl.int64)
    g = (tl.program_id(0) % G).to(tl.int64)
    row = tl.program_id(1)
    length = _length(LENGTHS, b, T)
    if FIRST is not None:  # that of the row's tile, as the split kernel had it
        rows = row // BLOCK_M * BLOCK_M + tl.arange(0, BLOCK_M)
        length -= _rows_first(FIRST, b, g * R + rows // S, H, rows < R * S)
    used = (length + piece - 1) // piece

    at = (tl.program_id(0).to(tl.int64) * (R * S) + row) * pieces
    offs_p = tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    highest = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for i in range(0, used, BLOCK_P):
        highest = tl.maximum(highest, tl.load(M + at + i + offs_p, mask=i + offs_p < used, other=float("-inf")))
    top = tl.max(highest, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_P], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for i in range(0, used, BLOCK_P):
        valid = i + offs_p < used
        w = tl.exp2(tl.load(M + at + i + offs_p, mask=valid, other=float("-inf")) - top)
        total += w * tl.load(L + at + i + offs_p, mask=valid, other=0.0)
        part = ACC + (at + i + offs_p)[:, None] * D + offs_d[None, :]
        acc += tl.sum(w[:, None] * tl.load(part, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0), 0)
    l_i = tl.sum(total, 0)
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)  # a query that sees nothing gives 0
    out = OUT + ((b * S + row % S) * H + g * R + row // S) * D + offs_d
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=offs_d < D)


# ---- tiles and launchers ---------------------------------------------------------------------------------------------


class _Machine(NamedTuple):
    """processors: streaming multiprocessors or compute units; block: bytes of a tile of keys; warps, and warps in fp32,
    whose products use no matrix instructions; stages: of the loop; rows: of a tile of queries, at most.
    """

    processors: int
    block: int
    warps: int
    warps_fp32: int
    stages: int
    rows: int


# A tile of 16 KiB of keys and one of values, twice or three times in flight, leave room for two programs per processor.
_MACHINES = {
    "sm_80": _Machine(108, 16384, 4, 4, 2, 32),
    "sm_86": _Machine(84, 8192, 4, 4, 2, 32),
    "sm_90": _Machine(132, 16384, 4, 8, 3, 64),
    "sm_100": _Machine(148, 16384, 4, 8, 3, 64),
    "gfx90a": _Machine(104, 8192, 4, 4, 2, 64),
    "gfx942": _Machine(304, 8192, 4, 4, 2, 64),
    "interpreter": _Machine(4, 4096, 1, 1, 1, 64),
}
_MAX_PIECES = 512
_CUTS = 64
_BLOCK_P = 16


class _Tile(NamedTuple):
    block_d: int
    block_m: int
    block_n: int
    near: int
    rho: float
    precision: str
    warps: int


def _warps(machine: str, dtype: torch.dtype) -> int:
    return _MACHINES[machine].warps_fp32 if dtype == torch.float32 else _MACHINES[machine].warps


def _tile(machine: str, rows: int, d: int, dtype: torch.dtype, told: str = "ieee") -> _Tile:
    """rows: R * S. told: of fp32 products, by torch's user."""
    block_d = max(triton.next_power_of_2(d), 16)
    most = 16 if dtype == torch.float32 else _MACHINES[machine].rows // (2 if block_d > 128 else 1)
    block_m = min(max(triton.next_power_of_2(rows), 16), most)
    block_n = min(max(_MACHINES[machine].block // (block_d * dtype.itemsize), 16), 128 if block_m == 16 else 64)
    tf32 = dtype == torch.float32 and told == "tf32"
    return _Tile(
        block_d,
        block_m,
        block_n,
        min(max(block_n, 32), 64),
        alibi._RHO_TF32 if tf32 else alibi._RHO,
        "tf32" if tf32 else "ieee",
        _warps(machine, dtype),
    )


def _piece(machine: str, heads: int, keys: int, block_n: int, skipping: bool) -> int:
    """Keys of a piece: four programs per processor, sixteen with skipping, where most of them find nothing to do."""
    wanted = _MACHINES[machine].processors * (16 if skipping else 4)
    pieces = min(max(wanted // heads, 1), _MAX_PIECES)
    blocks = triton.cdiv(triton.cdiv(keys, pieces), block_n)
    return max(blocks, 2) * block_n


def _decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    slopes: Tensor | None,
    norms: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, S, H, D) and first (B, H) int32, or (0,) where nothing is skipped."""
    (batch, s, h, d), (g, keys) = q.shape, k.shape[1:3]
    r, machine = h // g, architecture(q.device)
    tile = _tile(machine, r * s, d, q.dtype, fp32_products(q.device))
    options: dict[str, Any] = {"num_warps": tile.warps, "enable_fp_fusion": True}
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty(batch, s, h, d, dtype=q.dtype, device=q.device)
    skipping = slopes is not None and norms is not None
    first = torch.empty((batch, h) if skipping else (0,), dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out, first
    with on_device(q):
        if skipping:
            assert norms is not None
            _decode_attention_first_kernel[(batch * h,)](
                *(q, k, slopes, lengths, norms, first, scale * alibi._LOG2E, s, h, r, keys),
                *(*q.stride()[:3], *k.stride()[:3], *norms.stride()),
                D=d,
                BLOCK_D=tile.block_d,
                NEAR=tile.near,
                CUTS=_CUTS,
                RHO=tile.rho,
                PRECISION=tile.precision,
                **options,
            )
        tiles = triton.cdiv(r * s, tile.block_m)
        piece = _piece(machine, batch * g * tiles, keys, tile.block_n, skipping)
        pieces = triton.cdiv(keys, piece)
        acc = torch.empty(batch * h * s, pieces, d, dtype=torch.float32, device=q.device)
        m, l = (torch.empty(batch * h * s, pieces, dtype=torch.float32, device=q.device) for _ in range(2))
        some = first if skipping else None
        _decode_attention_split_kernel[(batch * g, pieces, tiles)](
            *(q, k, v, slopes, lengths, some, acc, m, l, scale * alibi._LOG2E, s, h, r, keys, piece),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            D=d,
            BLOCK_D=tile.block_d,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            PRECISION=tile.precision,
            num_stages=_MACHINES[machine].stages,
            **options,
        )
        _decode_attention_combine_kernel[(batch * g, r * s)](
            *(acc, m, l, lengths, some, out, s, h, r, keys, piece, pieces),
            D=d,
            BLOCK_D=tile.block_d,
            BLOCK_M=tile.block_m,
            BLOCK_P=_BLOCK_P,
            **options,
        )
    return out, first


def _update_key_norms(norms: Tensor, k: Tensor, start: Tensor) -> None:
    (batch, g, s, d), machine = k.shape, architecture(k.device)
    k = k if k.stride(-1) == 1 else k.contiguous()
    sizes = (s, g, norms.shape[2], triton.cdiv(triton.cdiv(s - 1, GRAIN) + 1, _PART.value))
    with on_device(k):
        _update_key_norms_kernel[(batch * g * sizes[-1],)](
            *(k, start, norms, *sizes, *k.stride()[:3], *norms.stride()),
            D=d,
            BLOCK_D=max(triton.next_power_of_2(d), 16),
            num_warps=_warps(machine, k.dtype),
            num_stages=_MACHINES[machine].stages,
            enable_fp_fusion=True,
        )
        if sizes[-1] > 1:
            _carry_key_norms_kernel[(batch * g,)](start, norms, *sizes, *norms.stride())


_TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_SHIPPED = (
    *((torch.bfloat16, d, rows) for d in (64, 80, 96, 112, 128, 256) for rows in (1, 32, 64)),
    *((dtype, d, 1) for dtype in (torch.float16, torch.float32) for d in (64, 128, 256)),
    (torch.bfloat16, 16, 1),
)


def variants(architecture: str) -> list[Variant]:
    """Every kernel and tile shipped for an architecture, with slopes and with skipping."""
    found = []
    machine = _MACHINES[architecture]
    for dtype, d, rows in _SHIPPED:
        tile, x = _tile(architecture, rows, d, dtype), _TRITON_TYPES[dtype]
        if rows > tile.block_m:
            continue  # fewer rows fill this tile: it is listed
        shape: dict[str, Any] = {"D": d, "BLOCK_D": tile.block_d}
        precise: dict[str, Any] = {"PRECISION": tile.precision}
        kernels: list[tuple[Any, dict[str, Any], int | None]] = [
            (
                _decode_attention_split_kernel,
                shape | precise | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
                tile.block_m * tile.block_n,
            )
        ]
        if rows == 1:
            kernels += [
                (
                    _decode_attention_first_kernel,
                    shape | precise | {"NEAR": tile.near, "CUTS": _CUTS, "RHO": tile.rho},
                    None,
                ),
                (_decode_attention_combine_kernel, shape | {"BLOCK_M": tile.block_m, "BLOCK_P": _BLOCK_P}, None),
                (_update_key_norms_kernel, shape, None),
            ]
        if (dtype, d, rows) == _SHIPPED[0]:
            kernels.append((_carry_key_norms_kernel, {}, None))
        for kernel, constants, scores in kernels:
            types = {name: _argument_type(name, x) for name in kernel.arg_names if name not in constants}
            name = kernel.__name__.strip("_").removesuffix("_kernel")
            sizes = " ".join(
                f"{k.removeprefix('BLOCK_')} {constants[k]}" for k in ("BLOCK_M", "BLOCK_N") if k in constants
            )
            found.append(
                Variant(
                    op="update_key_norms" if "key_norms" in name else "decode_attention",
                    label=f"{name} {x} D {d} {sizes}".rstrip(),
                    kernel=kernel,
                    signature=types,
                    constants=constants,
                    divisible=tuple(n for n, t in types.items() if t.startswith("*") or n in _DIVISIBLE),
                    num_warps=tile.warps,
                    num_stages=machine.stages,
                    scores=scores,
                    options={"enable_fp_fusion": True},
                )
            )
    return found


_DIVISIBLE = ("sqb", "sqs", "sqh", "skb", "skg", "sks", "skt", "svb", "svg", "svt")


def _argument_type(name: str, dtype: str) -> str:
    pointers = {"Q": dtype, "K": dtype, "V": dtype, "OUT": dtype, "LENGTHS": "i64", "START": "i64", "FIRST": "i32"}
    if name.isupper() and name not in ("S", "H", "R", "G", "T"):
        return "*" + pointers.get(name, "fp32")
    return "fp32" if name == "scale2" else "i32"


# ---- torch -----------------------------------------------------------------------------------------------------------

_NEAR = 32  # newest keys, whose largest term bounds a row's total from below
_LEAST = 2**32  # elements of keys times their length, below which finding the windows costs more than it saves
_WASTE = 2**15  # elements of keys that cost as much to read as a few calls: runs are joined over so many
_FEW = 8  # queries of one product
_CAST = 2**20  # elements of a cache in low precision that are widened at once


def _decode_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    slopes: Tensor | None,
    norms: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, S, H, D) and first (B, H) int32, or (0,) where nothing is skipped."""
    (batch, s, h, d), (g, keys) = q.shape, k.shape[1:3]
    r, up = h // g, wide(q.dtype)
    qs = q.to(up).view(batch, s, g, r, d).permute(0, 2, 3, 1, 4) * scale
    skipping = slopes is not None and norms is not None
    first = torch.zeros((batch, h) if skipping else (0,), dtype=torch.int32, device=q.device)
    begin = [0] * (batch * g)
    if slopes is not None and norms is not None and batch * g * d * keys**2 >= _LEAST:
        first = _first_needed(qs, k, lengths, slopes, norms, 53 if up == torch.float64 else _BITS)
        begin = first.view(batch * g, r).amin(1).tolist()
    end = [n for n in lengths.tolist() for _ in range(g)]
    m = None if slopes is None else slopes.to(up).view(1, g, r, 1, 1).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    away = torch.arange(1 - keys, 1, device=q.device, dtype=up)  # -(length - 1 - j), for the last keys of any length
    later = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1) if s > 1 else None
    qs = qs.reshape(batch * g, r * s, d)
    out = qs.new_zeros(batch * g, r * s, d)
    limit = _CAST if k.dtype != up else None
    for k_part, v_part, n0 in _parts(k, v):
        for i, j, a, b in _runs(begin[n0 : n0 + len(k_part)], end[n0 : n0 + len(k_part)], d, limit):
            at = slice(n0 + i, n0 + j)
            scores = _products(k_part[i:j, a:b].to(up), qs[at]).view(j - i, r, s, b - a)
            if m is not None:
                scores.addcmul_(m[at], away[keys - (b - a) :])
            if later is not None:
                scores[..., -s:].masked_fill_(later, float("-inf"))
            p = torch.softmax(scores, -1).view(j - i, r * s, b - a)
            torch.bmm(p, v_part[i:j, a:b].to(up), out=out[at])
    out = out.view(batch, g, r, s, d).permute(0, 3, 1, 2, 4).reshape(q.shape)
    return out.to(q.dtype).contiguous(), first


def _products(k: Tensor, q: Tensor) -> Tensor:
    """q k^T (n, rows, keys), contiguous. On most CPUs a product with few columns is faster than one with few rows, and
    sums each element in parts, where the other adds term by term from 4 rows on. On Intel's one with few rows is the
    faster, and sums in parts up to 2 rows, for which 4 take no longer in two products.
    """
    if mkl_at_its_best():
        few = 2 if q.shape[1] <= 4 else q.shape[1]
        return torch.cat([torch.bmm(rows, k.mT) for rows in q.split(few, 1)], 1)
    parts = [torch.bmm(k, few.mT) for few in q.split(_FEW, 1)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).mT.contiguous()


def _parts(k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The caches as views (heads, T, D), each with its first index in the folded (batch, kv head) dimension: one part
    where the strides allow, else one per batch row.
    """
    b, g = k.shape[:2]
    if all(b == 1 or x.stride(0) == g * x.stride(1) for x in (k, v)):
        yield k.flatten(0, 1), v.flatten(0, 1), 0
    else:
        for i in range(b):
            yield k[i], v[i], i * g


def _runs(begin: list[int], end: list[int], d: int, limit: int | None) -> list[tuple[int, int, int, int]]:
    """(i, j, a, b): neighbours i..j with keys a..b, all ending at b. Joined where that reads little that is not needed,
    up to `limit` elements.
    """
    runs: list[tuple[int, int, int, int]] = []
    for n, (a, b) in enumerate(zip(begin, end)):
        if runs and runs[-1][3] == b:
            i, j, a0, _ = runs[-1]
            low = min(a, a0)
            waste = (a0 - low) * (j - i) + a - low
            if waste * d <= _WASTE and (limit is None or (n + 1 - i) * (b - low) * d <= limit):
                runs[-1] = (i, n + 1, low, b)
                continue
        runs.append((n, n + 1, a, b))
    return runs


def _first_needed(q: Tensor, k: Tensor, lengths: Tensor, slopes: Tensor, norms: Tensor, bits: int) -> Tensor:
    """(B, H) int32, multiples of 64: the keys before weigh at most 2^-bits of any of the head's queries' total.

    q (B, G, R, S, D), times the softmax scale; T at least 64. The method is `alibi.first_kept`'s, every cut tried at
    once.
    """
    b, g, r, s, d = q.shape
    rho = alibi._RHO if q.device.type == "cpu" else alibi._RHO_TF32
    q, slope, ends = q.float(), slopes.view(g, r, 1, 1), lengths.float()[:, None]  # exact up to 2^24
    start = (lengths - _NEAR).clamp(min=0).tolist()
    near = torch.stack([k[i, :, n : n + _NEAR] for i, n in enumerate(start)]).float()
    position = ends - s + torch.arange(s, device=q.device, dtype=torch.float32)
    at = (ends - _NEAR).clamp(min=0) + torch.arange(_NEAR, device=q.device, dtype=torch.float32)
    away = (position[:, :, None] - at[:, None])[:, None, None]
    scores = (q.reshape(b, g, r * s, d) @ near.mT).view(b, g, r, s, _NEAR)
    low = (scores - slope * away).masked_fill_(away < 0, float("-inf")).amax(-1, keepdim=True) * alibi._LOG2E
    low = torch.where(low < alibi._BIG, low, float("-inf"))  # inf and NaN keep everything

    last = (lengths - 1) // GRAIN
    norms = torch.where(norms < alibi._BIG, norms, alibi._BIG)
    own = norms.gather(2, last[:, None, None].expand(b, g, 1)).view(b, g, 1, 1, 1)
    high = norms[:, :, None, None, : max(start) // GRAIN + 1]
    cut = torch.arange(1, high.shape[-1] + 1, device=q.device, dtype=torch.float32) * GRAIN
    size = alibi._norms(q)[..., None] * alibi._LOG2E
    geometric = 1 / slope + 0.5 + slope / 12  # >= 1 / (1 - exp(-slope)); inf for slope 0
    worst = (size * (1 + rho)) * high + (rho * size * own - low)
    worst -= alibi._FAR * alibi._LOG2E * slope * ((position + 1)[:, :, None] - cut)[:, None, None]
    worst += torch.minimum(cut, geometric).log2()
    passes = (worst <= -(bits + 1 / 16)).all(3) & (cut <= ends - s)[:, None, None]
    return (passes * cut).amax(-1).int().view(b, g * r)


def _update_key_norms_torch(norms: Tensor, k: Tensor, start: Tensor) -> None:
    new, starts = alibi._norms(k.to(wide(k.dtype))).float(), start.tolist()
    if len(set(starts)) == 1:
        _append_norms(norms, new, starts[0])
    else:
        for row, n in enumerate(starts):
            _append_norms(norms[row : row + 1], new[row : row + 1], n)


def _append_norms(norms: Tensor, new: Tensor, start: int) -> None:
    """new (B, G, S): norms of the keys at start, start + 1, ..."""
    end = start + new.shape[2]
    first, last = start // GRAIN, -(-end // GRAIN)
    if last - first == 1:
        high = new.amax(-1, keepdim=True)
    else:
        high = F.pad(new, (start % GRAIN, -end % GRAIN)).unflatten(2, (-1, GRAIN)).amax(-1).cummax(-1).values
    if start > 0:  # the maximum so far, which is that of the block that holds the key before
        high = torch.maximum(high, norms[..., (start - 1) // GRAIN, None])
    norms[..., first:last] = high


# ---- the boundary ----------------------------------------------------------------------------------------------------


def _run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    slopes: Tensor | None,
    key_norms: Tensor | None,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    if not triton or lengths.device.type == "cpu":
        _check_lengths(q, k_cache, lengths)
    run = _decode_attention if triton else _decode_attention_torch
    with no_autocast(q):
        return run(q, k_cache, v_cache, lengths, slopes, key_norms, scale)


_op = torch.library.custom_op("mpt::decode_attention", mutates_args=())(_run)


@_op.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    slopes: Tensor | None,
    key_norms: Tensor | None,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    first = (0,) if slopes is None or key_norms is None else (q.shape[0], q.shape[2])
    return q.new_empty(q.shape), q.new_empty(first, dtype=torch.int32)


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    raise NotImplementedError(
        "mpt::decode_attention has no derivative: it is for generation; differentiate kernels.flash_attention, or run "
        "under torch.no_grad()"
    )


_op.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


def _update(key_norms: Tensor, k_new: Tensor, start: Tensor, triton: bool) -> None:
    if k_new.numel() == 0:
        return
    if not triton or start.device.type == "cpu":
        starts, room = start.tolist(), key_norms.shape[2] * GRAIN
        low, high = min(starts), max(starts) + k_new.shape[2]
        if low < 0 or high > room:
            raise ValueError(
                f"update_key_norms: keys go to positions {low} to {high - 1}, and key_norms covers 0 to {room - 1}"
            )
    (_update_key_norms if triton else _update_key_norms_torch)(key_norms, k_new, start)


_op_update = torch.library.custom_op("mpt::update_key_norms", mutates_args=("key_norms",))(_update)


@_op_update.register_fake
def _(key_norms: Tensor, k_new: Tensor, start: Tensor, triton: bool) -> None:
    return None


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    key_norms: Tensor | None = None,
    return_kept: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last S positions of each row on that row's cache: generation's step. Causal, ragged batch.

    q (B, S, H, D), S from 1 to 16, any strides; k_cache and v_cache (B, G, T, D), H % G == 0, any strides but the last,
    which is 1; D up to 256; fp16, bf16, fp32 or fp64, one dtype (under autocast q is cast to the caches', which stay).
    lengths (B,) int32 or int64: the keys of each row, those of the queries included, S <= lengths[b] <= T. Query s of
    row b is at position i = lengths[b] - S + s and sees the keys j <= i; what the caches hold beyond a row's length is
    not read. alibi_slopes (H,): adds -slope * (i - j). softmax_scale: None is 1/sqrt(D).
    key_norms (B, G, ceil(T / 64)) fp32: for each block of 64 keys the largest |k| in it or before it in its row, as
    `update_key_norms` keeps them, up to date with the new keys. With slopes, keys that provably weigh at most 2^-24 of
    their row (fp64: 2^-53) are then not read, for any input; out differs by at most 2^-23 * max|v|. None reads every
    key up to the length.

    Returns out (B, S, H, D) contiguous, in the dtype of q; with return_kept also kept, a 0-d fp32 tensor: the keys from
    the first one that a kv head needs, as a share of those up to the length.

    Not differentiable: its backward raises NotImplementedError. The Triton path does not wait for lengths on a GPU:
    there one above T counts as T, and a query at a negative position sees nothing and gives 0. TypeError on dtypes,
    devices, DTensors; ValueError on shapes and values.
    """
    check_tensors("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths, key_norms=key_norms)
    if autocast_dtype(q) is not None:
        q = q.to(k_cache.dtype)
    check_dtypes("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache)
    _check_shapes(q, k_cache, v_cache, lengths, alibi_slopes, key_norms)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not 0.0 <= scale < FP32_MAX:
        raise ValueError(f"softmax_scale is {softmax_scale}; it must be finite and not negative (None: 1/sqrt(D))")
    which = choose("decode_attention", q, backend)
    if which == "reference":
        _check_lengths(q, k_cache, lengths)
        with no_autocast(q):
            kwargs: dict[str, Any] = {"alibi_slopes": alibi_slopes, "softmax_scale": scale, "return_kept": return_kept}
            return reference.decode_attention(q, k_cache, v_cache, lengths, **kwargs)
    slopes = None if alibi_slopes is None else alibi_slopes.detach().to(q.device, torch.float32).contiguous()
    run = _run if eager(q) else _op
    out, first = run(q, k_cache, v_cache, lengths, slopes, key_norms, scale, which == "triton")
    if not return_kept:
        return out
    if slopes is None or key_norms is None or not len(q):
        return out, torch.ones((), device=q.device)
    skipped = first.view(*k_cache.shape[:2], -1).amin(-1).sum()
    return out, (1 - skipped / (lengths.sum() * k_cache.shape[1])).float()


def update_key_norms(key_norms: Tensor, k_new: Tensor, start: int | Tensor, *, backend: str | None = None) -> None:
    """Takes new keys into the running maxima of key norms that `decode_attention` skips by. In place.

    key_norms (B, G, ceil(T / 64)) fp32, `torch.zeros` or `torch.empty` to begin with. k_new (B, G, S, D), any S: the
    keys that are appended to a cache (B, G, T, D) from position `start` on, an int or (B,) int32 or int64, in the
    cache's dtype. A row that starts again, at any position, forgets what lay there and after.

    TypeError on dtypes, devices, DTensors; ValueError on shapes, and on positions outside key_norms (the Triton path
    does not wait for a `start` on a GPU: there it leaves such keys out).
    """
    if isinstance(start, int):
        start = torch.full((k_new.shape[0],), start, dtype=torch.long, device=k_new.device)
    check_tensors("update_key_norms", key_norms=key_norms, k_new=k_new, start=start)
    check_dtypes("update_key_norms", k_new=k_new)
    if k_new.dim() != 4 or key_norms.dim() != 3 or key_norms.shape[:2] != k_new.shape[:2] or key_norms.shape[2] == 0:
        raise ValueError(
            f"update_key_norms: key_norms {tuple(key_norms.shape)}, k_new {tuple(k_new.shape)}; pass key_norms (B, G, "
            "ceil(T / 64)) and k_new (B, G, S, D)"
        )
    _check_key_norms_dtype(key_norms)
    _check_integers("start", start, k_new.shape[0])
    which = choose("update_key_norms", k_new, backend)
    run = _update if eager(k_new) else _op_update
    run(key_norms, k_new.detach(), start, which == "triton")


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, slopes: Tensor | None, key_norms: Tensor | None
) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)}, k_cache {tuple(k.shape)}, v_cache {tuple(v.shape)}; pass q "
            "(B, S, H, D) and caches (B, G, T, D)"
        )
    (_, s, h, d), (g, keys) = q.shape, k.shape[1:3]
    if not h or not g or h % g:
        raise ValueError(f"decode_attention: {h} heads of q on {g} of the caches; H must be a multiple of G")
    if not 1 <= s <= MAX_QUERIES:
        raise ValueError(f"decode_attention: q has {s} queries; 1 to {MAX_QUERIES}, more are for flash_attention")
    if not 1 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"decode_attention: head dimension {d}; it must be 1 to {MAX_HEAD_DIM}")
    if keys < s:
        raise ValueError(f"decode_attention: caches of {keys} keys cannot hold those of {s} queries; append them first")
    for name, cache in (("k_cache", k), ("v_cache", v)):
        if cache.stride(-1) != 1 and d > 1:
            raise ValueError(f"{name} has strides {cache.stride()}; its last must be 1, or each step would copy it")
    _check_integers("lengths", lengths, q.shape[0])
    check_slopes("decode_attention", slopes, q, h)
    if key_norms is not None:
        _check_key_norms_dtype(key_norms)
        wanted = (*k.shape[:2], -(-keys // GRAIN))
        if key_norms.shape != wanted:
            raise ValueError(f"key_norms is {tuple(key_norms.shape)}; pass (B, G, ceil(T / {GRAIN})) = {wanted}")


def _check_integers(name: str, given: Tensor, batch: int) -> None:
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {given.dtype}; pass int32 or int64")
    if given.shape != (batch,):
        raise ValueError(f"{name} is {tuple(given.shape)}; pass one per row: ({batch},)")


def _check_key_norms_dtype(key_norms: Tensor) -> None:
    if key_norms.dtype != torch.float32:
        raise TypeError(f"key_norms is {key_norms.dtype}; they are float32 whatever the cache's dtype")


def _check_lengths(q: Tensor, k: Tensor, lengths: Tensor) -> None:
    for row, length in enumerate(lengths.tolist()):
        if not q.shape[1] <= length <= k.shape[2]:
            raise ValueError(
                f"lengths[{row}] is {length}; it counts the row's keys with those of its {q.shape[1]} queries, and the "
                f"caches hold {k.shape[2]}: pass {q.shape[1]} to {k.shape[2]}"
            )

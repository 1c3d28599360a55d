"""Attention with ALiBi that never holds the (S, T) scores, and that reads only the keys which can matter.

    s_ij = softmax_scale * q_i.k_j - m_h * |i - j|        i, j positions: query i of the call lies at query_offset + i
    p_ij = exp(s_ij - lse_i) over the visible j,  lse_i = log sum_j exp(s_ij),  out_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i.v_j - do_i.out_i + dlse_i),  dq_i = softmax_scale sum_j ds_ij k_j, ...

Layouts: q and out (B, S, H, D), k and v (B, T, G, D) with H % G == 0 (query head h reads kv head h // (H/G)), lse (B,
H, S). Scores, bias, softmax and lse are in fp32 (float64 for float64); probabilities are cast to v's dtype, as MPT
does.

Triton (kernels in flash_attention_kernels.py): online softmax over tiles, and a backward that recomputes the
probabilities from q, k and lse in one kernel for dq and one for dk and dv, without atomics: it repeats itself bit by
bit. Saved: q, k, v, out, lse and each tile's first key. q, k, v are read through their strides (views of one Wqkv
output need no copy), on sm_90 and sm_100 by TMA where addresses and strides are multiples of 16 bytes; a tensor whose
last stride is not 1, or which alone is not aligned, is copied. fp32 is multiplied as torch's
`torch.backends.cuda.matmul.fp32_precision` says ("ieee" exactly, "tf32" on NVIDIA); where it says nothing, exactly, but
on sm_90 in three bf16 parts. Elsewhere: flash_attention_torch.py.

Skipping is on the left of the diagonal: with `prefix_mask` or without causality, keys to the right are all read, and
serve in the bound as other near keys do.

Dao et al. 2022 (arXiv 2205.14135), Dao 2023 (arXiv 2307.08691); ALiBi: Press et al. 2022 (arXiv 2108.12409).
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import flash_attention_kernels as device
from kernels import flash_attention_torch as plain
from kernels import reference
from kernels.backend import (
    FP32_MAX,
    architecture,
    autocast_dtype,
    check_dtypes,
    check_slopes,
    check_tensors,
    choose,
    fp32_products,
    no_autocast,
    on_device,
    refuse_second_derivative,
    wide,
)
from kernels.compile import Variant

# ---- tiles -----------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    m: int  # queries
    n: int  # keys
    warps: int
    stages: int


class _Tiles(NamedTuple):
    """m of fwd is a multiple of the others'; the n of each divides `skip`."""

    fwd: _Tile
    dq: _Tile
    dkdv: _Tile
    split: bool = False  # dk and dv by a kernel each: half the accumulators

    @property
    def skip(self) -> int:
        """Keys in a block that is kept or skipped."""
        return max(64, self.fwd.n) if self.fwd.m > 32 else self.fwd.n


_INTERPRETER = _Tiles(_Tile(32, 32, 4, 1), _Tile(32, 32, 4, 1), _Tile(32, 32, 4, 1))
# Exact products of fp32 take no matrix unit: of what was compiled for sm_90 at D 128, this spills the least (0.2 KB
# forward, 2.4 KB dq, 1.9 KB dk and dv, against 11, 15 and 30 at 32 x 32 with 4 warps).
_FP32 = _Tiles(_Tile(16, 32, 8, 1), _Tile(16, 32, 8, 1), _Tile(16, 32, 8, 1))
# On sm_90, where the matrix unit reads from shared memory, products in parts take a fourth to an eighth of the
# instructions of exact ones, though they spill as well at D 128. On sm_80 all parts lie in registers, and the backward
# takes more than exact; on sm_100 they do not fit into tensor memory.
_FP32_SM_90 = {
    64: _Tiles(_Tile(128, 64, 8, 1), _Tile(128, 64, 8, 1), _Tile(64, 64, 4, 1)),
    128: _Tiles(_Tile(128, 32, 8, 1), _Tile(128, 32, 8, 1), _Tile(64, 64, 8, 1)),
    256: _Tiles(_Tile(64, 32, 8, 1), _Tile(64, 32, 8, 1), _Tile(64, 32, 8, 1), split=True),
}
_AMPERE = {  # within the 99 KB of sm_86
    64: _Tiles(_Tile(128, 64, 8, 2), _Tile(64, 64, 4, 2), _Tile(64, 64, 4, 2)),
    128: _Tiles(_Tile(128, 64, 8, 2), _Tile(128, 32, 8, 2), _Tile(64, 64, 8, 2)),
    256: _Tiles(_Tile(64, 32, 8, 1), _Tile(64, 32, 8, 1), _Tile(32, 32, 8, 1), split=True),
}
_AMD = {  # within 64 KB
    64: _Tiles(_Tile(128, 64, 4, 1), _Tile(64, 64, 4, 1), _Tile(64, 64, 4, 1)),
    128: _Tiles(_Tile(128, 32, 8, 1), _Tile(64, 32, 4, 1), _Tile(32, 64, 4, 1)),
    256: _Tiles(_Tile(64, 32, 4, 1), _Tile(32, 32, 4, 1), _Tile(32, 32, 4, 1), split=True),
}
# Of fp16 and bf16, by head dimension, padded to a power of two and at least 64.
_TILES: dict[str, dict[int, _Tiles]] = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE,
    "sm_90": {
        64: _Tiles(_Tile(128, 128, 8, 2), _Tile(128, 64, 8, 2), _Tile(128, 64, 8, 2)),
        128: _Tiles(_Tile(128, 64, 8, 2), _Tile(128, 64, 8, 2), _Tile(128, 64, 8, 2)),
        256: _Tiles(_Tile(128, 64, 8, 2), _Tile(128, 64, 8, 1), _Tile(128, 64, 8, 1), split=True),
    },
    "sm_100": {
        64: _Tiles(_Tile(128, 128, 8, 2), _Tile(128, 64, 8, 2), _Tile(128, 64, 8, 2)),
        128: _Tiles(_Tile(128, 64, 8, 2), _Tile(128, 64, 8, 2), _Tile(128, 64, 8, 1)),
        256: _Tiles(_Tile(128, 64, 8, 1), _Tile(128, 32, 8, 1), _Tile(128, 32, 8, 1), split=True),
    },
    "gfx90a": _AMD,
    "gfx942": _AMD,
}
_TMA = {"sm_90", "sm_100"}
_FAR_ROWS = 2**24  # elements between rows, times the 128 of a tile


def _tiles(name: str, d: int, dtype: torch.dtype, products: str, dropout: bool) -> _Tiles:
    """The tiles for an architecture's name and a head dimension."""
    if name == "interpreter":
        return _INTERPRETER
    if dtype == torch.float32 and (products == "ieee" or name != "sm_90"):
        return _FP32
    tiles = (_FP32_SM_90 if dtype == torch.float32 else _TILES[name])[max(64, triton.next_power_of_2(d))]
    if not dropout:
        return tiles
    # random numbers take registers
    return tiles._replace(
        **{part: t._replace(n=max(32, t.n // 2)) for part, t in tiles._asdict().items() if part != "split"}
    )


def _splits(tiles: _Tiles, group: int, dropout: bool) -> bool:
    """Whether dk and dv have a kernel each: a loop over heads, and random numbers, need registers."""
    return tiles.split or group > 1 or dropout


# ---- launchers -------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What a call and its backward share, beside q, k, v."""

    mode: int  # bits of flash_attention_kernels
    tiles: _Tiles
    products: str  # Triton's input_precision
    slopes: Tensor | None
    order: Tensor | None  # heads in the order in which programs take them
    kv_order: Tensor | None
    key_ids: Tensor | None
    query_ids: Tensor | None
    prefix_mask: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float
    offset: int
    window: int

    @property
    def skips(self) -> bool:
        return bool(self.mode & device.SKIP.value)

    def masks(self) -> tuple[Tensor | None, ...]:
        return self.key_ids, self.query_ids, self.prefix_mask


def _products(q: Tensor) -> str:
    """Triton's input_precision. Of fp32 on sm_90, where nobody said otherwise: six products of the three bf16 parts of
    a number, which keep its 24 bits on matrix units.
    """
    told = fp32_products(q.device) if q.dtype == torch.float32 else "ieee"
    return ("bf16x6" if architecture(q.device) == "sm_90" else "ieee") if told == "none" else told


def _tiles_for(q: Tensor, products: str, dropout_p: float) -> _Tiles:
    return _tiles(architecture(q.device), q.shape[-1], q.dtype, products, dropout_p > 0)


def _skips(tiles: _Tiles, q: Tensor, k: Tensor, slopes: Tensor | None, query_offset: int, skip: bool) -> bool:
    """Whether a call looks for keys to skip: not where the blocks near the diagonal are nearly all."""
    return skip and slopes is not None and min(query_offset + q.shape[1], k.shape[1]) > 4 * tiles.skip


def _call(
    q: Tensor,
    k: Tensor,
    slopes: Tensor | None,
    attention_mask: Tensor | None,
    sequence_id: Tensor | None,
    prefix_mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    query_offset: int,
    dropout_p: float,
    *,
    products: str,
    skip: bool,
) -> _Call:
    flags = {
        device.CAUSAL: causal,
        device.WINDOW: window is not None,
        device.IDS: attention_mask is not None or sequence_id is not None,
        device.DOCS: sequence_id is not None,
        device.PREFIX: prefix_mask is not None,
        device.ALIBI: slopes is not None,
        device.DROPOUT: dropout_p > 0,
        device.SKIP: skip,
        device.EXACT: q.dtype == torch.float32,
    }
    mode = sum(int(bit.value) for bit, on in flags.items() if on)
    query_ids = key_ids = None
    if sequence_id is not None:
        query_ids = key_ids = int32_ids(sequence_id)
    if attention_mask is not None:
        key_ids = torch.where(attention_mask, 0 if query_ids is None else query_ids, -1).int().contiguous()
    prefix_mask = None if prefix_mask is None else prefix_mask.to(torch.int8).contiguous()
    slopes = None if slopes is None else slopes.to(q.device, torch.float32).contiguous()
    order = kv_order = None
    if skip and slopes is not None:
        group = q.shape[2] // k.shape[2]
        order = _order(slopes, 1)
        kv_order = order if group == 1 else _order(slopes, group)
    window = min(window or 0, query_offset + q.shape[1] + k.shape[1])
    tiles = _tiles_for(q, products, dropout_p)
    seed = seed.to(q.device) if seed is not None and dropout_p > 0 else None
    masks = (key_ids, query_ids, prefix_mask, seed)
    return _Call(mode, tiles, products, slopes, order, kv_order, *masks, scale, dropout_p, query_offset, window)


def int32_ids(sequence_id: Tensor) -> Tensor:
    """int32 (B, T), contiguous, of integer ids (B, T): equal where the ids of a row are, in their order, and -1 where
    those are negative. 64-bit ids become their ranks, for which nothing waits for the GPU, as looking at their size
    would; whoever calls flash_attention with the same ids many times spares that by passing these.
    """
    if sequence_id.dtype != torch.int64:
        return sequence_id.int().clamp(min=-1).contiguous()
    values, order = sequence_id.sort(dim=1)
    ranks = torch.nn.functional.pad(values.diff(dim=1) != 0, (1, 0)).cumsum(1)
    return torch.where(sequence_id < 0, -1, ranks.gather(1, order.argsort(dim=1))).int()


def _order(slopes: Tensor, group: int) -> Tensor:
    """(H / group,): by ascending slope."""
    n = len(slopes) // group
    order = torch.empty(n, dtype=torch.int32, device=slopes.device)
    device._flash_attention_order_kernel[(1,)](order, slopes, n, GROUP=group, N=triton.next_power_of_2(n))
    return order


def _bounds(call: _Call, batch: int, s: int, t: int, tile: int, keys: bool) -> Tensor | None:
    """Where each tile of rows (keys: of keys) has something to see, (B, tiles, 4); None without masks."""
    if all(mask is None for mask in call.masks()):
        return None
    tiles = triton.cdiv(t if keys else s, tile)
    bounds = torch.empty(
        batch, tiles, 4, dtype=torch.int32, device=next(m for m in call.masks() if m is not None).device
    )
    chunk = min(1024, triton.next_power_of_2(s if keys else t))
    args = (bounds, *call.masks(), s, t, call.offset, tiles)
    device._flash_attention_bounds_kernel[(batch * tiles,)](*args, MODE=call.mode, KEYS=keys, TILE=tile, CHUNK=chunk)
    return bounds


def _key_max(k: Tensor, block: int) -> Tensor:
    """(B, G, blocks + 1): entry c is the largest norm of the keys before block c."""
    (b, t, g, d), blocks = k.shape, triton.cdiv(k.shape[1], block)
    key_max = torch.empty(b, g, blocks + 1, dtype=torch.float32, device=k.device)
    args = (key_max, k, t, g, blocks, *_strides(k))
    device._flash_attention_key_norm_kernel[(b * g * blocks,)](*args, DH=d, D=_padded(d), SKIP_N=block)
    chunk = min(1024, triton.next_power_of_2(blocks + 1))
    device._flash_attention_key_max_kernel[(b * g,)](key_max, blocks + 1, CHUNK=chunk)
    return key_max


def _padded(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and row of x (B, S, H, D)."""
    return x.stride(0), x.stride(2), x.stride(1)


def _aligned(x: Tensor) -> bool:
    """Whether TMA can read it."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape) if size > 1]
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride * x.itemsize % 16 == 0 for stride in strides)


def _readable(*tensors: Tensor) -> tuple[bool, list[Tensor]]:
    """Whether TMA reads them; the tensors, copied where a last stride is not 1, where a tile of rows spans more than 32
    bits tell, or where one alone is not aligned.
    """
    found = [x if x.stride(-1) == 1 and x.stride(1) < _FAR_ROWS else x.contiguous() for x in tensors]
    if architecture(found[0].device) not in _TMA or found[0].shape[-1] * found[0].itemsize % 16:
        return False, found
    return True, [x if _aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in found]


def _source(x: Tensor, rows: int, tma: bool) -> Any:
    """x (B, S, H, D) as the kernels take it: a descriptor of (B, H, S, D) in blocks of `rows`, or a pointer."""
    if not tma:
        return x
    strides = [stride if size > 1 else 16 for stride, size in zip(x.stride(), x.shape)]
    order = (0, 2, 1, 3)
    block = [1, 1, rows, _padded(x.shape[-1])]
    return TensorDescriptor(x, [x.shape[i] for i in order], [*(strides[i] for i in order[:3]), 1], block)


@functools.lru_cache(maxsize=256)
def _pairs(s: int, t: int, offset: int, tile: int, triangular: bool) -> int:
    """Query-key pairs of a head in a call without masks, in tiles of rows."""
    ends = [min(first + tile, s) for first in range(0, s, tile)]
    return sum((end - i * tile) * (min(t, offset + end) if triangular else t) for i, end in enumerate(ends))


def _flash_attention_fwd(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, S, H, D), lse (B, H, S), the first key of each tile (empty without skipping), each tile's share in `kept`
    (B, H, tiles).
    """
    (b, s, h, d), (t, g), tile = q.shape, k.shape[1:3], call.tiles.fwd
    tiles, blocks, skip = triton.cdiv(s, tile.m), triton.cdiv(t, call.tiles.skip), call.skips
    out = torch.empty(b, s, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    share = torch.empty(b, h, tiles, dtype=torch.float32, device=q.device)
    starts = torch.empty(share.shape if skip else 0, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out, lse, starts, share
    triangular = bool(device.CAUSAL.value & call.mode) and call.prefix_mask is None
    unit = 1 / (b * h * max(1, _pairs(s, t, call.offset, tile.m, triangular)))
    tma, (q, k, v) = _readable(q, k, v)
    key_max = _key_max(k, call.tiles.skip) if skip else None
    bounds = _bounds(call, b, s, t, tile.m, keys=False)
    device._flash_attention_fwd_kernel[(tiles * b * h,)](
        *(_source(x, rows, tma) for x, rows in ((q, tile.m), (k, tile.n), (v, tile.n))),
        *(out, lse, starts, share, key_max, bounds, *call.masks(), call.slopes, call.order, call.seed),
        *(call.scale, call.dropout_p, unit, b, h, s, t, call.offset, call.window, tiles, blocks),
        *(*_strides(q), *_strides(k), *_strides(v)),
        MODE=call.mode,
        GROUP=h // g,
        DH=d,
        D=_padded(d),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        SKIP_N=call.tiles.skip,
        RHO=_product_error(call.products),
        TMA=tma,
        PREC=call.products,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return out, lse, starts, share


def _product_error(products: str) -> float:
    """A bound on the relative error of a product q.k."""
    return 2.0**-8 if products == "tf32" else 2.0**-12


def _flash_attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    call: _Call,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, s, h, d), (t, g), tiles = q.shape, k.shape[1:3], call.tiles
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    start_tiles, blocks = triton.cdiv(s, tiles.fwd.m), triton.cdiv(t, tiles.skip)
    lse2, delta = (torch.empty(b, h, start_tiles * tiles.fwd.m, dtype=torch.float32, device=q.device) for _ in range(2))
    tma, (q, k, v, do) = _readable(q, k, v, do.to(q.dtype))
    dlse = None if dlse is None else dlse.contiguous()
    device._flash_attention_bwd_delta_kernel[(b * h * start_tiles,)](
        *(out, do, lse, dlse, lse2, delta, h, s, start_tiles, *_strides(do)),
        LSE_GRADIENT=dlse is not None,
        MODE=call.mode,
        DH=d,
        D=_padded(d),
        BLOCK_M=tiles.fwd.m,
    )
    last = _last_kept(starts, blocks, tiles.skip) if call.skips else None
    common = {
        "MODE": call.mode,
        "GROUP": h // g,
        "DH": d,
        "D": _padded(d),
        "TILE_M": tiles.fwd.m,
        "TMA": tma,
        "PREC": call.products,
        "enable_fp_fusion": True,
    }
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(do))
    split = _splits(tiles, h // g, call.dropout_p > 0)
    tile = tiles.dkdv
    n = triton.cdiv(t, tile.n)
    bounds = _bounds(call, b, s, t, tile.n, keys=True)
    for want_dk, want_dv in [(True, False), (False, True)] if split else [(True, True)]:
        device._flash_attention_bwd_dkdv_kernel[(n * b * g,)](
            *(_source(x, rows, tma) for x, rows in ((q, tile.m), (k, tile.n), (v, tile.n), (do, tile.m))),
            *(dk, dv, lse2, delta, starts, last, bounds, *call.masks()),
            *(call.slopes, call.kv_order, call.seed, call.scale, call.dropout_p, b, h, s, t, call.offset, call.window),
            *(n, start_tiles, blocks, *strides),
            **common,
            WANT_DK=want_dk,
            WANT_DV=want_dv,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            SKIP_N=tiles.skip,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    tile = tiles.dq
    n = triton.cdiv(s, tile.m)
    device._flash_attention_bwd_dq_kernel[(n * b * h,)](
        *(_source(x, rows, tma) for x, rows in ((q, tile.m), (k, tile.n), (v, tile.n), (do, tile.m))),
        *(dq, lse2, delta, starts, _bounds(call, b, s, t, tile.m, keys=False), *call.masks()),
        *(call.slopes, call.order, call.seed, call.scale, call.dropout_p, b, h, s, t, call.offset, call.window),
        *(n, start_tiles, *strides),
        **common,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dq, dk, dv


def _last_kept(starts: Tensor, blocks: int, block: int) -> Tensor:
    """(B, H, blocks): the last tile of rows that keeps each block of keys."""
    b, h, tiles = starts.shape
    last = torch.empty(b, h, blocks, dtype=torch.int32, device=starts.device)
    chunks = triton.cdiv(blocks, 32)
    shape = {"SKIP_N": block, "BLOCKS": 32, "TILES": min(64, triton.next_power_of_2(tiles))}
    device._flash_attention_last_kept_kernel[(b * h * chunks,)](last, starts, tiles, blocks, chunks, **shape)
    return last


# ---- what is shipped, for ahead-of-time compilation ------------------------------------------------------------------

_SHAPES = {  # flags of MODE, by name
    "skip": ("CAUSAL", "ALIBI", "SKIP"),
    "alibi": ("CAUSAL", "ALIBI"),
    "plain": ("CAUSAL",),
    "documents": ("CAUSAL", "ALIBI", "SKIP", "IDS", "DOCS"),
    "padding": ("CAUSAL", "ALIBI", "SKIP", "IDS"),
    "all": ("CAUSAL", "ALIBI", "SKIP", "IDS", "DOCS", "PREFIX", "WINDOW", "DROPOUT"),
}
_TYPES = {
    **dict.fromkeys(("O", "DQ", "DK", "DV", "Q", "K", "V", "DO"), "*{}"),
    **dict.fromkeys(("LSE", "SHARE", "KEY_MAX", "SLOPES", "LSE2", "DELTA", "DLSE"), "*fp32"),
    **dict.fromkeys(("START", "LAST", "BOUNDS", "KEY_IDS", "QUERY_IDS", "ORDER"), "*i32"),
    "PREFIX_MASK": "*i8",
    "SEED": "*i64",
    "scale": "fp32",
    "dropout_p": "fp32",
    "share": "fp32",
}
_NEEDS = {"SLOPES": "ALIBI", "KEY_IDS": "IDS", "QUERY_IDS": "DOCS", "PREFIX_MASK": "PREFIX", "SEED": "DROPOUT"}
_NEEDS |= dict.fromkeys(("KEY_MAX", "ORDER", "LAST"), "SKIP")


_MAIN_KERNELS = {"fwd": "fwd", "dq": "bwd_dq", "dkdv": "bwd_dkdv", "dk": "bwd_dkdv", "dv": "bwd_dkdv"}
_NO_SPILL = {("sm_90", d) for d in (64, 112, 128)}  # tiles chosen so, in 16 bits; dropout takes too many registers
_SMALL_KERNELS: tuple[tuple[str, dict[str, bool]], ...] = (  # with what is on of their own
    ("bounds", {"KEYS": True}),
    ("bounds", {"KEYS": False}),
    ("key_norm", {}),
    ("key_max", {}),
    ("order", {}),
    ("last_kept", {}),
    ("bwd_delta", {"LSE_GRADIENT": False}),
    ("bwd_delta", {"LSE_GRADIENT": True}),
)


def variants(name: str) -> list[Variant]:
    """The kernels for an architecture's name: those with an inner loop in the head dimensions, dtypes and modes that
    differ most, the small ones once.
    """
    cases = [(d, torch.bfloat16, shape, 1) for d in (64, 128) for shape in _SHAPES]
    cases += [(d, torch.bfloat16, shape, 1) for d in (32, 80, 96, 112, 256) for shape in ("skip", "plain")]
    cases += [(d, torch.float16, "skip", 1) for d in (64, 128)]
    cases += [(d, torch.bfloat16, "skip", 4) for d in (64, 128)]
    exact = [(*case, "ieee") for case in cases]
    exact += [(d, torch.float32, "skip", 1, "ieee") for d in (64, 128)]
    in_parts = [(d, torch.float32, "skip", 1, "bf16x6") for d in (64, 128, 256) if name == "sm_90"]
    found = [_variant(name, part, 128, torch.bfloat16, "skip", 1, "ieee", **on) for part, on in _SMALL_KERNELS]
    for d, dtype, shape, group, products in (*exact, *in_parts):
        dropout = "DROPOUT" in _SHAPES[shape]
        split = _splits(_tiles(name, d, dtype, products, dropout), group, dropout)
        parts = ("fwd", "dq", "dk", "dv") if split else ("fwd", "dq", "dkdv")
        found += [_variant(name, part, d, dtype, shape, group, products) for part in parts]
    return found


def _variant(
    name: str, part: str, d: int, dtype: torch.dtype, shape: str, group: int, products: str, **own: bool
) -> Variant:
    main, tiles = part in _MAIN_KERNELS, _tiles(name, d, dtype, products, "DROPOUT" in _SHAPES[shape])
    kernel = getattr(device, f"_flash_attention_{_MAIN_KERNELS.get(part, part)}_kernel")
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    tile = getattr(tiles, "dkdv" if part in ("dk", "dv") else part) if main else _Tile(tiles.fwd.m, tiles.fwd.n, 4, 3)
    on = _SHAPES[shape] if main else ("IDS", "DOCS", "PREFIX")
    on += ("EXACT",) if dtype == torch.float32 else ()
    tma = main and name in _TMA
    values = {
        "MODE": sum(getattr(device, flag).value for flag in on),
        "GROUP": group,
        "DH": d,
        "D": _padded(d),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "TILE_M": tiles.fwd.m,
        "SKIP_N": tiles.skip,
        "TMA": tma,
        "PREC": products,
        "RHO": _product_error(products),
        "WANT_DK": part != "dv",
        "WANT_DV": part != "dk",
        "TILE": tile.n,
        "CHUNK": 1024,
        "N": 32,
        "BLOCKS": 32,
        "TILES": 64,
        **own,
    }
    if not own.get("LSE_GRADIENT"):
        values["DLSE"] = None
    values |= {} if not main else {arg: None for arg, flag in _NEEDS.items() if flag not in on}
    if main and "IDS" not in on and "PREFIX" not in on:
        values["BOUNDS"] = None
    constants = {arg: values[arg] for arg in kernel.arg_names if arg in values}
    signature = {arg: _TYPES.get(arg, "i32").format(short) for arg in kernel.arg_names if arg not in constants}
    if tma:
        blocks = {arg: tile.m if arg in ("Q", "DO") else tile.n for arg in ("Q", "K", "V", "DO") if arg in signature}
        signature |= {arg: f"tensordesc<{short}[1,1,{rows},{_padded(d)}]>" for arg, rows in blocks.items()}
    divisible = tuple(a for a, kind in signature.items() if kind.startswith("*") or (a[0] == "s" and len(a) == 3))
    dtypes = short if products == "ieee" else f"{short} as {products}"
    label = f"{part} D{d} {dtypes} {shape} {tile.m}x{tile.n} warps {tile.warps} group {group}" if main else part
    label += "".join(f" {word.lower()}" for word, on in own.items() if on)
    options = {"enable_fp_fusion": True} if main else {}
    scores = tile.m * tile.n if main else None
    no_spill = main and (name, d) in _NO_SPILL and dtype != torch.float32 and "DROPOUT" not in on
    return Variant(
        op="flash_attention",
        label=label,
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible=divisible,
        num_warps=tile.warps,
        num_stages=tile.stages,
        scores=scores,
        options=options,
        no_spill=no_spill,
    )


# ---- the boundary ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("mpt::flash_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    attention_mask: Tensor | None,
    sequence_id: Tensor | None,
    prefix_mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    query_offset: int,
    dropout_p: float,
    skip: bool,
    products: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, the first keys of tiles, and what sums to `kept`. products: how Triton multiplies; None: torch runs."""
    if sequence_id is not None and (products is None or sequence_id.device.type == "cpu"):
        _check_order(sequence_id, attention_mask)  # here, where it runs within a compiled graph too
    masks = (attention_mask, sequence_id, prefix_mask)
    with no_autocast(q), on_device(q):
        rest: Any = (causal, scale, window, query_offset, dropout_p)
        if products is not None:
            skips = _skips(_tiles_for(q, products, dropout_p), q, k, slopes, query_offset, skip)
            return _flash_attention_fwd(
                q, k, v, _call(q, k, slopes, *masks, seed, *rest, products=products, skip=skips)
            )
        return plain.attend(q, k, v, plain.make_call(slopes, *masks, seed, *rest), skip)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, s, h, d = q.shape
    query_offset, dropout_p, skip, products = rest[-4:]
    lse = q.new_empty((b, h, s), dtype=wide(q.dtype))
    if products is None:
        starts: Any = (k.shape[2] * b, h // k.shape[2], (s + plain.CHUNK - 1) // plain.CHUNK)
        kept = q.new_empty((), dtype=torch.float32)
        return q.new_empty((b, s, h, d)), lse, q.new_empty(starts, dtype=torch.int32), kept
    tiles = _tiles_for(q, products, dropout_p)
    share = q.new_empty((b, h, (s + tiles.fwd.m - 1) // tiles.fwd.m), dtype=torch.float32)
    starts = share.shape if _skips(tiles, q, k, slopes, query_offset, skip) else (0,)
    return q.new_empty((b, s, h, d)), lse, q.new_empty(starts, dtype=torch.int32), share


@torch.library.custom_op("mpt::flash_attention_backward", mutates_args=())
def _op_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    starts: Tensor,
    slopes: Tensor | None,
    attention_mask: Tensor | None,
    sequence_id: Tensor | None,
    prefix_mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    query_offset: int,
    dropout_p: float,
    products: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. out and lse: None where plain torch works in steps."""
    masks = (attention_mask, sequence_id, prefix_mask)
    with no_autocast(q), on_device(q):
        rest: Any = (causal, scale, window, query_offset, dropout_p)
        if products is not None:
            assert out is not None and lse is not None
            call = _call(q, k, slopes, *masks, seed, *rest, products=products, skip=starts.numel() > 0)
            return _flash_attention_bwd(do, dlse, q, k, v, out, lse, starts, call)
        return plain.attend_backward(do, dlse, q, k, v, out, lse, starts, plain.make_call(slopes, *masks, seed, *rest))


@_op_backward.register_fake
def _(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # mostly nothing depends on lse
    *settings, _, products = inputs[8:]
    ctx.settings = (*settings, products)
    from_lse = products is not None or plain.fused(inputs[0], settings[-1])
    ctx.save_for_backward(*inputs[:3], *(output[:2] if from_lse else (None, None)), output[2], *inputs[3:8])


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    do = torch.zeros_like(ctx.saved_tensors[0]) if do is None else do
    dq, dk, dv = _op_backward(do, dlse, *ctx.saved_tensors, *ctx.settings)
    return (dq, dk, dv, *[None] * 12)


_op.register_autograd(_differentiate, setup_context=_save)
_op_backward.register_autograd(
    refuse_second_derivative("flash_attention"), setup_context=lambda ctx, inputs, output: None
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    attention_mask: Tensor | None = None,
    sequence_id: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    window: int | None = None,
    query_offset: int = 0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    skip: bool = True,
    return_lse: bool = False,
    return_kept: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of q on k, v with ALiBi, exactly, never holding the scores whole.

    q (B, S, H, D), k and v (B, T, G, D), H % G == 0, any strides; fp16, bf16, fp32 or fp64, one dtype (under autocast:
    cast to its dtype, fp64 left). alibi_slopes (H,), positive: adds -slope * |i - j|. softmax_scale: None is 1/sqrt(D).

    Returns out (B, S, H, D) contiguous, in that dtype; then, as asked, lse (B, H, S) fp32 (fp64 for fp64), natural log,
    differentiable (for fp16 and bf16 on a CPU exact to 1e-4); and kept, a 0-d fp32 tensor: the query-key pairs that
    were computed, as a share of those of a causal call without masks (of all pairs, where causal is false or a prefix
    is given).

    Query s of the call has position i = query_offset + s, key t has j = t. It is visible where all of these hold: j <=
    i, if causal, or prefix_mask[b, j]; |i - j| < window; attention_mask[b, j]; sequence_id[b, j] == sequence_id[b, i]
    and not negative. The masks are over keys, (B, T): attention_mask and prefix_mask bool or integer, sequence_id
    integer (needs query_offset + S <= T). A row's ids must not decrease, padding aside, but may leave numbers out. A
    query that sees nothing gives 0 and lse -inf.

    dropout_p: of the probabilities, those kept divided by 1 - p, drawn from `seed` (None: from torch's generator) and
    drawn again in the backward; another implementation draws others from the same seed.
    skip: leave out keys that provably weigh at most 2^-24 of their row (fp64: 2^-53), for any input; out then differs
    by at most 2^-23 * max|v|. False is for comparison.

    TypeError on dtypes, devices, DTensors; ValueError on shapes and values (Triton: D <= 256, no fp64). The Triton path
    does not wait for a sequence_id on a GPU: there one that decreases is not refused, and means what is said above. The
    second derivative is refused.
    """
    check_tensors("flash_attention", q=q, k=k, v=v)
    dtype = autocast_dtype(q)
    check_dtypes("flash_attention", mixed=dtype is not None, q=q, k=k, v=v)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check_shapes(q, k, v, alibi_slopes)
    _check_masks(q, k, causal, window, query_offset, attention_mask, sequence_id, prefix_mask)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not 0.0 <= scale < FP32_MAX:
        raise ValueError(f"softmax_scale is {softmax_scale}; it must be finite and at least 0, or None for 1/sqrt(D)")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0 and below 1")
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.dim()):
        raise TypeError(f"seed is {seed.dtype} {tuple(seed.shape)}; pass an int, or an int64 tensor of one number")
    if dropout_p and not isinstance(seed, Tensor):  # on the device: a copy to it would wait, and no CUDA graph takes it
        seed = (
            torch.randint(2**62, (), device=q.device)
            if seed is None
            else torch.full((), seed, dtype=torch.int64, device=q.device)
        )
    slopes = None if alibi_slopes is None else alibi_slopes.detach()
    unfit = f"its kernels take head dimensions up to 256, not {q.shape[-1]}" if q.shape[-1] > 256 else None
    which = choose("flash_attention", q, backend, unfit=unfit)
    if which == "reference":
        if sequence_id is not None and not torch.compiler.is_compiling():
            _check_order(sequence_id, attention_mask)
        with no_autocast(q):
            masks = {"attention_mask": attention_mask, "sequence_id": sequence_id, "prefix_mask": prefix_mask}
            kwargs: dict[str, Any] = {"alibi_slopes": slopes, "causal": causal, "softmax_scale": scale, **masks}
            kwargs |= {"window": window, "query_offset": query_offset, "dropout_p": dropout_p, "seed": seed}
            return reference.flash_attention(q, k, v, **kwargs, return_lse=return_lse, return_kept=return_kept)
    masks_ = tuple(None if m is None else m.bool() for m in (attention_mask, prefix_mask))
    products = _products(q) if which == "triton" else None
    rest = (causal, scale, window, query_offset, dropout_p, skip, products)
    out, lse, _, kept = _op(q, k, v, slopes, masks_[0], sequence_id, masks_[1], seed if dropout_p else None, *rest)
    if not (return_lse or return_kept):
        return out
    return (out, *([lse] if return_lse else []), *([kept.detach().sum()] if return_kept else []))


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"flash_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "pass q (B, S, H, D) and k, v (B, T, G, D)"
        )
    if 0 in (q.shape[2], *k.shape[1:]):
        raise ValueError(f"flash_attention: q {tuple(q.shape)}, k and v {tuple(k.shape)}: only B and S may be 0")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"flash_attention: {q.shape[2]} heads of q on {k.shape[2]} of k and v; H must be a multiple of G"
        )
    check_slopes("flash_attention", slopes, q, q.shape[2])


def _check_masks(
    q: Tensor, k: Tensor, causal: bool, window: int | None, query_offset: int, *masks: Tensor | None
) -> None:
    for name, number in (("window", window), ("query_offset", query_offset)):
        if number is not None and not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"{name} is {number!r}; pass an integer")
    if query_offset < 0:
        raise ValueError(f"query_offset is {query_offset}; it is the position of the first query, at least 0")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 (a query then sees itself), or None")
    names = ("attention_mask", "sequence_id", "prefix_mask")
    check_tensors("flash_attention", q=q, **dict(zip(names, masks)))
    for name, mask in zip(names, masks):
        if mask is None:
            continue
        if mask.shape != k.shape[:2]:
            raise ValueError(f"{name} is {tuple(mask.shape)}; it is over keys: pass (B, T) = {tuple(k.shape[:2])}")
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"{name} is {mask.dtype}; pass bool or integers")
    if masks[2] is not None and not causal:
        raise ValueError("prefix_mask with causal=False: every key is visible already; leave one of them out")
    if masks[1] is not None and query_offset + q.shape[1] > k.shape[1]:
        raise ValueError(
            f"sequence_id covers {k.shape[1]} keys, and the queries end at {query_offset + q.shape[1]}; "
            "pass ids for every position"
        )


def _check_order(sequence_id: Tensor, attention_mask: Tensor | None) -> None:
    """ValueError where an id is smaller than one before it in its row; negative ones and those of keys that
    attention_mask hides are padding. Waits for a GPU.
    """
    ids = sequence_id.long()
    if attention_mask is not None:
        ids = ids.where(attention_mask.bool(), -1)
    before = ids.cummax(1).values
    wrong = (ids >= 0) & (ids < before)
    if not bool(wrong.any()):
        return
    row, at = wrong.nonzero()[0].tolist()
    raise ValueError(
        f"sequence_id[{row}, {at}] is {int(ids[row, at])} and comes after {int(before[row, at])}; the ids of a row "
        "must not decrease: number its sequences in their order, and mark padding by -1 or in attention_mask"
    )

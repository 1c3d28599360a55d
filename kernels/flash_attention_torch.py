"""flash_attention on plain torch: tiles of queries against the range of keys that they need.

CHUNK queries of a few heads make a tile. Bias, causality and window depend on j - i alone, so each head has one vector
of them and a tile's bias is an overlapping view of that vector; for its strides to be positive the queries lie in
reverse order. Key ranges come from `alibi.first_kept` (exact skipping, see there) and from the masks; the backward
walks the forward's tiles.

On a CPU torch's own flash attention (Dao et al. 2022) does a tile, with the bias as its mask, and the backward has out
and lse. What that cannot do (dropout, a gradient of lse, float64, other devices) is done in steps: whole rows of a tile
fit, so the softmax is the plain one, and the backward recomputes it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.alibi import Rules, first_kept, reach
from kernels.backend import wide

CHUNK = 256  # queries of a tile
_CPU_ELEMENTS = 2**18  # scores of a tile done in steps: they stay in the cache
_GPU_ELEMENTS = 2**25
_MASK_ELEMENTS = 2**22  # of a mask that is no view, or those of one head
_SMALL = 2**16  # scores that cost less than a tile's calls: for fewer in vain, neighbours are joined
_PART = 256  # keys of a head that are worth a thread in the backward
_SHORT = 128  # keys
_BF16_LENGTH = 1024  # up to which all keys in bf16 cost a CPU with AMX less than to find out which ones matter
_SHARES = 8  # heads or parts of them in a tile: enough for as many threads

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Tile(NamedTuple):
    """Heads n0..n1 of the folded (kv head, batch) dimension, query heads r0..r1 of each, keys a..b."""

    n0: int
    n1: int
    r0: int
    r1: int
    a: int
    b: int


class _Chunk(NamedTuple):
    """Queries first..last; rows: where they lie in reversed tensors; see: (B, rows, keys) bool, or None where the bias
    vector says it all.
    """

    first: int
    last: int
    rows: slice
    see: Tensor | None
    tiles: list[_Tile]


# ---- which tiles -----------------------------------------------------------------------------------------------------


def _walk(
    starts: list[list[list[int]]], batch: int, queries: int, keys: int, rules: Rules, limit: int
) -> Iterator[_Chunk]:
    """The chunks with their tiles. A pure function of its arguments: forward and backward see the same pairs."""
    off, window = rules.query_offset, rules.window
    for c, first in enumerate(range(0, queries, CHUNK)):
        last = min(first + CHUNK, queries)
        low = 0 if window is None else min(max(0, off + first - window + 1), keys)
        high = min(off + last, keys) if rules.causal and rules.prefix_mask is None else keys
        high = high if window is None else min(high, off + last - 1 + window)
        see, lows, highs = None, [low] * batch, [high] * batch
        if rules.masked:
            see = _visible(rules, first, last, keys).flip(1)
            some = see.any(1)
            lows = some.int().argmax(1).tolist()
            highs = torch.where(some.any(1), keys - some.flip(1).int().argmax(1), 0).tolist()
        tiles: list[_Tile] = []
        begin = [[max(s[c], lows[n % batch]) for s in row] for n, row in enumerate(starts)]
        end = [highs[n % batch] for n in range(len(starts))]
        if len(starts[0]) == 1:  # as many kv heads as heads: a tile spans heads and batch
            runs = _runs([row[0] for row in begin], end, last - first, limit)
            tiles = [_Tile(i, j, 0, 1, a, b) for i, j, a, b in runs]
        else:  # query heads that share k and v: a tile stays within one kv head
            for n, row in enumerate(begin):
                runs = _runs(row, [end[n]] * len(row), last - first, limit)
                tiles += [_Tile(n, n + 1, i, j, a, b) for i, j, a, b in runs]
        yield _Chunk(first, last, slice(queries - last, queries - first), see, tiles)


def _runs(begin: list[int], end: list[int], rows: int, limit: int) -> list[tuple[int, int, int, int]]:
    """(i, j, a, b): neighbours i..j with one range of keys a..b. Equal ranges are joined up to `limit` scores, others
    where the result is small.
    """
    runs: list[tuple[int, int, int, int]] = []
    for i, (a, b) in enumerate(zip(begin, end)):
        if a >= b:
            continue
        if runs and runs[-1][1] == i:
            i0, _, a0, b0 = runs[-1]
            a1, b1 = min(a, a0), max(b, b0)
            size = (i + 1 - i0) * rows * (b1 - a1)
            in_vain = size - rows * ((i - i0) * (b0 - a0) + b - a)
            if size <= limit and in_vain <= _SMALL:
                runs[-1] = (i0, i + 1, a1, b1)
                continue
        runs.append((i, i + 1, a, b))
    return runs


def _visible(rules: Rules, first: int, last: int, keys: int) -> Tensor:
    """Bool (B, last - first, T)."""
    given = rules._asdict() | {"query_offset": rules.query_offset + first}
    device = next(m.device for m in (rules.attention_mask, rules.sequence_id, rules.prefix_mask) if m is not None)
    return reference.visible_pairs(last - first, keys, **given, device=device)[:, 0]


# ---- a tile ----------------------------------------------------------------------------------------------------------


class _Bias(NamedTuple):
    """Per folded head a vector over j - i, from -(S + query_offset) up; `none` where there is nothing to add."""

    vector: Tensor  # (N, R, length)
    zero: int  # where j - i = 0 lies
    none: bool


def _bias(slopes: Tensor | None, q: Tensor, keys: int, batch: int, rules: Rules, far: Tensor | None = None) -> _Bias:
    """For q (N, R, S, D). far (N, R): the distance from which on keys are left out."""
    n, r, queries, _ = q.shape
    zero, dtype = queries + rules.query_offset, wide(q.dtype)
    away = torch.arange(-zero, keys, device=q.device, dtype=torch.long)
    bias = torch.zeros(1, 1, len(away), device=q.device, dtype=dtype)
    if slopes is not None:
        bias = _fold_slopes(slopes.to(dtype), n, r, batch)[..., None] * -away.abs()
    if far is not None:
        bias = bias.masked_fill(-away >= far[..., None], float("-inf"))
    if not rules.masked and rules.causal:
        bias = bias.masked_fill(away > 0, float("-inf"))
    if not rules.masked and rules.window is not None:
        bias = bias.masked_fill(away.abs() >= rules.window, float("-inf"))
    none = slopes is None and (rules.masked or (not rules.causal and rules.window is None))
    return _Bias(bias.expand(n, r, -1).contiguous(), zero, none)


def _fold_slopes(slopes: Tensor, n: int, r: int, batch: int) -> Tensor:
    """(H,) -> (N, R)."""
    return slopes.view(n // batch, 1, r).expand(-1, batch, -1).reshape(n, r)


def _bias_of(chunk: _Chunk, tile: _Tile, bias: _Bias, offset: int) -> Tensor:
    """(n, r, rows, keys), a view."""
    n0, n1, r0, r1, a, b = tile
    v = bias.vector
    begin = bias.zero + a - (offset + chunk.last - 1)  # the first row of the tile is the last query
    shape, strides = (n1 - n0, r1 - r0, chunk.last - chunk.first, b - a), (v.stride(0), v.stride(1), 1, 1)
    return v.as_strided(shape, strides, v[n0, r0, begin].storage_offset())


def _unseen(see: Tensor, tile: _Tile, batch: int) -> Tensor:
    """(n, 1, rows, keys)"""
    of = torch.arange(tile.n0, tile.n1, device=see.device) % batch
    return ~see[of, :, tile.a : tile.b][:, None]


def _scores(q: Tensor, k: Tensor, chunk: _Chunk, tile: _Tile, bias: _Bias, batch: int, offset: int) -> Tensor:
    """(n, r, rows, keys) in the dtype of q (N, R, S, D) and k (N, T, D): scores with bias, -inf where invisible."""
    n0, n1, r0, r1, a, b = tile
    rows = chunk.last - chunk.first
    s = torch.bmm(_rows(q, chunk, tile), k[n0:n1, a:b].mT).view(n1 - n0, r1 - r0, rows, b - a)
    if not bias.none:
        s += _bias_of(chunk, tile, bias, offset)
    return s if chunk.see is None else s.masked_fill_(_unseen(chunk.see, tile, batch), float("-inf"))


def _mask(chunk: _Chunk, tile: _Tile, bias: _Bias, batch: int, offset: int) -> Tensor | None:
    """What torch's flash attention adds to the scores: (n, r, rows, keys)."""
    if chunk.see is None:
        return None if bias.none else _bias_of(chunk, tile, bias, offset)
    return _bias_of(chunk, tile, bias, offset).masked_fill(_unseen(chunk.see, tile, batch), float("-inf"))


def _softmax(s: Tensor, may_be_blind: bool) -> Tensor:
    """Over the keys of the tile; a row that sees none gives zeros. Changes s."""
    if not may_be_blind:
        return torch.softmax(s, -1)
    blind = (s == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill_(blind, 0.0), -1).masked_fill_(blind, 0.0)


def _rows(x: Tensor, chunk: _Chunk, tile: _Tile) -> Tensor:
    """The tile's queries of x (N, R, S, D): (n, r * rows, D)."""
    part = x[tile.n0 : tile.n1, tile.r0 : tile.r1, chunk.rows]
    return part.reshape(part.shape[0], -1, part.shape[-1])


# ---- forward and backward on folded tensors --------------------------------------------------------------------------


def _fold(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads * R, D) -> (N, R, S, D), queries reversed, contiguous."""
    b, s, h, d = x.shape
    x = x.flip(1).view(b, s, heads, h // heads, d)
    return x.permute(2, 0, 3, 1, 4).reshape(heads * b, h // heads, s, d)


def _unfold(x: Tensor, batch: int) -> Tensor:
    """Its inverse, contiguous, as the operators' fakes say."""
    n, r, s, d = x.shape
    x = x.view(n // batch, batch, r, s, d).permute(1, 3, 0, 2, 4).reshape(batch, s, -1, d)
    return x.flip(1).contiguous()


def _fold_keys(x: Tensor) -> Tensor:
    """(B, T, G, D) -> (N, T, D)"""
    return x.permute(2, 0, 1, 3).reshape(-1, x.shape[1], x.shape[3])


class Call(NamedTuple):
    """What a call and its backward share, beside q, k, v."""

    rules: Rules
    slopes: Tensor | None
    scale: float
    dropout_p: float
    seed: Tensor | None

    def generator(self, device: torch.device) -> torch.Generator | None:
        if self.seed is None:
            return None
        generator = torch.Generator(device)
        generator.manual_seed(int(self.seed))
        return generator

    def keep(self, like: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """1/(1-p) where a probability survives the dropout, else 0. Tiles come in the same order in the backward, so
        this repeats itself.
        """
        if generator is None:
            return None
        return torch.empty_like(like).bernoulli_(1 - self.dropout_p, generator=generator).div_(1 - self.dropout_p)


def make_call(
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
) -> Call:
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    rules = Rules(causal, window, query_offset, attention_mask, sequence_id, prefix_mask)
    return Call(rules, slopes, scale, dropout_p, seed if dropout_p else None)


def fused(q: Tensor, dropout_p: float) -> bool:
    """Whether torch's flash attention can do the forward."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16) and not dropout_p


def _ordinary(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether every score is finite. Of others torch's flash attention hides some, and lets a key that is not seen
    spoil a row, as -inf is added to its score.
    """
    largest = 1.0
    for x in (q, k):
        low, high = x.detach().aminmax()
        largest *= max(-float(low), float(high))  # NaN, if there is one, at the place of both
    return largest * q.shape[-1] * scale < 1e38


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, skip: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, S, H, D), lse (B, H, S), starts (N, R, chunks), kept ()."""
    (batch, queries, _, _), (keys, g), rules = q.shape, k.shape[1:3], call.rules
    if q.numel() == 0:
        found = torch.empty(q.shape[0], q.shape[2], queries, dtype=wide(q.dtype), device=q.device)
        starts = torch.zeros(g * batch, q.shape[2] // g, -(-queries // CHUNK), dtype=torch.int32, device=q.device)
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), found, starts, torch.zeros((), device=q.device)
    qf, kf, vf = _fold(q, g), _fold_keys(k), _fold_keys(v)
    starts = _starts(qf, kf, batch, call, skip)
    done, whole = 0, 0

    def chunks(limit: int) -> Iterator[_Chunk]:
        nonlocal done, whole
        for chunk in _walk(starts.tolist(), batch, queries, keys, rules, limit):
            rows, causal = chunk.last - chunk.first, rules.causal and rules.prefix_mask is None
            whole += qf.shape[0] * qf.shape[1] * rows * (min(keys, rules.query_offset + chunk.last) if causal else keys)
            done += sum((t.n1 - t.n0) * (t.r1 - t.r0) * rows * (t.b - t.a) for t in chunk.tiles)
            yield chunk

    flash = fused(q, call.dropout_p) and _ordinary(q, k, call.scale)
    forward = _forward if flash else _forward_in_steps
    out, lse = forward(qf, kf, vf, batch, call, chunks(_limit(flash, rules, q.device)))
    kept = torch.tensor(done / max(whole, 1), dtype=torch.float32, device=q.device)
    return _unfold(out, batch), _unfold(lse[..., None], batch)[..., 0].mT.contiguous(), starts, kept


def _starts(q: Tensor, k: Tensor, batch: int, call: Call, skip: bool) -> Tensor:
    """(N, R, chunks) int32: the first key of each chunk of queries."""
    n, r, queries, _ = q.shape
    low = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if not skip or call.slopes is None or queries + call.rules.query_offset <= (_BF16_LENGTH if low else CHUNK):
        return torch.zeros(n, r, -(-queries // CHUNK), dtype=torch.int32, device=q.device)
    slopes, up = _fold_slopes(call.slopes.to(q.device), n, r, batch), wide(q.dtype)
    bits = 53 if up == torch.float64 else 24
    return first_kept(q.flip(2).to(up) * call.scale, k.to(up), slopes, call.rules, chunk=CHUNK, bits=bits)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, batch: int, call: Call, chunks: Iterable[_Chunk]
) -> tuple[Tensor, Tensor]:
    """out (N, R, S, D), lse (N, R, S) of q (N, R, S, D), k and v (N, T, D)."""
    rules = call.rules
    bias = _bias(call.slopes, q, k.shape[1], batch, rules)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"))
    may_be_blind = rules.masked or (rules.window is not None and rules.query_offset + q.shape[2] > k.shape[1])
    for chunk in chunks:
        for tile in chunk.tiles:
            n0, n1, r0, r1, a, b = tile
            at = (slice(n0, n1), slice(r0, r1), chunk.rows)
            mask = _mask(chunk, tile, bias, batch, rules.query_offset)
            k_tile, v_tile = (_over_heads(x[n0:n1, a:b], r1 - r0) for x in (k, v))
            out[at], lse[at] = _flash(q[at], k_tile, v_tile, attn_mask=mask, scale=call.scale)
            if mask is not None and may_be_blind:  # torch gives 0, which `_backward` takes
                lse[at].masked_fill_(mask.amax(-1) == float("-inf"), float("-inf"))
    return out, lse


def _forward_in_steps(
    q: Tensor, k: Tensor, v: Tensor, batch: int, call: Call, chunks: Iterable[_Chunk]
) -> tuple[Tensor, Tensor]:
    """As `_forward`."""
    up, rules = wide(q.dtype), call.rules
    qs, ku = q.to(up) * call.scale, k.to(up)
    bias = _bias(call.slopes, q, k.shape[1], batch, rules)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=up, device=q.device)
    generator = call.generator(q.device)
    for chunk in chunks:
        for tile in chunk.tiles:
            n0, n1, r0, r1, a, b = tile
            at = (slice(n0, n1), slice(r0, r1), chunk.rows)
            s = _scores(qs, ku, chunk, tile, bias, batch, rules.query_offset)
            top = s.amax(-1)
            p = _softmax(s, rules.masked or rules.window is not None)
            largest = p.amax(-1)  # 1 / sum exp(s - top)
            lse[at] = top - largest.clamp_min_(1e-30).log_()
            keep = call.keep(p, generator)
            p = p if keep is None else p.mul_(keep)
            out[at] = torch.bmm(p.to(v.dtype).flatten(1, 2), v[n0:n1, a:b]).view(out[at].shape)
    return out, lse


def _over_heads(x: Tensor, r: int) -> Tensor:
    """(n, keys, D) -> (n, r, keys, D), a view."""
    return x[:, None].expand(-1, r, -1, -1)


def _limit(flash: bool, rules: Rules, device: torch.device) -> int:
    """Scores of a tile."""
    if flash:
        return _MASK_ELEMENTS if rules.masked else 2**62
    return _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS


def attend_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    starts: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. out and lse: where `fused`; without them the backward is done in steps."""
    if q.numel() == 0:
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        return dq, dk, dv
    if dlse is None and out is not None and lse is not None and _ordinary(q, k, call.scale):
        # In low precision torch's backward takes a while to begin.
        dtype = torch.float32 if k.shape[1] <= _SHORT else q.dtype
        grads = _backward(do.to(dtype), q.to(dtype), k.to(dtype), v.to(dtype), out.to(dtype), lse, starts, call)
    else:
        grads = _backward_in_steps(do, dlse, q, k, v, starts, call)
    batch, g = q.shape[0], k.shape[2]
    dk, dv = (x.to(k.dtype).view(g, batch, *x.shape[1:]).permute(1, 2, 0, 3).contiguous() for x in grads[1:])
    return _unfold(grads[0].to(q.dtype), batch), dk, dv


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (N, R, S, D) in q's dtype, dk and dv (N, T, D) in fp32."""
    batch, g, rules, far = q.shape[0], k.shape[2], call.rules, None
    qf, dof, outf, kf, vf = _fold(q, g), _fold(do.to(v.dtype), g), _fold(out, g), _fold_keys(k), _fold_keys(v)
    (n, r), keys = qf.shape[:2], kf.shape[1]
    lsef = _fold(lse.mT[..., None], g)[..., 0]
    if call.slopes is not None and bool(starts.any()):
        # Products with probabilities next to nothing are subnormal numbers, which cost many times the others.
        far = reach(qf, kf, lsef, _fold_slopes(call.slopes, n, r, batch), scale=call.scale, bits=24)
    bias = _bias(call.slopes, qf, keys, batch, rules, far)
    lsef.masked_fill_(lsef == float("-inf"), 0.0)  # a row that sees nothing: exp(-inf - 0), not exp(-inf + inf)
    # Where rows may see far keys alone, lse is rounded as the large number that the bias makes it. Such a tile is done
    # again, with a bias of 0 on each row's nearest key.
    remote = q.dtype == torch.float32 and (rules.attention_mask is not None or rules.query_offset + q.shape[1] > keys)
    dq = torch.zeros_like(qf)
    dk, dv = (torch.zeros_like(kf, dtype=torch.float32) for _ in range(2))
    limit = _MASK_ELEMENTS if remote else _limit(True, rules, q.device)
    for chunk in _walk(starts.tolist(), batch, qf.shape[2], keys, rules, limit):
        for tile in chunk.tiles:
            n0, n1, r0, r1, a, b = tile
            at = (slice(n0, n1), slice(r0, r1), chunk.rows)
            mask = _mask(chunk, tile, bias, batch, rules.query_offset)
            do_t, q_t, out_t, lse_t = (x[at] for x in (dof, qf, outf, lsef))
            k_t, v_t = (x[n0:n1, a:b] for x in (kf, vf))
            if remote and mask is not None:
                mask = mask - mask.amax(-1, keepdim=True).clamp_min_(torch.finfo(mask.dtype).min)
                every = (_over_heads(x, r1 - r0) for x in (k_t, v_t))
                out_t, lse_t = _flash(q_t, *every, attn_mask=mask, scale=call.scale)
            dq[at], dk_tile, dv_tile = _tile_backward([do_t, q_t, out_t, lse_t], [k_t, v_t], mask, call.scale)
            dk[n0:n1, a:b] += dk_tile
            dv[n0:n1, a:b] += dv_tile
    return dq, dk, dv


def _tile_backward(
    at_queries: list[Tensor], at_keys: list[Tensor], mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (n, r, rows, D), dk and dv (n, keys, D), from do, q, out (n, r, rows, D), lse (n, r, rows); k, v (n, keys, D);
    mask (n, r, rows, keys). n or r is 1.

    torch gives each thread whole heads. Where they are few, parts of the keys are as heads of their own.
    """
    (n, r), keys = at_queries[0].shape[:2], at_keys[0].shape[1]
    parts, dim = _parts(n * r, keys), 0 if n == 1 else 1  # the parts take the place of this dimension, which is 1
    do, q, out, lse = (x.expand([parts if i == dim else m for i, m in enumerate(x.shape)]) for x in at_queries)
    k, v = (x.unflatten(1, (parts, -1)) for x in at_keys)  # (n, parts, keys, D)
    if dim == 0:
        k, v = (_over_heads(x[0], r) for x in (k, v))
    if mask is not None:  # (n, r, rows, parts, keys)
        mask = mask.unflatten(3, (parts, -1)).squeeze(dim).movedim(2, dim)
    dq, dk, dv = _flash_backward(do, q, k, v, out, lse.contiguous(), 0.0, False, attn_mask=mask, scale=scale)
    if dim == 0:
        dk, dv = (x.sum(1, dtype=torch.float32).unsqueeze(0) for x in (dk, dv))
    dq = dq if parts == 1 else dq.sum(dim, keepdim=True, dtype=torch.float32)
    return dq, dk.flatten(1, 2), dv.flatten(1, 2)


def _parts(heads: int, keys: int) -> int:
    """Of the keys. Not by the number of threads: on that the sums shall not depend."""
    parts = 1
    while heads * parts < _SHARES and keys % (2 * parts) == 0 and keys >= 2 * parts * _PART:
        parts *= 2
    return parts


def _backward_in_steps(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (N, R, S, D), dk and dv (N, T, D), in fp32 (fp64 for fp64)."""
    (batch, queries, _, d), (keys, g) = q.shape, k.shape[1:3]
    up, rules = wide(q.dtype), call.rules
    dlse = None if dlse is None else _fold(dlse.mT[..., None], g)
    qf, do, kf, vf = _fold(q, g), _fold(do.to(v.dtype), g), _fold_keys(k), _fold_keys(v)
    qs, ku = qf.to(up) * call.scale, kf.to(up)
    bias = _bias(call.slopes, qf, keys, batch, rules)
    dq = torch.zeros_like(qs)
    # (D, T): matrix products this way round are faster
    dk, dv = (torch.zeros(len(kf), d, keys, dtype=up, device=q.device) for _ in range(2))
    generator, may_be_blind = call.generator(q.device), rules.masked or rules.window is not None
    for chunk in _walk(starts.tolist(), batch, queries, keys, rules, _limit(False, rules, q.device)):
        for tile in chunk.tiles:
            n0, n1, r0, r1, a, b = tile
            at = (slice(n0, n1), slice(r0, r1), chunk.rows)
            p = _softmax(_scores(qs, ku, chunk, tile, bias, batch, rules.query_offset), may_be_blind)
            keep = call.keep(p, generator)
            dropped = p if keep is None else p * keep
            do_tile = _rows(do, chunk, tile)
            dv[n0:n1, :, a:b] += torch.bmm(do_tile.mT, dropped.to(v.dtype).flatten(1, 2))
            dp = torch.bmm(do_tile, vf[n0:n1, a:b].mT).to(up).view(p.shape)
            dp = dp if keep is None else dp.mul_(keep)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, up)
            ds = (ds if dlse is None else ds.addcmul_(p, dlse[at])).to(q.dtype).flatten(1, 2)
            dq[at] = torch.bmm(ds, kf[n0:n1, a:b]).view(dq[at].shape).to(up)
            dk[n0:n1, :, a:b] += torch.bmm(_rows(qf, chunk, tile).mT, ds)
    return dq.mul_(call.scale), dk.mul_(call.scale).mT, dv.mT

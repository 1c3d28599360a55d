"""flash_attention on plain torch: tiles of queries against the range of keys that they need.

CHUNK queries of a few heads make a tile. Bias, causality and window depend on j - i alone, so each head has one vector
of them and a tile's bias is an overlapping view of that vector; for its strides to be positive the queries lie in
reverse order. Key ranges come from `alibi.first_kept` (exact skipping, see there) and from the masks; the backward
walks the forward's tiles. Whole rows of a tile fit, so each tile's softmax is the plain one; the backward recomputes
it, and keeps only each chunk's first key.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.alibi import Rules, first_kept
from kernels.backend import wide

CHUNK = 128  # queries of a tile
_CPU_ELEMENTS = 2**18  # scores of a tile: they stay in the cache
_GPU_ELEMENTS = 2**25
_SMALL = 2**16  # below this a tile costs more in calls than in arithmetic: neighbours are joined


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
            if size <= (limit if (a0, b0) == (a, b) else _SMALL):
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


def _bias(
    slopes: Tensor | None, n: int, r: int, batch: int, queries: int, keys: int, rules: Rules, like: Tensor
) -> _Bias:
    zero = queries + rules.query_offset
    away = torch.arange(-zero, keys, device=like.device, dtype=torch.long)
    bias = torch.zeros(1, 1, len(away), device=like.device, dtype=like.dtype)
    if slopes is not None:
        bias = _fold_slopes(slopes.to(like.dtype), n, r, batch)[..., None] * -away.abs()
    if not rules.masked and rules.causal:
        bias = bias.masked_fill(away > 0, float("-inf"))
    if not rules.masked and rules.window is not None:
        bias = bias.masked_fill(away.abs() >= rules.window, float("-inf"))
    none = slopes is None and (rules.masked or (not rules.causal and rules.window is None))
    return _Bias(bias.expand(n, r, -1).contiguous(), zero, none)


def _fold_slopes(slopes: Tensor, n: int, r: int, batch: int) -> Tensor:
    """(H,) -> (N, R)."""
    return slopes.view(n // batch, 1, r).expand(-1, batch, -1).reshape(n, r)


def _scores(q: Tensor, k: Tensor, chunk: _Chunk, tile: _Tile, bias: _Bias, batch: int, offset: int) -> Tensor:
    """(n, r, rows, keys) in the dtype of q (N, R, S, D) and k (N, T, D): scores with bias, -inf where invisible."""
    n0, n1, r0, r1, a, b = tile
    rows = chunk.last - chunk.first
    s = torch.bmm(_rows(q, chunk, tile), k[n0:n1, a:b].mT).view(n1 - n0, r1 - r0, rows, b - a)
    if not bias.none:
        v = bias.vector
        begin = bias.zero + a - (offset + chunk.last - 1)  # the first row of the tile is the last query
        s += v[n0:n1, r0:r1].as_strided(s.shape, (v.stride(0), v.stride(1), 1, 1), v[n0, r0, begin].storage_offset())
    if chunk.see is not None:
        of = torch.arange(n0, n1, device=s.device) % batch
        s.masked_fill_(~chunk.see[of, :, a:b][:, None], float("-inf"))
    return s


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


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, skip: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, S, H, D), lse (B, H, S), starts (N, R, chunks), kept ()."""
    (batch, queries, h, d), (keys, g) = q.shape, k.shape[1:3]
    n, r, up, rules = g * batch, h // g, wide(q.dtype), call.rules
    qs = _fold(q, g).to(up) * call.scale
    kf, vf = (x.permute(2, 0, 1, 3).reshape(n, keys, -1) for x in (k.to(up), v))
    starts = torch.zeros(n, r, -(-queries // CHUNK), dtype=torch.int32, device=q.device)
    if skip and call.slopes is not None and queries + rules.query_offset > 2 * CHUNK:
        bits = 53 if up == torch.float64 else 24
        slopes = _fold_slopes(call.slopes.to(q.device), n, r, batch)
        starts = first_kept(qs.flip(2), kf, slopes, rules, chunk=CHUNK, bits=bits)
    bias = _bias(call.slopes, n, r, batch, queries, keys, rules, qs)
    out = torch.zeros(n, r, queries, d, dtype=v.dtype, device=v.device)
    lse = torch.full((n, r, queries), float("-inf"), dtype=up, device=q.device)
    generator, done, whole = call.generator(q.device), 0, 0
    may_be_blind = rules.masked or rules.window is not None
    limit = _CPU_ELEMENTS if q.device.type == "cpu" else _GPU_ELEMENTS
    for chunk in _walk(starts.tolist(), batch, queries, keys, rules, limit):
        rows = chunk.last - chunk.first
        causal = rules.causal and rules.prefix_mask is None
        whole += n * r * rows * (min(keys, rules.query_offset + chunk.last) if causal else keys)
        for tile in chunk.tiles:
            n0, n1, r0, r1, a, b = tile
            s = _scores(qs, kf, chunk, tile, bias, batch, rules.query_offset)
            top = s.amax(-1)
            p = _softmax(s, may_be_blind)
            largest = p.amax(-1)  # 1 / sum exp(s - top)
            lse[n0:n1, r0:r1, chunk.rows] = top - largest.clamp_min_(1e-30).log_()
            keep = call.keep(p, generator)
            p = p if keep is None else p.mul_(keep)
            o = torch.bmm(p.to(v.dtype).flatten(1, 2), vf[n0:n1, a:b])
            out[n0:n1, r0:r1, chunk.rows] = o.view(n1 - n0, r1 - r0, rows, -1)
            done += s.numel()
    kept = torch.tensor(done / max(whole, 1), dtype=torch.float32, device=q.device)
    return _unfold(out, batch), _unfold(lse[..., None], batch)[..., 0].mT.contiguous(), starts, kept


def attend_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, queries, h, d), (keys, g) = q.shape, k.shape[1:3]
    n, r, up, rules = g * batch, h // g, wide(q.dtype), call.rules
    dlse = None if dlse is None else _fold(dlse.mT[..., None], g)
    qf, do = _fold(q, g), _fold(do.to(v.dtype), g)
    qs = qf.to(up) * call.scale
    kf, vf = (x.permute(2, 0, 1, 3).reshape(n, keys, -1) for x in (k, v))
    ku = kf.to(up)
    bias = _bias(call.slopes, n, r, batch, queries, keys, rules, qs)
    dq = torch.zeros_like(qs)
    # (D, T): matrix products this way round are faster
    dk, dv = (torch.zeros(n, d, keys, dtype=up, device=q.device) for _ in range(2))
    generator, may_be_blind = call.generator(q.device), rules.masked or rules.window is not None
    limit = _CPU_ELEMENTS if q.device.type == "cpu" else _GPU_ELEMENTS
    for chunk in _walk(starts.tolist(), batch, queries, keys, rules, limit):
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
    dq, dk = dq.mul_(call.scale).to(q.dtype), dk.mul_(call.scale).to(k.dtype)
    dk, dv = (x.view(g, batch, d, keys).permute(1, 3, 0, 2).contiguous() for x in (dk, dv.to(v.dtype)))
    return _unfold(dq, batch), dk, dv

"""ALiBi: the slopes, and which keys can matter to which queries at all (exact skipping)."""

import math
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def alibi_slopes(n_heads: int, alibi_bias_max: float = 8.0) -> Tensor:
    """Slopes of ALiBi (Press et al. 2022, arXiv 2108.12409; MPT's order for head counts that are no power of two).

    Returns (n_heads,) fp32, positive: head h adds -slopes[h] * (i - j) to the score of query i on key j. With n the
    next power of two, s_i = 2^(-i * alibi_bias_max / n) for i = 1..n; for n != n_heads every second one comes first,
    then the others, cut to n_heads. ValueError unless n_heads >= 1 and alibi_bias_max > 0.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads is {n_heads}; it must be at least 1")
    if not (alibi_bias_max > 0 and math.isfinite(alibi_bias_max)):
        raise ValueError(f"alibi_bias_max is {alibi_bias_max}; it must be positive and finite")
    n = 1 << (n_heads - 1).bit_length()
    slopes = torch.tensor([2.0 ** (-i * alibi_bias_max / n) for i in range(1, n + 1)], dtype=torch.float64)
    if n != n_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:n_heads]
    return slopes.to(torch.float32)


# ---- which keys can matter -------------------------------------------------------------------------------------------

GRAIN = 64  # first kept keys are multiples of this
BAND = 32  # a row's total is bounded from below by its sum over its own block of so many keys and the block before it

_LOG2E = math.log2(math.e)
_BIG = 3.0e38  # stands for inf and NaN: such a key or query keeps everything
_TINY = 2.0**-59  # the norm of 256 squares that were flushed to zero
_RHO = 2.0**-12  # relative error of a score: dot product in fp32, conversion to it included
_RHO_TF32 = 2.0**-8  # the same where fp32 products may be TF32
_FAR = 1.0 - 2.0**-20  # relative error of a bias
_PIECE = 64 * BAND  # queries whose near scores exist at once


class Rules(NamedTuple):
    """Which query sees which key; the meaning of each is that of `flash_attention`'s argument."""

    causal: bool
    window: int | None
    query_offset: int
    attention_mask: Tensor | None
    sequence_id: Tensor | None
    prefix_mask: Tensor | None

    @property
    def masked(self) -> bool:
        """Whether visibility depends on more than j - i."""
        return not (self.attention_mask is None and self.sequence_id is None and self.prefix_mask is None)


def first_kept(
    q: Tensor,
    k: Tensor,
    slopes: Tensor,
    rules: Rules,
    *,
    chunk: int,
    bits: int,
    position: int | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """The first key that each chunk of queries has to read; those before it weigh at most 2^-bits of any row's total,
    for any input.

    q (N, R, S, D), times the softmax scale, k (N, T, D), slopes (N, R), N = kv heads x batch with the batch last.
    Returns int32 (N, R, ceil(S / chunk)): multiples of GRAIN, not beyond the position of the chunk's first query.

    Where k and `rules` hold a part of the keys only, `position` is that of the first query among all of them, and
    `norms` are `block_norms` of all of them; the result counts from the first of all.

    Method: a row's total is at least exp(L), its sum over the visible keys near its diagonal. With K_b the largest norm
    of the keys before b, those weigh at most exp(|q_i| K_b - m (i - b + 1)) * min(b, 1 / (1 - exp(-m))). In base 2,
    every rounding on the safe side; a comparison that is not true (inf, NaN) keeps. The bound grows with b, so a
    bisection finds the largest b that passes for every row of the chunk.
    """
    n, r, s, _ = q.shape
    chunks, rho = -(-s // chunk), _RHO if q.device.type == "cpu" else _RHO_TF32
    q, k, slope = q.float(), k.float(), slopes.float()[..., None]
    size = _norms(q) * _LOG2E
    low = _near_lse(q, k, slope, rules) * _LOG2E
    low = low.masked_fill(~low.isfinite(), -math.inf)
    position = rules.query_offset if position is None else position
    norms = block_norms(k, torch.arange(k.shape[1], device=k.device), k.shape[1]) if norms is None else norms
    k_max = F.pad(norms.cummax(-1).values, (1, 0))  # k_max[:, c]: over the keys before c * GRAIN
    blocks = k_max.shape[1] - 1

    row = torch.arange(s, device=q.device)
    start = row[::chunk] + position
    own = k_max[:, ((row + position) // GRAIN + 1).clamp(max=blocks)][:, None]
    # Distances relative to the chunk's first query.
    rest = rho * size * own - _FAR * _LOG2E * slope * (row % chunk + 1) - low
    rest = F.pad(rest, (0, -s % chunk), value=-_BIG).view(n, r, chunks, chunk)
    size = F.pad(size * (1 + rho), (0, -s % chunk)).view(n, r, chunks, chunk)
    geometric = 1 / slope + 0.5 + slope / 12  # >= 1 / (1 - exp(-slope)), without its cancellation; inf for slope 0

    passes = torch.zeros(n, r, chunks, dtype=torch.long, device=q.device)
    fails = torch.where(slope >= 0, (start // GRAIN).clamp(max=blocks) + 1, 1)
    for _ in range(blocks.bit_length() + 1):
        cut = (passes + fails) // 2
        before = cut * GRAIN
        worst = (size * k_max[:, None].expand(n, r, -1).gather(2, cut)[..., None] + rest).amax(-1)
        worst = worst - _FAR * _LOG2E * slope * (start - before) + torch.minimum(before, geometric).log2()
        good = (worst <= -(bits + 1 / 16)) | (cut == 0)
        passes, fails = torch.where(good, cut, passes), torch.where(good, fails, cut)
    return (passes * GRAIN).int()


def reach(q: Tensor, k: Tensor, lse: Tensor, slopes: Tensor, *, scale: float, bits: int) -> Tensor:
    """A distance for each head: keys as far before a query as that, or farther, weigh at most 2^-bits of its row's
    total, for any input.

    q (N, R, S, D), k (N, T, D), lse (N, R, S) natural log (-inf: a row that sees nothing), slopes (N, R). Returns fp32
    (N, R), inf where nothing is known. The method is `first_kept`'s, with the totals known.
    """
    size, largest = _norms(q.float()) * scale, _norms(k.float()).amax(-1)[:, None, None]
    over = (size * largest * (1 + 2 * _RHO_TF32) - lse).masked_fill(lse == -math.inf, -math.inf).amax(-1) * _LOG2E
    slope = slopes.float()
    terms = (1 / slope + 0.5 + slope / 12).clamp(max=k.shape[1]).log2()
    found = ((over + terms + bits + 1 / 16) / (_FAR * _LOG2E * slope)).ceil()
    return found.masked_fill(~(found.isfinite() & (slope > 0)), math.inf)


def block_norms(k: Tensor, positions: Tensor, length: int) -> Tensor:
    """The largest norm in each block of GRAIN keys, fp32 (N, ceil(length / GRAIN)), for keys k (N, T, D) at `positions`
    (T,) of `length`; 0 for a block without any.
    """
    norms = k.new_zeros((k.shape[0], -(-length // GRAIN)), dtype=torch.float32)
    return norms.scatter_reduce_(1, (positions // GRAIN).expand(k.shape[:2]), _norms(k.float()), "amax")


def _near_lse(q: Tensor, k: Tensor, slope: Tensor, rules: Rules) -> Tensor:
    """(N, R, S): log-sum-exp of each row over its visible near keys, natural log; -inf or NaN where it sees none of
    them.
    """
    n, r, s, d = q.shape
    t, parts = k.shape[1], []
    for first in range(0, s, _PIECE):
        rows = q[:, :, first : first + _PIECE]
        count, begin = rows.shape[2], rules.query_offset + first - BAND
        rows = F.pad(rows, (0, 0, 0, -count % BAND)).view(n, r, -1, BAND, d)
        blocks = rows.shape[2]
        near = k[:, max(begin, 0) : max(begin + (blocks + 1) * BAND, 0)]
        before = max(-begin, 0)
        near = F.pad(near, (0, 0, before, (blocks + 1) * BAND - before - near.shape[1])).contiguous()
        pairs = near.as_strided((n, blocks, d, 2 * BAND), (near.stride(0), BAND * d, 1, d))  # of neighbouring blocks
        scores = q.new_empty(n, r, blocks, BAND, 2 * BAND)
        for i, j in product(range(n), range(r)):  # one by one they multiply as views
            torch.bmm(rows[i, j], pairs[i], out=scores[i, j])
        scores = scores.view(n, r, -1, 2 * BAND)[:, :, :count]

        query = torch.arange(first, first + count, device=q.device)
        away = (
            torch.arange(BAND, -BAND, -1, device=q.device) + (query % BAND)[:, None]
        )  # how far each near key lies back
        see = _sees(rules, query, away, t)
        see = see.repeat(n // see.shape[0], 1, 1)[:, None] if see.dim() == 3 else see
        scores.addcmul_(slope[..., None], away.to(scores.dtype), value=-1).masked_fill_(~see, -math.inf)
        top = scores.amax(-1, keepdim=True)
        # In base 2: on Intel's processors torch's exp takes up to a hundred times as long where results vanish.
        parts.append(scores.sub_(top).mul_(_LOG2E).exp2_().sum(-1).log_() + top.squeeze(-1))
    return torch.cat(parts, -1)


def _sees(rules: Rules, query: Tensor, away: Tensor, keys: int) -> Tensor:
    """Which of the keys `away` (S, K) before each query it sees; those after it count as unseen. Bool (S, K) or (B, S,
    K).
    """
    position = query[:, None] + rules.query_offset
    key = position - away
    see = (away >= 0) & (key >= 0) & (key < keys)
    key = key.clamp(0, keys - 1)
    if rules.window is not None:
        see = see & (away < rules.window)
    if rules.attention_mask is not None:
        see = see & rules.attention_mask.bool()[:, key]
    if rules.sequence_id is not None:
        own = rules.sequence_id[:, position]
        see = see & (rules.sequence_id[:, key] == own) & (own >= 0)
    return see


def _norms(x: Tensor) -> Tensor:
    """Euclidean norms over the last dimension, never too small by more than rounding, and finite: inf and NaN become
    the largest.
    """
    size = torch.linalg.vector_norm(x, dim=-1) + _TINY
    return torch.where(size < _BIG, size, _BIG)

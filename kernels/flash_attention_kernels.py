"""The Triton kernels of flash_attention: key norms and the search for skippable keys, forward, dQ, dK and dV.

Scores are in base 2: exp2 of qk * softmax_scale * log2(e) + bias * log2(e). Positions: query row r of the call lies at
`off + r`, key j at j. Bias and running maximum of a tile of queries are relative to the position of its first row
(pos0), so nothing depends on how far from the start it lies; within a block of keys the bias is one row vector,
`cb = arange(BLOCK_N) * slope2`, and the block's own shift is a scalar. What is constant along a row cancels in the
softmax and is put back into the LSE. That costs an instruction per score, and some 2^-24 * BLOCK_M * slope of a score;
fp32 has better to lose: EXACT works in base e, with each pair's own distance. `slope2`, `lse2`: in the base at hand.

The keys of a tile are walked in up to three loops, of which the middle one checks nothing:

    lo ...... full_lo ........... full_hi ..... hi        [lo, hi): keys some row sees; [full_lo, full_hi): all rows do
      checked          plain             checked

Skipping raises the lower end: keys before `start`, one number per tile that the forward finds and stores, weigh at most
2^-24 of every row (`_first_kept`). dQ reads it, dK/dV its inverse (`_last_kept_kernel`).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

# What a kernel's MODE says, as bits.
CAUSAL = tl.constexpr(1)  # keys after the query are invisible
WINDOW = tl.constexpr(2)  # |i - j| < window
IDS = tl.constexpr(4)  # keys have ids, -1 is invisible; without DOCS every query has id 0
DOCS = tl.constexpr(8)  # queries have ids too, negative ones see nothing
PREFIX = tl.constexpr(16)  # some keys are visible to earlier queries
ALIBI = tl.constexpr(32)
DROPOUT = tl.constexpr(64)
SKIP = tl.constexpr(128)
EXACT = tl.constexpr(256)  # fp32: natural base, bias of each pair from its distance

LOG2E = tl.constexpr(1.4426950408889634)
FAR_OFF = tl.constexpr(0x7FFFFFFF)  # no position
LARGE = tl.constexpr(3.0e38)  # stands for inf and NaN
TINY = tl.constexpr(2.0**-118)  # at least 256 squares that were flushed to zero
BIAS_ERROR = tl.constexpr(1.0 - 2.0**-20)
BITS = tl.constexpr(24.0 + 1.0 / 16)
# Arguments that differ between calls, whose value a compiled kernel must not depend on: one serves every length.
SIZES = ("B", "H", "G", "S", "T", "off", "window", "tiles", "start_tiles", "blocks", "chunks", "n")
NEAR = tl.constexpr(1)  # skip blocks before the diagonal one from which a row's total is bounded, beside that one


# ---- rows of a head --------------------------------------------------------------------------------------------------


@triton.jit
def _head(X, b, h, sb, sh, TMA: tl.constexpr):
    """Where head h of batch row b begins; a descriptor stays as it is."""
    if TMA:
        return X
    else:
        return X + b.to(tl.int64) * sb + h.to(tl.int64) * sh


@triton.jit
def _rows(
    X, b, h, r0, sr, count, DH: tl.constexpr, D: tl.constexpr, R: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr
):
    """(R, D): rows r0 .. r0 + R of a head, zero beyond `count` (if EDGE) and DH. X: what `_head` gave, or a descriptor
    of (B, H, count, DH) in blocks of (1, 1, R, D).
    """
    if TMA:
        return X.load([b, h, r0, 0]).reshape([R, D])
    else:
        r = tl.arange(0, R)
        d = tl.arange(0, D)
        p = X + r0.to(tl.int64) * sr + r[:, None] * sr + d[None, :]
        if EDGE and D != DH:
            return tl.load(p, mask=(r0 + r < count)[:, None] & (d < DH)[None, :], other=0.0)
        elif EDGE:
            return tl.load(p, mask=(r0 + r < count)[:, None], other=0.0)
        elif D != DH:
            return tl.load(p, mask=(d < DH)[None, :], other=0.0)
        else:
            return tl.load(p)


@triton.jit
def _store_rows(X, x, b, h, r0, heads, count, DH: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """x (R, D) to rows r0 .. of head h of X (B, count, heads, DH), contiguous."""
    r = tl.arange(0, R)
    d = tl.arange(0, D)
    p = X + ((b.to(tl.int64) * count + r0) * heads + h) * DH + r[:, None] * (heads * DH) + d[None, :]
    tl.store(p, x.to(X.dtype.element_ty), mask=(r0 + r < count)[:, None] & (d < DH)[None, :])


@triton.jit
def _program(tiles, B, ORDER, MODE: tl.constexpr):
    """(tile, batch row, head) of this program; with skipping, heads in ORDER, those with most to do first."""
    pid = tl.program_id(0)
    h = pid // (tiles * B)
    if SKIP & MODE:
        h = tl.load(ORDER + h)
    return pid % tiles, (pid // tiles) % B, h


@triton.jit
def _slope(SLOPES, h, MODE: tl.constexpr):
    if ALIBI & MODE:
        return tl.load(SLOPES + h)
    else:
        return h * 0.0


@triton.jit
def _unit(MODE: tl.constexpr):
    """What takes a natural exponent to the base at hand."""
    if EXACT & MODE:
        return 1.0
    else:
        return LOG2E


@triton.jit
def _exp(x, MODE: tl.constexpr):
    if EXACT & MODE:
        return tl.exp(x)
    else:
        return tl.math.exp2(x)


@triton.jit
def _log(x, MODE: tl.constexpr):
    if EXACT & MODE:
        return tl.log(x)
    else:
        return tl.math.log2(x)


@triton.jit
def _shift(slope2, away, MODE: tl.constexpr):
    """The bias over a distance that all pairs of a row or block have in common; none where each pair has its own."""
    if EXACT & MODE:
        return away.to(tl.float32) * 0.0
    else:
        return slope2 * away.to(tl.float32)


# ---- who sees whom ---------------------------------------------------------------------------------------------------


@triton.jit
def _of_batch_row(X, b, T):
    """Row b of a mask (B, T). Only for what is not None: Triton 3.6 lets no function return that."""
    return X + b.to(tl.int64) * T


@triton.jit
def _query_ids(QUERY_IDS, pos, end, MODE: tl.constexpr):
    """The ids of queries at positions pos < end; -2, which no key has, where they see nothing."""
    if DOCS & MODE:
        ids = tl.load(QUERY_IDS + pos, mask=pos < end, other=-2)
        return tl.where(ids < 0, -2, ids)
    else:
        return tl.where(pos < end, 0, -2)


@triton.jit
def _key_ids(KEY_IDS, cols, T, MODE: tl.constexpr):
    if IDS & MODE:
        return tl.load(KEY_IDS + cols, mask=cols < T, other=-1)
    else:
        return tl.where(cols < T, 0, -1)


@triton.jit
def _early(PREFIX_MASK, cols, T, MODE: tl.constexpr):
    """Which keys earlier queries see."""
    if PREFIX & MODE:
        return tl.load(PREFIX_MASK + cols, mask=cols < T, other=0) != 0
    elif CAUSAL & MODE:
        return cols < 0
    else:
        return cols < T


@triton.jit
def _visible(pos, cols, qid, KEY_IDS, PREFIX_MASK, T, window, MODE: tl.constexpr):
    """(rows, keys) bool of queries at positions pos with ids qid and keys cols."""
    if IDS & MODE:  # keys beyond T have id -1
        see = _key_ids(KEY_IDS, cols, T, MODE)[None, :] == qid[:, None]
    else:
        see = (cols < T)[None, :]
    if CAUSAL & MODE:
        under = cols[None, :] <= pos[:, None]
        if PREFIX & MODE:
            under = under | _early(PREFIX_MASK, cols, T, MODE)[None, :]
        see = see & under
    if WINDOW & MODE:
        away = pos[:, None] - cols[None, :]
        see = see & (away < window) & (-away < window)
    return see


@triton.jit
def _scores(
    qk, pos, cols, qid, KEY_IDS, PREFIX_MASK, T, window, qk_scale, slope2, cb,
    CHECK: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Scores of a block from the product q.k: with the bias relative to the block's first key and to the tile's first
    row; where CHECK, -inf at invisible pairs.
    """
    s = qk * qk_scale
    if ALIBI & MODE and EXACT & MODE:
        s = s - slope2 * tl.abs(pos[:, None] - cols[None, :]).to(tl.float32)
    elif ALIBI & MODE:
        s = s + cb[None, :]
        if CHECK and not (CAUSAL & MODE and not PREFIX & MODE):
            s = s - (2 * slope2) * tl.maximum(cols[None, :] - pos[:, None], 0).to(tl.float32)
    if CHECK:
        s = tl.where(_visible(pos, cols, qid, KEY_IDS, PREFIX_MASK, T, window, MODE), s, float("-inf"))
    return s


@triton.jit
def _survives(SEED, counter, rows, cols, dropout_p):
    """(rows, keys) bool: a function of seed, head (counter), row and key alone."""
    r = rows[:, None] + cols[None, :] * 0
    c = cols[None, :] + rows[:, None] * 0
    bits, _, _, _ = tl.philox(tl.load(SEED), r, c, r * 0 + counter, r * 0)
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def _key_range(BOUNDS, tile, pos0, T, window, MODE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(lo, full_lo, full_hi, hi) of the keys of M queries from position pos0; multiples of N but hi. BOUNDS: four
    numbers for each tile, from `_bounds_kernel`.
    """
    lo = pos0 * 0
    hi = lo + T
    full_lo = lo
    full_hi = hi
    if CAUSAL & MODE and not PREFIX & MODE:
        hi = tl.minimum(hi, pos0 + M)
    if CAUSAL & MODE or ALIBI & MODE:  # right of the diagonal the bias is no row vector
        full_hi = tl.minimum(full_hi, pos0 + 1)
    if WINDOW & MODE:
        lo = tl.maximum(lo, pos0 - window + 1)
        hi = tl.minimum(hi, pos0 + M - 1 + window)
        full_lo = tl.maximum(full_lo, pos0 + M - window)
        full_hi = tl.minimum(full_hi, pos0 + window)
    if IDS & MODE or PREFIX & MODE:
        BOUNDS += tile * 4
        lo = tl.maximum(lo, tl.load(BOUNDS))
        hi = tl.minimum(hi, tl.load(BOUNDS + 1))
        full_lo = tl.maximum(full_lo, tl.load(BOUNDS + 2))
        full_hi = tl.minimum(full_hi, tl.load(BOUNDS + 3))
    lo = lo // N * N
    full_hi = tl.maximum(full_hi // N * N, lo)
    full_lo = tl.minimum(tl.maximum((full_lo + N - 1) // N * N, lo), full_hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def _row_range(BOUNDS, tile, n0, off, S, window, MODE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(lo, full_lo, full_hi, hi) of the rows that see N keys from n0; multiples of M but hi. Rows beyond S pass for
    seeing: their LSE is inf.
    """
    first = n0 - off
    lo = n0 * 0
    hi = lo + S
    full_lo = lo
    full_hi = lo + (S + M - 1) // M * M
    if CAUSAL & MODE and not PREFIX & MODE:
        lo = tl.maximum(lo, first)
    if CAUSAL & MODE or ALIBI & MODE:
        full_lo = tl.maximum(full_lo, first + N - 1)
    if WINDOW & MODE:
        lo = tl.maximum(lo, first - window + 1)
        hi = tl.minimum(hi, first + N - 1 + window)
        full_lo = tl.maximum(full_lo, first + N - window)
        full_hi = tl.maximum(tl.minimum(full_hi, first + window), 0)
    if IDS & MODE or PREFIX & MODE:
        BOUNDS += tile * 4
        lo = tl.maximum(lo, tl.load(BOUNDS))
        hi = tl.minimum(hi, tl.load(BOUNDS + 1))
        full_lo = tl.maximum(full_lo, tl.load(BOUNDS + 2))
        full_hi = tl.minimum(full_hi, tl.load(BOUNDS + 3))
    lo = lo // M * M
    full_hi = tl.maximum(full_hi // M * M, lo)
    full_lo = tl.minimum(tl.maximum((full_lo + M - 1) // M * M, lo), full_hi)
    return lo, full_lo, full_hi, hi


@triton.jit(do_not_specialize=SIZES)
def _flash_attention_bounds_kernel(
    BOUNDS, KEY_IDS, QUERY_IDS, PREFIX_MASK, S, T, off, tiles,
    MODE: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each tile of queries (KEYS: of keys) four numbers: from where and to where ids and causality let it see keys
    (be seen by rows), and the range of those around its diagonal in which all pairs have equal ids.

    The first two are exact for ids that never decrease and an outer bound for others; the last two need a tile of one
    id. The kernels' own checks decide.
    """
    t = tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles
    if IDS & MODE:
        KEY_IDS = _of_batch_row(KEY_IDS, b, T)
    if DOCS & MODE:
        QUERY_IDS = _of_batch_row(QUERY_IDS, b, T)
    if PREFIX & MODE:
        PREFIX_MASK = _of_batch_row(PREFIX_MASK, b, T)
    own = t * TILE + tl.arange(0, TILE)
    if KEYS:
        ids = _key_ids(KEY_IDS, own, T, MODE)
        exists = own < T
        free = tl.max(_early(PREFIX_MASK, own, T, MODE).to(tl.int32), 0) != 0
        count = S
        diagonal = t * TILE - off
    else:
        ids = _query_ids(QUERY_IDS, off + own, off + S, MODE)
        exists = own < S
        count = T
        diagonal = off + t * TILE
    diagonal = tl.minimum(tl.maximum(diagonal, 0), count - 1)
    low = tl.min(tl.where(ids >= 0, ids, FAR_OFF), 0)
    high = tl.max(ids, 0)
    uniform = (tl.min(tl.where(exists, ids, FAR_OFF), 0) == high) & (high >= 0)
    first = t * 0 + FAR_OFF
    end = t * 0
    full_lo = t * 0
    full_hi = t * 0 + FAR_OFF
    for c in range(0, count, CHUNK):
        o = c + tl.arange(0, CHUNK)
        if KEYS:
            theirs = _query_ids(QUERY_IDS, off + o, off + S, MODE)
            reach = (off + o >= t * TILE) | free
        else:
            theirs = _key_ids(KEY_IDS, o, T, MODE)
            reach = (o < off + (t + 1) * TILE) | _early(PREFIX_MASK, o, T, MODE)
        seen = reach & (theirs >= low) & (theirs <= high)
        first = tl.minimum(first, tl.min(tl.where(seen, o, FAR_OFF), 0))
        end = tl.maximum(end, tl.max(tl.where(seen, o + 1, 0), 0))
        foreign = (o < count) & (theirs != high)
        full_lo = tl.maximum(full_lo, tl.max(tl.where(foreign & (o <= diagonal), o + 1, 0), 0))
        full_hi = tl.minimum(full_hi, tl.min(tl.where(foreign & (o >= diagonal), o, FAR_OFF), 0))
    p = BOUNDS + tl.program_id(0) * 4
    tl.store(p, first)
    tl.store(p + 1, end)
    tl.store(p + 2, full_lo)
    tl.store(p + 3, tl.where(uniform, full_hi, 0))


# ---- skipping --------------------------------------------------------------------------------------------------------


@triton.jit
def _norm(x):
    """Euclidean norms of rows, never too small by more than rounding, and finite."""
    x = x.to(tl.float32)
    n = tl.sqrt(tl.sum(x * x, 1) + TINY)
    return tl.where(n < LARGE, n, LARGE)


@triton.jit(do_not_specialize=SIZES)
def _flash_attention_key_norm_kernel(
    KEY_MAX, K, T, G, blocks, skb, skh, skn, DH: tl.constexpr, D: tl.constexpr, SKIP_N: tl.constexpr
):
    """KEY_MAX (B, G, blocks + 1): 0, then the largest norm in each block of SKIP_N keys."""
    c = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    k = _rows(_head(K, head // G, head % G, skb, skh, False), 0, 0, c * SKIP_N, skn, T, DH, D, SKIP_N, True, False)
    tl.store(KEY_MAX + head * (blocks + 1) + c + 1, tl.max(_norm(k), 0))
    if c == 0:
        tl.store(KEY_MAX + head * (blocks + 1), 0.0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=SIZES)
def _flash_attention_key_max_kernel(KEY_MAX, n, CHUNK: tl.constexpr):
    """Each row of n becomes its running maximum, in place: entry c then holds the largest norm before block c."""
    row = KEY_MAX + tl.program_id(0) * n
    carry = 0.0
    for i in range(0, n, CHUNK):
        o = i + tl.arange(0, CHUNK)
        x = tl.load(row + o, mask=o < n, other=0.0)
        x = tl.maximum(tl.associative_scan(x, 0, _larger), carry)
        tl.store(row + o, x, mask=o < n)
        carry = tl.max(x, 0)


@triton.jit(do_not_specialize=SIZES)
def _flash_attention_order_kernel(ORDER, SLOPES, n, GROUP: tl.constexpr, N: tl.constexpr):
    """ORDER (n,): groups of GROUP heads by ascending slope (each by its smallest): those that keep most come first."""
    i = tl.arange(0, N)
    down = tl.full([N, 1], LARGE, tl.float32)
    across = tl.full([1, N], LARGE, tl.float32)
    for g in tl.static_range(GROUP):
        x = tl.load(SLOPES + i * GROUP + g, mask=i < n, other=LARGE)
        x = tl.where(x < LARGE, x, LARGE)  # NaN too
        down = tl.minimum(down, x[:, None])
        across = tl.minimum(across, x[None, :])
    before = (across < down) | ((across == down) & (i[None, :] < i[:, None]))
    tl.store(ORDER + tl.sum(before.to(tl.int32), 1), i, mask=i < n)


@triton.jit
def _log_weight(cut, slope):
    """log2 of a bound on sum exp(-slope * distance) over `cut` keys, their nearest at distance 0: 1/m + 1/2 + m/12 >=
    1/(1 - exp(-m)), without its cancellation.
    """
    return tl.math.log2(tl.minimum(cut, 1.0 / slope + 0.5 + slope * (1.0 / 12)))


@triton.jit
def _guess(e, n, pos0, slope, SKIP_N: tl.constexpr):
    """The cut in blocks, 0 .. n, were all keys of the norm that gave e."""
    x = pos0 + 1 - (e + _log_weight(tl.maximum(pos0, 1).to(tl.float32), slope)) / (slope * LOG2E * BIAS_ERROR)
    return tl.where(x > 0.0, tl.minimum(x / SKIP_N, n.to(tl.float32)), 0.0).to(tl.int32)


@triton.jit
def _first_kept(KEY_MAX, last, qn, L, counts, n, pos0, qk_scale, slope, SKIP_N: tl.constexpr, RHO: tl.constexpr):
    """The largest cut, in blocks and at most n, before which no key matters to any row of the tile; 0 keeps all.

    A row's total is at least 2^L, its sum over visible near keys (relative to pos0). With K_b the largest norm of the
    keys before b, those weigh at most 2^(c |q| K_b - m2 (pos0 - b + 1)) * min(b, 1/(1 - e^-m)), c = qk_scale, m2 = m
    log2(e). In fp32 with every rounding on the safe side, where RHO is the relative error of a product q.k, they are
    dropped if for all rows that count

        (1 + RHO) c |q| K_b + RHO c |q| K_near - L - (1 - 2^-20) m2 (pos0 - b + 1) + log2 weight <= -(24 + 1/16)

    K_near: KEY_MAX[last], over the keys that gave L. A comparison that is not true (inf, NaN) keeps. The bound grows
    with b: bisection, from two guesses that nearly always leave a block or two.
    """
    a = qn * qk_scale
    r = L - (RHO * a) * tl.load(KEY_MAX + last) - BITS
    r = tl.where(r > -LARGE, r, -LARGE)
    a = tl.where(counts, a * (1.0 + RHO), 0.0)
    r = tl.where(counts, r, LARGE)
    n = tl.where(slope >= 0.0, n, 0)
    lo = n * 0
    hi = n + 1
    first = lo == 0
    c = _guess(tl.max(a * tl.load(KEY_MAX + n) - r, 0), n, pos0, slope, SKIP_N)
    while hi - lo > 1:
        c = tl.minimum(tl.maximum(c, lo + 1), hi - 1)
        e = tl.max(a * tl.load(KEY_MAX + c) - r, 0)
        far = (slope * LOG2E * BIAS_ERROR) * (pos0 - c * SKIP_N + 1).to(tl.float32)
        good = e - far + _log_weight((c * SKIP_N).to(tl.float32), slope) <= 0.0
        lo = tl.where(good, c, lo)
        hi = tl.where(good, hi, c)
        c = tl.where(first & good, _guess(e, n, pos0, slope, SKIP_N) + 1, (lo + hi) // 2)
        first = lo < 0
    return lo


@triton.jit(do_not_specialize=SIZES)
def _flash_attention_last_kept_kernel(
    LAST, START, tiles, blocks, chunks, SKIP_N: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr
):
    """LAST (B, H, blocks): the last tile of queries that keeps each block of SKIP_N keys, -1 if none. START need not
    grow with the tile, so tiles before it may skip the block too.
    """
    head = tl.program_id(0) // chunks
    c = (tl.program_id(0) % chunks) * BLOCKS + tl.arange(0, BLOCKS)
    last = tl.full([BLOCKS], -1, tl.int32)
    for t0 in range(0, tiles, TILES):
        t = t0 + tl.arange(0, TILES)
        start = tl.load(START + head * tiles + t, mask=t < tiles, other=FAR_OFF)
        last = tl.maximum(last, tl.max(tl.where(start[None, :] <= (c * SKIP_N)[:, None], t[None, :], -1), 1))
    tl.store(LAST + head * blocks + c, last, mask=c < blocks)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _fwd_loop(
    acc, l, m, q, qid, K, V, KEY_IDS, PREFIX_MASK, SEED, b, hk, counter, skn, svn, lo, hi, T, start_m, off, window,
    dropout_p, qk_scale, slope2, CHECK: tl.constexpr, MODE: tl.constexpr, DH: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    rel = tl.arange(0, N)
    rows = start_m + tl.arange(0, M)
    cb = rel.to(tl.float32) * slope2
    away = (lo - off - start_m).to(tl.float32)  # exact below 2^24 keys
    for n0 in tl.range(lo, hi, N):
        n0 = tl.multiple_of(n0, N)
        k = _rows(K, b, hk, n0, skn, T, DH, D, N, CHECK, TMA)
        qk = tl.dot(q, k.T, input_precision=PREC)
        if CHECK or ALIBI & MODE:
            s = _scores(
                qk, off + rows, n0 + rel, qid, KEY_IDS, PREFIX_MASK, T, window, qk_scale, slope2, cb, CHECK, MODE
            )
            shift = _shift(slope2, away, MODE)
            away += N
            m_new = tl.maximum(m, tl.max(s, 1) + shift)
            p = _exp(s - (m_new - shift)[:, None], MODE)
        else:
            m_new = tl.maximum(m, tl.max(qk, 1) * qk_scale)
            p = _exp(qk * qk_scale - m_new[:, None], MODE)
        alpha = _exp(m - m_new, MODE)
        l = l * alpha + tl.sum(p, 1)
        if DROPOUT & MODE:
            p = tl.where(_survives(SEED, counter, rows, n0 + rel, dropout_p), p, 0.0)
        v = _rows(V, b, hk, n0, svn, T, DH, D, N, CHECK, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PREC)
        m = m_new
    return acc, l, m


@triton.jit(do_not_specialize=SIZES)
def _flash_attention_fwd_kernel(
    Q, K, V, O, LSE, START, SHARE, KEY_MAX, BOUNDS, KEY_IDS, QUERY_IDS, PREFIX_MASK, SLOPES, ORDER, SEED,
    scale, dropout_p, share, B, H, S, T, off, window, tiles, blocks,
    sqb, sqh, sqm, skb, skh, skn, svb, svh, svn,
    MODE: tl.constexpr, GROUP: tl.constexpr, DH: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SKIP_N: tl.constexpr, RHO: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. share: by what a computed pair is counted in SHARE."""
    t, b, h = _program(tiles, B, ORDER, MODE)
    t = tiles - 1 - t
    hk = h // GROUP
    head = b * H + h
    start_m = t * BLOCK_M
    pos0 = off + start_m
    rows = start_m + tl.arange(0, BLOCK_M)
    if IDS & MODE:
        KEY_IDS = _of_batch_row(KEY_IDS, b, T)
    if PREFIX & MODE:
        PREFIX_MASK = _of_batch_row(PREFIX_MASK, b, T)
    if DOCS & MODE:
        QUERY_IDS = _of_batch_row(QUERY_IDS, b, T)
    qid = _query_ids(QUERY_IDS, off + rows, off + S, MODE)
    slope = _slope(SLOPES, h, MODE)
    slope2 = slope * _unit(MODE)
    qk_scale = scale * _unit(MODE)
    K = _head(K, b, hk, skb, skh, TMA)
    V = _head(V, b, hk, svb, svh, TMA)
    q = _rows(_head(Q, b, h, sqb, sqh, TMA), b, h, start_m, sqm, S, DH, D, BLOCK_M, True, TMA)
    m = tl.full([BLOCK_M], -LARGE, tl.float32)  # finite: a row that has seen nothing yet keeps p = 0
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    lo, full_lo, full_hi, hi = _key_range(BOUNDS, b * tiles + t, pos0, T, window, MODE, BLOCK_M, BLOCK_N)
    near = full_hi
    if SKIP & MODE:
        near = tl.maximum(tl.minimum(pos0, tl.maximum(hi - 1, 0)) // SKIP_N - NEAR, 0) * SKIP_N
        near = tl.maximum(near, lo // SKIP_N * SKIP_N)
        full_lo = tl.where(full_hi >= near, tl.minimum(full_lo, near), near)
    acc, l, m = _fwd_loop(
        acc, l, m, q, qid, K, V, KEY_IDS, PREFIX_MASK, SEED, b, hk, head, skn, svn, near, hi, T, start_m, off, window,
        dropout_p, qk_scale, slope2, True, MODE, DH, D, BLOCK_M, BLOCK_N, TMA, PREC,
    )  # fmt: skip
    if SKIP & MODE:
        last = blocks + start_m * 0
        counts = qid >= 0
        if CAUSAL & MODE and not PREFIX & MODE:
            last = tl.minimum((pos0 + BLOCK_M + SKIP_N - 1) // SKIP_N, last)
            counts = counts & (off + rows >= lo)  # the others see nothing
        L = m + _log(l, MODE)
        if EXACT & MODE:
            L = L * LOG2E + (slope * LOG2E) * tl.arange(0, BLOCK_M).to(tl.float32)
        cut = _first_kept(
            KEY_MAX + (b * (H // GROUP) + hk) * (blocks + 1), last, _norm(q), L, counts,
            tl.minimum(near // SKIP_N, blocks), pos0, scale * LOG2E, slope, SKIP_N, RHO,
        )  # fmt: skip
        # What comes from a reduction is not uniform to ptxas, and the loop would lose its pipeline; what is loaded is.
        START += head * tiles + t
        tl.store(START, tl.where(near == lo // SKIP_N * SKIP_N, near, cut * SKIP_N))
        tl.debug_barrier()
        start = tl.load(START, volatile=True)
        lo = tl.maximum(lo, start)
    acc, l, m = _fwd_loop(
        acc, l, m, q, qid, K, V, KEY_IDS, PREFIX_MASK, SEED, b, hk, head, skn, svn, tl.maximum(full_lo, lo), near, T,
        start_m, off, window, dropout_p, qk_scale, slope2, False, MODE, DH, D, BLOCK_M, BLOCK_N, TMA, PREC,
    )  # fmt: skip
    if WINDOW & MODE or IDS & MODE:
        acc, l, m = _fwd_loop(
            acc, l, m, q, qid, K, V, KEY_IDS, PREFIX_MASK, SEED, b, hk, head, skn, svn, lo, full_lo, T, start_m, off,
            window, dropout_p, qk_scale, slope2, True, MODE, DH, D, BLOCK_M, BLOCK_N, TMA, PREC,
        )  # fmt: skip
    if DROPOUT & MODE:
        acc = acc / (1.0 - dropout_p)
    o = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    _store_rows(O, o, b, h, start_m, H, S, DH, D, BLOCK_M)
    lse = m + _log(l, MODE) - _shift(slope2, tl.arange(0, BLOCK_M), MODE)
    tl.store(LSE + head.to(tl.int64) * S + rows, lse / _unit(MODE), mask=rows < S)
    end = tl.minimum(hi, T)
    if CAUSAL & MODE and not PREFIX & MODE:
        end = tl.minimum(end, off + S)
    keys = end - lo
    pairs = tl.maximum(keys, 0).to(tl.float32) * tl.minimum(S - start_m, BLOCK_M).to(tl.float32)
    tl.store(SHARE + head * tiles + t, pairs * share)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _flash_attention_bwd_delta_kernel(
    O, DO, LSE, DLSE, LSE2, DELTA, H, S, tiles, sdb, sdh, sdm,
    LSE_GRADIENT: tl.constexpr, MODE: tl.constexpr, DH: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """LSE2 and DELTA (B, H, tiles * BLOCK_M): lse in the base at hand, and sum_d o do - dlse. Rows beyond S, and those
    that see nothing, get lse inf, which makes their probabilities 0 without a mask.
    """
    t = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b = head // H
    h = head % H
    rows = t * BLOCK_M + tl.arange(0, BLOCK_M)
    do = _rows(_head(DO, b, h, sdb, sdh, False), b, h, t * BLOCK_M, sdm, S, DH, D, BLOCK_M, True, False)
    O += (b * S * H + h) * DH
    o = _rows(O, b, h, t * BLOCK_M, H * DH, S, DH, D, BLOCK_M, True, False)
    lse = tl.load(LSE + head * S + rows, mask=rows < S, other=float("-inf"))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if LSE_GRADIENT:
        delta -= tl.load(DLSE + head * S + rows, mask=rows < S, other=0.0)
    blind = lse == float("-inf")
    padded = head * tiles * BLOCK_M + rows
    tl.store(LSE2 + padded, tl.where(blind, float("inf"), lse * _unit(MODE)))
    tl.store(DELTA + padded, tl.where(blind, 0.0, delta))


@triton.jit
def _dq_loop(
    dq, q, do, lse, delta, qid, K, V, KEY_IDS, PREFIX_MASK, SEED, b, hk, counter, skn, svn, lo, hi, T, start_m, off,
    window, dropout_p, qk_scale, slope2, CHECK: tl.constexpr, MODE: tl.constexpr, DH: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """lse: relative to the position of the tile's first row."""
    rel = tl.arange(0, N)
    rows = start_m + tl.arange(0, M)
    cb = rel.to(tl.float32) * slope2
    for n0 in tl.range(lo, hi, N):
        n0 = tl.multiple_of(n0, N)
        k = _rows(K, b, hk, n0, skn, T, DH, D, N, CHECK, TMA)
        v = _rows(V, b, hk, n0, svn, T, DH, D, N, CHECK, TMA)
        qk = tl.dot(q, k.T, input_precision=PREC)
        s = _scores(qk, off + rows, n0 + rel, qid, KEY_IDS, PREFIX_MASK, T, window, qk_scale, slope2, cb, CHECK, MODE)
        p = _exp(s - (lse - _shift(slope2, n0 - off - start_m, MODE))[:, None], MODE)
        dp = tl.dot(do, v.T, input_precision=PREC)
        if DROPOUT & MODE:
            dp = tl.where(_survives(SEED, counter, rows, n0 + rel, dropout_p), dp / (1.0 - dropout_p), 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PREC)
    return dq


@triton.jit(do_not_specialize=SIZES)
def _flash_attention_bwd_dq_kernel(
    Q, K, V, DO, DQ, LSE2, DELTA, START, BOUNDS, KEY_IDS, QUERY_IDS, PREFIX_MASK, SLOPES, ORDER, SEED,
    scale, dropout_p, B, H, S, T, off, window, tiles, start_tiles,
    sqb, sqh, sqm, skb, skh, skn, svb, svh, svn, sdb, sdh, sdm,
    MODE: tl.constexpr, GROUP: tl.constexpr, DH: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE_M: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. TILE_M: the forward's, rows of one START; LSE2 and DELTA are padded to it."""
    t, b, h = _program(tiles, B, ORDER, MODE)
    t = tiles - 1 - t
    hk = h // GROUP
    head = b * H + h
    start_m = t * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)
    if IDS & MODE:
        KEY_IDS = _of_batch_row(KEY_IDS, b, T)
    if PREFIX & MODE:
        PREFIX_MASK = _of_batch_row(PREFIX_MASK, b, T)
    if DOCS & MODE:
        QUERY_IDS = _of_batch_row(QUERY_IDS, b, T)
    qid = _query_ids(QUERY_IDS, off + rows, off + S, MODE)
    slope2 = _slope(SLOPES, h, MODE) * _unit(MODE)
    qk_scale = scale * _unit(MODE)
    K = _head(K, b, hk, skb, skh, TMA)
    V = _head(V, b, hk, svb, svh, TMA)
    q = _rows(_head(Q, b, h, sqb, sqh, TMA), b, h, start_m, sqm, S, DH, D, BLOCK_M, True, TMA)
    do = _rows(_head(DO, b, h, sdb, sdh, TMA), b, h, start_m, sdm, S, DH, D, BLOCK_M, True, TMA)
    padded = head.to(tl.int64) * (start_tiles * TILE_M) + rows
    lse = tl.load(LSE2 + padded) + _shift(slope2, tl.arange(0, BLOCK_M), MODE)
    delta = tl.load(DELTA + padded)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    lo, full_lo, full_hi, hi = _key_range(BOUNDS, b * tiles + t, off + start_m, T, window, MODE, BLOCK_M, BLOCK_N)
    if SKIP & MODE:
        lo = tl.maximum(lo, tl.load(START + head * start_tiles + start_m // TILE_M))
    if WINDOW & MODE or IDS & MODE:
        dq = _dq_loop(
            dq, q, do, lse, delta, qid, K, V, KEY_IDS, PREFIX_MASK, SEED, b, hk, head, skn, svn, lo, full_lo, T,
            start_m, off, window, dropout_p, qk_scale, slope2, True, MODE, DH, D, BLOCK_M, BLOCK_N, TMA, PREC,
        )  # fmt: skip
    dq = _dq_loop(
        dq, q, do, lse, delta, qid, K, V, KEY_IDS, PREFIX_MASK, SEED, b, hk, head, skn, svn, tl.maximum(full_lo, lo),
        full_hi, T, start_m, off, window, dropout_p, qk_scale, slope2, False, MODE, DH, D, BLOCK_M, BLOCK_N, TMA, PREC,
    )  # fmt: skip
    dq = _dq_loop(
        dq, q, do, lse, delta, qid, K, V, KEY_IDS, PREFIX_MASK, SEED, b, hk, head, skn, svn, tl.maximum(full_hi, lo),
        hi, T, start_m, off, window, dropout_p, qk_scale, slope2, True, MODE, DH, D, BLOCK_M, BLOCK_N, TMA, PREC,
    )  # fmt: skip
    _store_rows(DQ, dq * scale, b, h, start_m, H, S, DH, D, BLOCK_M)


@triton.jit
def _dkdv_loop(
    dk, dv, k, v, Q, DO, LSE2, DELTA, START, KEY_IDS, QUERY_IDS, PREFIX_MASK, SEED, b, h, counter, sqm, sdm, lo, hi,
    jump, over, S, T, n0, off, window, dropout_p, qk_scale, slope2, DK: tl.constexpr, DV: tl.constexpr,
    CHECK: tl.constexpr, MODE: tl.constexpr, DH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    TILE_M: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Rows lo .. hi; where CHECK, those from `jump` on mean rows `over` further on.

    Scores as (queries, keys): what belongs to a row costs few registers then, and p and ds pass through shared
    memory.
    """
    rel = tl.arange(0, M)
    cols = n0 + tl.arange(0, N)
    cb = tl.arange(0, N).to(tl.float32) * slope2
    rb = _shift(slope2, rel, MODE)
    for m0 in tl.range(lo, hi, M):
        if CHECK and (WINDOW & MODE or IDS & MODE):
            m0 += tl.where(m0 >= jump, over, 0)
        m0 = tl.multiple_of(m0, M)
        q = _rows(Q, b, h, m0, sqm, S, DH, D, M, True, TMA)
        do = _rows(DO, b, h, m0, sdm, S, DH, D, M, True, TMA)
        base = _shift(slope2, m0 + off - n0, MODE)
        if SKIP & MODE:
            base = tl.where(tl.load(START + m0 // TILE_M) > n0, LARGE, base)  # this tile skips these keys
        r = tl.load(LSE2 + m0 + rel) + rb + base
        qk = tl.dot(q, k.T, input_precision=PREC)
        pos = off + m0 + rel
        qid = pos * 0  # that of rows which see nothing does not matter: their LSE is inf
        if CHECK and DOCS & MODE:
            qid = tl.load(QUERY_IDS + tl.minimum(pos, off + S - 1))
        s = _scores(qk, pos, cols, qid, KEY_IDS, PREFIX_MASK, T, window, qk_scale, slope2, cb, CHECK, MODE)
        p = _exp(s - r[:, None], MODE)
        if DROPOUT & MODE:
            kept = tl.where(_survives(SEED, counter, m0 + rel, cols, dropout_p), 1.0 / (1.0 - dropout_p), 0.0)
        if DV:
            if DROPOUT & MODE:
                dv = tl.dot((p * kept).to(do.dtype).T, do, dv, input_precision=PREC)
            else:
                dv = tl.dot(p.to(do.dtype).T, do, dv, input_precision=PREC)
        if DK:
            dp = tl.dot(do, v.T, input_precision=PREC)
            delta = tl.load(DELTA + m0 + rel)  # after the product: before it, ptxas spills a register for it
            if DROPOUT & MODE:
                dp = dp * kept
            ds = p * (dp - delta[:, None])
            dk = tl.dot(ds.to(q.dtype).T, q, dk, input_precision=PREC)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def _flash_attention_bwd_dkdv_kernel(
    Q, K, V, DO, DK, DV, LSE2, DELTA, START, LAST, BOUNDS, KEY_IDS, QUERY_IDS, PREFIX_MASK, SLOPES, ORDER, SEED,
    scale, dropout_p, B, H, S, T, off, window, tiles, start_tiles, blocks,
    sqb, sqh, sqm, skb, skh, skn, svb, svh, svn, sdb, sdh, sdm,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, DH: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_M: tl.constexpr, SKIP_N: tl.constexpr,
    TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One block of keys of one kv head, over the rows of all its query heads. ORDER: of kv heads."""
    t, b, hk = _program(tiles, B, ORDER, MODE)
    n0 = t * BLOCK_N
    if IDS & MODE:
        KEY_IDS = _of_batch_row(KEY_IDS, b, T)
    if DOCS & MODE:
        QUERY_IDS = _of_batch_row(QUERY_IDS, b, T)
    if PREFIX & MODE:
        PREFIX_MASK = _of_batch_row(PREFIX_MASK, b, T)
    k = _rows(_head(K, b, hk, skb, skh, TMA), b, hk, n0, skn, T, DH, D, BLOCK_N, True, TMA)
    v = k
    if WANT_DK:
        v = _rows(_head(V, b, hk, svb, svh, TMA), b, hk, n0, svn, T, DH, D, BLOCK_N, True, TMA)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    qk_scale = scale * _unit(MODE)
    lo, full_lo, full_hi, end = _row_range(BOUNDS, b * tiles + t, n0, off, S, window, MODE, BLOCK_M, BLOCK_N)
    for g in range(GROUP):
        h = hk * GROUP + g
        head = b * H + h
        slope2 = _slope(SLOPES, h, MODE) * _unit(MODE)
        Qh = _head(Q, b, h, sqb, sqh, TMA)
        DOh = _head(DO, b, h, sdb, sdh, TMA)
        padded = head.to(tl.int64) * (start_tiles * TILE_M)
        STARTh = START
        hi = end
        if SKIP & MODE:
            STARTh = START + head * start_tiles
            hi = tl.minimum(hi, (tl.load(LAST + head * blocks + n0 // SKIP_N) + 1) * TILE_M)
        # Both checked parts in one loop, so that the plain one, which comes last, keeps nothing for another.
        over = hi - tl.minimum(full_lo, hi)
        if WINDOW & MODE or IDS & MODE:
            over -= hi - tl.minimum(full_hi, hi)
        dk, dv = _dkdv_loop(
            dk, dv, k, v, Qh, DOh, LSE2 + padded, DELTA + padded, STARTh, KEY_IDS, QUERY_IDS, PREFIX_MASK, SEED, b, h,
            head, sqm, sdm, lo, hi - over, full_lo, over, S, T, n0, off, window, dropout_p, qk_scale, slope2, WANT_DK,
            WANT_DV, True, MODE, DH, D, BLOCK_M, BLOCK_N, TILE_M, TMA, PREC,
        )  # fmt: skip
        dk, dv = _dkdv_loop(
            dk, dv, k, v, Qh, DOh, LSE2 + padded, DELTA + padded, STARTh, KEY_IDS, QUERY_IDS, PREFIX_MASK, SEED, b, h,
            head, sqm, sdm, full_lo, tl.minimum(full_hi, hi), 0, 0, S, T, n0, off, window, dropout_p, qk_scale, slope2,
            WANT_DK, WANT_DV, False, MODE, DH, D, BLOCK_M, BLOCK_N, TILE_M, TMA, PREC,
        )  # fmt: skip
    if WANT_DK:
        _store_rows(DK, dk * scale, b, hk, n0, H // GROUP, T, DH, D, BLOCK_N)
    if WANT_DV:
        _store_rows(DV, dv, b, hk, n0, H // GROUP, T, DH, D, BLOCK_N)

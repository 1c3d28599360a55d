"""ALiBi slopes against the published rule, and the proof that what is skipped weighs at most 2^-24 of its row."""

import math

import pytest
import torch
from limits import LARGEST, Layout, along, least
from torch import Tensor

import kernels
from kernels.alibi import _RHO, _RHO_TF32, BAND, GRAIN, Rules, block_norms, first_kept, reach

CAUSAL = Rules(True, None, 0, None, None, None)
LIMITS = ("at the limit", "a row beyond the limit")


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 20, 32, 40, 56, 64])
@pytest.mark.parametrize("bias_max", [8.0, 16.0, 6])
def test_slopes_are_those_of_mpt(heads: int, bias_max: float):
    n = 2 ** math.ceil(math.log2(heads))
    all_slopes = [1 / 2 ** (i * bias_max / n) for i in range(1, n + 1)]
    expected = all_slopes if n == heads else (all_slopes[1::2] + all_slopes[::2])[:heads]
    slopes = kernels.alibi_slopes(heads, bias_max)
    assert slopes.dtype == torch.float32
    torch.testing.assert_close(slopes, torch.tensor(expected), rtol=2e-7, atol=0)


def test_slopes_of_twelve_heads():
    slopes = kernels.alibi_slopes(12)
    assert slopes[:4].tolist() == [0.5, 0.25, 0.125, 0.0625]
    assert [round(s, 3) for s in slopes[-4:].tolist()] == [0.707, 0.354, 0.177, 0.088]


@pytest.mark.parametrize(
    ("heads", "bias_max"), [(0, 8.0), (-1, 8.0), (4, 0.0), (4, -1.0), (4, math.inf), (4, math.nan)]
)
def test_slopes_refuse_nonsense(heads: int, bias_max: float):
    with pytest.raises(ValueError, match=r"n_heads is|alibi_bias_max is"):
        kernels.alibi_slopes(heads, bias_max)


def inputs(kind: str, heads: int, s: int, d: int, chunk: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """q (H, 1, S, D) with the scale in it, k (H, S, D), slopes (H, 1): cases made to break a bound."""
    slopes = kernels.alibi_slopes(heads)[:, None] * 4  # steep, so that short rows have something to skip
    q, k = torch.randn(heads, 1, s, d) * d**-0.5, torch.randn(heads, s, d)
    if kind == "large":  # scale * |q||k| about 25
        q, k = q * 5 / d**0.25, k * 5 / d**0.25
    if kind == "one huge far key":
        k[:, s // 7] *= 60
    if kind == "huge far key along later queries":
        k[:, 2] = q[:, 0, -1] * 400
    if kind == "identical keys":
        k[:] = k[:, :1].clone()
    if kind == "zero queries":
        q.zero_()
    if kind == "huge":
        q, k = q * 30, k * 30
    if kind == "tiny":
        q, k = q * 1e-3, k * 1e-3
    if kind == "denormal":
        q, k = q * 1e-22, k * 1e18
    if kind == "squares underflow":
        q, k = q * 1e-25, k * 1e-25
    if kind == "growing keys":
        k *= torch.linspace(0.2, 6, s)[:, None]
    if kind == "shrinking keys":
        k *= torch.linspace(6, 0.2, s)[:, None]
    if kind == "spiky queries":
        q *= torch.exp(1.5 * torch.randn(heads, 1, s, 1))
    if kind == "near keys opposed, far keys aligned":
        k = -q[:, 0] * 4
        k[:, : s // 3] *= -1.5
    if kind in LIMITS:
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        where = Layout(chunk, GRAIN, BAND, rho())
        for head in range(heads):
            cut, size = along(slopes[head], s, where, torch.float32, beyond=kind != "at the limit")
            k[head, :cut, 0], q[head, 0, :, 0] = 1, size[0].float()
    return q, k, slopes


def rho() -> float:
    return _RHO if torch.get_default_device().type == "cpu" else _RHO_TF32


KINDS = [
    "random",
    "large",
    "one huge far key",
    "huge far key along later queries",
    "identical keys",
    "zero queries",
    "huge",
    "tiny",
    "denormal",
    "squares underflow",
    "growing keys",
    "shrinking keys",
    "spiky queries",
    "near keys opposed, far keys aligned",
    *LIMITS,
]


def weights(q: Tensor, k: Tensor, slopes: Tensor, see: Tensor) -> Tensor:
    """Probabilities (H, S, S) in float64."""
    s = q.shape[2]
    away = torch.arange(s)[:, None] - torch.arange(s)
    scores = q[:, 0].double() @ k.double().mT - slopes.double()[..., None] * away
    return scores.masked_fill(~see, -math.inf).softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("s", "chunk"), [(700, 128), (515, 64)])
def test_skipped_keys_weigh_at_most_two_to_the_minus_24(kind: str, s: int, chunk: int):
    q, k, slopes = inputs(kind, 4, s, 32, chunk)
    start = first_kept(q, k, slopes, CAUSAL, chunk=chunk, bits=24)
    assert start.shape == (4, 1, -(-s // chunk)) and start.dtype == torch.int32
    assert (start % GRAIN == 0).all() and (start <= torch.arange(0, s, chunk)).all() and (start >= 0).all()
    p = weights(q, k, slopes, torch.ones(s, s, dtype=torch.bool).tril())
    skipped = torch.arange(s) < start[:, 0].repeat_interleave(chunk, 1)[:, :s, None]
    lost = (p * skipped).sum(-1).amax(-1)
    assert (lost <= LARGEST).all()
    if kind == "at the limit":  # of flatter slopes, the near keys are a smaller part of the total
        assert (lost[:2] >= least(torch.float32, rho()) * LARGEST).all()


def log_sums(q: Tensor, k: Tensor, slopes: Tensor) -> Tensor:
    """(H, 1, S)"""
    away = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    scores = q.double() @ k[:, None].double().mT - slopes.double()[..., None, None] * away
    return scores.masked_fill(away < 0, -math.inf).logsumexp(-1).float()


@pytest.mark.parametrize("kind", KINDS)
def test_keys_out_of_reach_weigh_at_most_two_to_the_minus_24(kind: str):
    q, k, slopes = inputs(kind, 4, 700, 32)
    far = reach(q / 3, k, log_sums(q, k, slopes), slopes, scale=3.0, bits=24)
    assert far.shape == (4, 1)
    p = weights(q, k, slopes, torch.ones(700, 700, dtype=torch.bool).tril())
    away = torch.arange(700)[:, None] - torch.arange(700)
    assert (p * (away >= far[..., None])).sum(-1).max() <= 2.0**-24
    if kind in ("random", "zero queries", "tiny"):
        assert (far[0] < 150).all(), "the steepest head reaches no farther"


def test_reach_is_no_farther_than_need_be():
    """Equal scores, and rows of which all have seen many keys: what is out of reach weighs 2^-24 but for a key and
    1/16 bit.
    """
    q, k, slopes = inputs("zero queries", 4, 700, 32)
    late = slice(600, 700)
    far = reach(q[:, :, late], k, log_sums(q, k, slopes)[:, :, late], slopes, scale=1.0, bits=24)
    p = weights(q, k, slopes, torch.ones(700, 700, dtype=torch.bool).tril())[:, late]
    away = torch.arange(700)[late, None] - torch.arange(700)
    lost = (p * (away >= far[..., None])).sum(-1).amax(-1)[:3]  # the flattest reaches all
    assert (lost <= LARGEST).all() and (lost >= 0.9 * LARGEST * torch.exp(-slopes[:3, 0])).all()


def test_reach_is_unbounded_where_nothing_is_known():
    q, k, slopes = inputs("random", 4, 700, 32)
    lse = log_sums(q, k, slopes)
    assert reach(q, k, lse, slopes * 0, scale=1.0, bits=24).isinf().all()
    assert reach(q, k, lse, -slopes, scale=1.0, bits=24).isinf().all()
    blind = lse.masked_fill(torch.arange(700) % 2 == 0, -math.inf)
    assert reach(q, k, blind, slopes, scale=1.0, bits=24).isfinite().all()
    assert reach(q, k, lse * -math.inf, slopes, scale=1.0, bits=24).isinf().all()
    for x in (q, k):
        x[1, ..., 3, :] = math.nan
        assert ((reach(q, k, lse, slopes, scale=1.0, bits=24) > 1e6).flatten() == (torch.arange(4) == 1)).all()
        x[1] = 0.0


@pytest.mark.parametrize("kind", ["random", "large", "zero queries", "tiny"])
def test_it_does_skip(kind: str):
    q, k, slopes = inputs(kind, 4, 1024, 32)
    start = first_kept(q, k, slopes, CAUSAL, chunk=128, bits=24)
    assert (start[0, 0, 4:] > 0).all()  # the steepest head
    assert start.float().mean() > 100


def test_the_bound_is_not_far_from_what_matters():
    """Zero queries, where the bound knows everything but the near sum: at most two grains from the true cut."""
    q, k, slopes = inputs("zero queries", 4, 1024, 16)
    start = first_kept(q, k, slopes, CAUSAL, chunk=128, bits=24)[:, 0, -1]
    first_row = 1024 - 128
    p = weights(q, k, slopes, torch.ones(1024, 1024, dtype=torch.bool).tril())[:, first_row]
    matters = (p.cumsum(-1) > 2.0**-24).int().argmax(-1)
    assert (start <= matters).all() and (matters - start <= 2 * GRAIN).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("where", ["key", "query"])
def test_not_finite_keeps_everything_it_touches(value: float, where: str):
    q, k, slopes = inputs("random", 4, 700, 32)
    (k[:, 3] if where == "key" else q[:, :, 650])[..., 5] = value
    start = first_kept(q, k, slopes, CAUSAL, chunk=128, bits=24)
    assert (start[..., -1] == 0).all()
    clean = first_kept(*inputs("random", 4, 700, 32), CAUSAL, chunk=128, bits=24)
    assert (clean[0, 0, -1] > 0).all()


def test_float64_is_held_to_its_own_precision():
    q, k, slopes = (t.double() for t in inputs("random", 4, 700, 32))
    start = first_kept(q, k, slopes, CAUSAL, chunk=128, bits=53)
    skipped = torch.arange(700) < start[:, 0].repeat_interleave(128, 1)[:, :700, None]
    p = weights(q, k, slopes, torch.ones(700, 700, dtype=torch.bool).tril())
    assert (p * skipped).sum(-1).max() <= 2.0**-53
    assert start.max() > 0


def test_flat_and_negative_slopes_keep_everything():
    q, k, slopes = inputs("random", 4, 700, 32)
    assert (first_kept(q, k, slopes * 0, CAUSAL, chunk=128, bits=24) == 0).all()
    assert (first_kept(q, k, -slopes, CAUSAL, chunk=128, bits=24) == 0).all()


def test_only_visible_near_keys_count():
    """Where the near keys are masked, the far ones are all there is: nothing of them may go."""
    q, k, slopes = inputs("random", 4, 700, 32)
    mask = (torch.arange(700) < 200)[None]
    start = first_kept(q, k, slopes, CAUSAL._replace(attention_mask=mask), chunk=128, bits=24)
    assert (start[..., 3:] == 0).all()
    ids = (torch.arange(700) >= 650).long()[None]
    start = first_kept(q, k, slopes, CAUSAL._replace(sequence_id=ids), chunk=128, bits=24)
    p = weights(q, k, slopes, (ids[0][:, None] == ids[0]) & torch.ones(700, 700, dtype=torch.bool).tril())
    skipped = torch.arange(700) < start[:, 0].repeat_interleave(128, 1)[:, :700, None]
    assert (p * skipped).sum(-1).max() <= 2.0**-24


@pytest.mark.parametrize("offset", [1, 63, 300, 500])
def test_an_offset_gives_the_rows_of_the_whole(offset: int):
    q, k, slopes = inputs("random", 4, 600, 32)
    start = first_kept(q[:, :, offset:], k, slopes, CAUSAL._replace(query_offset=offset), chunk=50, bits=24)
    rows = torch.arange(600) < start[:, 0].repeat_interleave(50, 1)[:, : 600 - offset, None]
    p = weights(q, k, slopes, torch.ones(600, 600, dtype=torch.bool).tril())[:, offset:]
    assert (p * rows).sum(-1).max() <= 2.0**-24
    assert start.max() > 0


@pytest.mark.parametrize("kind", ["random", "one huge far key", "growing keys", "shrinking keys", "at the limit"])
def test_a_part_of_the_keys_and_norms_of_all_are_enough(kind: str):
    """Blocks of queries that know the keys at their own positions, and of the others only norms, in any order."""
    q, k, slopes = inputs(kind, 4, 700, 32)
    order = torch.randperm(700)
    norms = block_norms(k[:, order], order, 700)
    torch.testing.assert_close(norms[:, 2], k[:, 128:192].norm(dim=-1).amax(1))
    p = weights(q, k, slopes, torch.ones(700, 700, dtype=torch.bool).tril())
    for first, last in ((0, 90), (90, 290), (290, 700)):
        part = slice(first, last)
        given = {"chunk": last - first, "bits": 24, "position": first, "norms": norms}
        start = first_kept(q[:, :, part], k[:, part], slopes, CAUSAL, **given)
        assert start.shape == (4, 1, 1) and (start % GRAIN == 0).all() and (start <= first).all()
        assert (p[:, part] * (torch.arange(700) < start)).sum(-1).max() <= 2.0**-24
        if kind == "random" and first == 290:
            assert start.max() > 100

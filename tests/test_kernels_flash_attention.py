"""Attention on the torch path, wherever tensors lie: outputs and gradients against the float64 reference, masks in
combination, exact skipping, dropout, the boundary with autograd.
"""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import skipping
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerance import assert_close, compare, hold
from torch import Tensor

import kernels
from kernels import flash_attention_torch as plain
from kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROOT = Path(__file__).parents[1]
attend = partial(kernels.flash_attention, backend="torch")


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype = torch.float32, **kwargs) -> None:
    """Outputs and gradients within the rule."""
    compare(partial(attend, **kwargs), partial(reference.flash_attention, **kwargs), [q, k, v], dtype)


def qkv(b: int, s: int, h: int, d: int, g: int | None = None, t: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    kv = (b, t or s, g or h, d)
    return torch.randn(b, s, h, d), torch.randn(kv), torch.randn(kv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [2, 17, 255, 256, 257, 600])
def test_lengths(s: int, dtype: torch.dtype):
    both(*qkv(2, s, 4, 16), dtype, alibi_slopes=kernels.alibi_slopes(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_query_is_its_value(dtype: torch.dtype):
    """With one key the probability is 1, so that dq and dk cancel but for the rounding of fp32 sums."""
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(2, 1, 2, 16))
    out = attend(q, k, v, alibi_slopes=kernels.alibi_slopes(2))
    do = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), do)
    assert torch.equal(out, v) and torch.equal(dv, do)
    rounding = 32 * torch.finfo(torch.float32).eps * do.abs().max() * v.abs().max()
    assert dq.abs().max() <= rounding * k.abs().max() and dk.abs().max() <= rounding * q.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "g", "d"), [(4, 2, 16), (6, 1, 8), (8, 8, 64), (3, 3, 112), (2, 1, 80), (2, 2, 256)])
def test_heads(h: int, g: int, d: int, dtype: torch.dtype):
    both(*qkv(1, 140, h, d, g), dtype, alibi_slopes=kernels.alibi_slopes(h))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", [True, False])
def test_long_rows_with_steep_slopes(skip: bool, dtype: torch.dtype):
    both(*qkv(1, 600, 4, 16, 2), dtype, alibi_slopes=kernels.alibi_slopes(4) * 2, skip=skip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
def test_scale_and_large_scores(scale: float, dtype: torch.dtype):
    both(*qkv(1, 200, 2, 16), dtype, alibi_slopes=kernels.alibi_slopes(2), softmax_scale=scale)


def test_bias_stays_accurate_far_from_the_start():
    """Low precision must not eat the bias: at positions near 4000, flat scores, out is the geometric mean that ALiBi
    makes of v.
    """
    q, k, v = torch.zeros(1, 100, 2, 16), torch.zeros(1, 4100, 2, 16), torch.randn(1, 4100, 2, 16)
    slopes = torch.tensor([0.7, 0.01])
    for dtype in DTYPES:
        both(q, k, v, dtype, alibi_slopes=slopes, query_offset=4000)


def masks(b: int, t: int) -> dict[str, Tensor]:
    lengths = torch.randint(1, t + 1, (b, 1))
    at = torch.arange(t)
    return {
        "right padding": at < lengths,
        "left padding": at >= t - lengths,
        "holes": torch.rand(b, t) > 0.5,
        "nothing": torch.zeros(b, t),
        "documents": torch.randint(0, 40, (b, t)).eq(0).cumsum(1),
        "padded documents": torch.where(at < lengths, torch.randint(0, 30, (b, t)).eq(0).cumsum(1), -1),
        "ids with gaps": torch.where(torch.rand(b, t) < 0.2, -1, torch.randint(-9, 4, (b, t)).clamp(min=0).cumsum(1)),
        "prefix": at < lengths // 2,
        "any prefix": torch.rand(b, t) > 0.7,
    }


ATTENTION = [None, "right padding", "left padding", "holes", "nothing"]
IDS = [None, "documents", "padded documents", "ids with gaps"]
PREFIX = [None, "prefix", "any prefix"]


@pytest.mark.parametrize("name", [*ATTENTION[1:], *IDS[1:], *PREFIX[1:]])
def test_each_mask(name: str):
    m = masks(3, 280)[name].long()
    field = "attention_mask" if name in ATTENTION else "sequence_id" if name in IDS else "prefix_mask"
    for g in (4, 2):
        both(*qkv(3, 280, 4, 8, g), alibi_slopes=kernels.alibi_slopes(4) * 2, **{field: m})


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 3),
    s=st.integers(1, 290),
    before=st.integers(0, 200),
    extra=st.integers(0, 40),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    window=st.one_of(st.none(), st.integers(1, 300)),
    causal=st.booleans(),
    alibi=st.booleans(),
    names=st.tuples(st.sampled_from(ATTENTION), st.sampled_from(IDS), st.sampled_from(PREFIX)),
    seed=st.integers(0, 2**20),
)
def test_masks_in_combination(b, s, before, extra, heads, window, causal, alibi, names, seed):
    """Not where hardly a row sees two keys: there gradients are what rounding leaves of zero. The rule in bf16; in fp32
    that of `uncancelled`, since for rows that see a single key plain torch has no error at all.
    """
    torch.manual_seed(seed)
    t, (h, g) = before + s + extra, heads
    made = masks(b, t)
    given_masks = {
        "attention_mask": made[names[0]] if names[0] else None,
        "sequence_id": made[names[1]] if names[1] else None,
        "prefix_mask": made[names[2]].bool() if names[2] and causal else None,
    }
    if given_masks["attention_mask"] is not None:
        given_masks["attention_mask"] = given_masks["attention_mask"].bool()
    slopes = kernels.alibi_slopes(h) * 2 if alibi else None
    rules = {"window": window, "causal": causal, "query_offset": before, **given_masks}
    see = reference.visible_pairs(s, t, **rules, device=torch.get_default_device())
    assume((see.sum(-1) > 1).sum() >= 20)
    inputs = qkv(b, s, h, 8, g, t)
    both(*inputs, torch.bfloat16, alibi_slopes=slopes, **rules)
    do, found = torch.randn(b, s, h, 8), []
    ways = ((attend, torch.float32), (reference.flash_attention, torch.float32), (reference.flash_attention, None))
    for function, dtype in ways:
        leaves = [x.to(dtype or torch.float64).requires_grad_() for x in inputs]
        out = function(*leaves, alibi_slopes=slopes, **rules)
        found.append([x.double() for x in (out.detach(), *torch.autograd.grad(out, leaves, do.to(out.dtype)))])
    for got, simple, exact, terms in zip(*found, uncancelled(*inputs, do, alibi_slopes=slopes, **rules)):
        usual = (simple - exact).abs().max()
        assert (got - exact).abs().max() <= 2 * usual + 2 * torch.finfo(torch.float32).eps * terms


def uncancelled(q: Tensor, k: Tensor, v: Tensor, do: Tensor, **rules) -> list[Tensor]:
    """For out, dq, dk, dv: the largest sum of the absolute values of its terms, of which rounding leaves some eps even
    where they cancel; times 1 + max|s|, as p = exp(s - lse) has the error of s, eps * |s|.
    """
    groups, scale = (k.shape[2], q.shape[2] // k.shape[2]), q.shape[-1] ** -0.5
    p = skipping.weights(q, k, **rules)
    q, k, v, do = (x.double().abs() for x in (q, k, v, do))
    k, v = (x.repeat_interleave(groups[1], 2) for x in (k, v))
    dp = torch.einsum("bshd,bthd->bhst", do, v)
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * scale
    sums = [torch.einsum("bhst,bthd->bshd", p, v), torch.einsum("bhst,bthd->bshd", ds, k)]
    sums += [torch.einsum("bhst,bshd->bthd", *pair).unflatten(2, groups).sum(3) for pair in ((ds, q), (p, do))]
    largest = q.norm(dim=-1).max() * k.norm(dim=-1).max() * scale
    return [x.max() * (1 + largest) for x in sums]


@pytest.mark.parametrize(("s", "t", "offset"), [(1, 400, 399), (130, 400, 270), (200, 100, 0), (20, 100, 150)])
@pytest.mark.parametrize("window", [None, 30])
def test_query_offset(s: int, t: int, offset: int, window: int | None):
    both(*qkv(2, s, 4, 16, 2, t), alibi_slopes=kernels.alibi_slopes(4), query_offset=offset, window=window)


def test_an_offset_gives_the_rows_of_the_whole():
    q, k, v = qkv(1, 300, 4, 16)
    slopes = kernels.alibi_slopes(4)
    whole = attend(q, k, v, alibi_slopes=slopes)
    part = attend(q[:, 200:], k, v, alibi_slopes=slopes, query_offset=200)
    torch.testing.assert_close(part, whole[:, 200:])


def test_a_row_that_sees_nothing_gives_zero():
    q, k, v = (t.requires_grad_() for t in qkv(2, 150, 4, 8))
    mask = torch.ones(2, 150)
    mask[0, :140] = 0
    kwargs = {"alibi_slopes": kernels.alibi_slopes(4), "attention_mask": mask.bool(), "return_lse": True}
    out, lse = attend(q, k, v, **kwargs)
    assert (out[0, :140] == 0).all() and (lse[0, :, :140] == -math.inf).all()
    assert lse[0, :, 140:].isfinite().all() and lse[1].isfinite().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, :140] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_and_its_gradient(dtype: torch.dtype):
    kwargs = {"alibi_slopes": kernels.alibi_slopes(4), "return_lse": True}
    both(*qkv(2, 200, 4, 16, 2), dtype, **kwargs)
    q, k, v = (t.to(dtype).requires_grad_() for t in qkv(1, 40, 2, 8))
    _, lse = attend(q, k, v, return_lse=True)
    assert lse.dtype == torch.float32 and lse.shape == (1, 2, 40)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)
    assert dq.abs().max() > 0 and dk.abs().max() > 0 and (dv is None or (dv == 0).all())


def test_float64_is_exact_and_gradcheck_passes():
    q, k, v = (t.double().requires_grad_() for t in qkv(1, 20, 2, 4, 1))
    mask = torch.rand(1, 20) > 0.3

    def function(q, k, v):
        return attend(q, k, v, alibi_slopes=kernels.alibi_slopes(2), attention_mask=mask)

    assert torch.autograd.gradcheck(function, (q, k, v))
    q, k, v = (t.double() for t in qkv(1, 900, 4, 16))
    slopes = kernels.alibi_slopes(4) * 2
    out, kept = attend(q, k, v, alibi_slopes=slopes, return_kept=True)
    assert kept < 1
    torch.testing.assert_close(out, reference.flash_attention(q, k, v, alibi_slopes=slopes), rtol=1e-14, atol=1e-14)


def test_views_of_one_projection_and_expanded_gradients():
    """q, k, v as strided views of (B, S, 3d), a gradient with zero strides."""
    slopes = kernels.alibi_slopes(4)

    def projected(function, x):
        q, k, v = (t.view(2, 140, 4, 8) for t in x.split(32, -1))
        return function(q, k, v, alibi_slopes=slopes)

    def draw(shape):
        wqkv, gradient = torch.randn(2, 140, 3 * 32, requires_grad=True), torch.randn(shape).expand(2, 140, 4, 8)
        pairs = ((attend, wqkv), (reference.flash_attention, wqkv), (reference.flash_attention, wqkv.double()))
        grads = (torch.autograd.grad(projected(f, x), wqkv, gradient.to(x.dtype))[0] for f, x in pairs)
        return [("dWqkv", *grads)]

    for shape in ((), (8,)):
        hold(partial(draw, shape))


# ---- skipping --------------------------------------------------------------------------------------------------------


def kept(q: Tensor, k: Tensor, v: Tensor, **kwargs) -> float:
    return float(attend(q, k, v, return_kept=True, **kwargs)[1])


def test_it_skips_and_says_so():
    q, k, v = qkv(1, 2048, 8, 64)
    slopes = kernels.alibi_slopes(8)
    assert 0.3 < kept(q, k, v, alibi_slopes=slopes) < 0.75
    assert kept(q, k, v, alibi_slopes=slopes, skip=False) == 1
    assert kept(q, k, v) == 1
    assert kept(q, k, v, window=128) < 0.35
    documents = torch.arange(2048)[None] // 256
    assert kept(q, k, v, sequence_id=documents) < 0.25


def test_skipping_changes_out_by_at_most_two_to_the_minus_23_of_v():
    q, k, v = (t.double() for t in qkv(1, 1500, 4, 16))
    v[:, 0] *= 1e8  # were the first key read where it weighs nothing, it would show
    slopes = kernels.alibi_slopes(4)
    low = [t.float() for t in (q, k, v)]
    with_skip, without = (attend(*low, alibi_slopes=slopes, skip=s) for s in (True, False))
    exact = reference.flash_attention(*(t.double() for t in low), alibi_slopes=slopes)
    plain = (without.double() - exact).abs().max()
    assert (with_skip.double() - exact).abs().max() <= plain + 2.0**-23 * v.abs().max()


@pytest.mark.parametrize(("kind", "dtype", "groups"), skipping.CASES)
def test_what_is_skipped_does_not_matter(kind: str, dtype: torch.dtype, groups: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernels.flash_attention_torch._BF16_LENGTH", 0)  # short texts, too
    slopes = torch.tensor([1.0, 0.25])
    inputs = skipping.adversary(kind, 16, slopes, groups, triton=False, dtype=dtype)
    asked = {"skips": kind in skipping.SKIPPED, "tight": kind == "at the limit"}
    skipping.hold(attend, inputs, slopes, triton=False, **asked)


def test_each_kv_head_of_each_row_has_norms_of_its_own():
    slopes = torch.tensor([1.0, 0.5, 0.5, 0.25])
    skipping.hold_dropped(*skipping.uneven(16, slopes, triton=False), slopes, triton=False, skips=True)


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_skipped_of_a_trained_model_does_not_matter(layer: int):
    layers, slopes = skipping.trained()
    skipping.hold(attend, layers[layer], slopes, triton=False, skips=True)
    assert kept(*layers[layer], alibi_slopes=slopes) < 0.9


@pytest.mark.cpu("in steps, heads are joined where that reads little in vain, and what it reads counts")
def test_the_backward_takes_the_forwards_pairs():
    """Keys that were skipped for every query get exactly zero gradient; those kept do not."""
    q, k, v = (t.requires_grad_() for t in qkv(1, 1024, 4, 16))
    out, _, starts, _ = torch.ops.mpt.flash_attention(
        q[:, 512:], k, v, kernels.alibi_slopes(4) * 2, None, None, None, None, True, 0.25, None, 512, 0.0, True, None
    )
    dk, dv = torch.autograd.grad(out.sum(), (k, v))
    first = starts.view(4, -1).amin(-1)
    assert (first > 64).any()
    for head in range(4):
        assert (dk[:, : first[head], head] == 0).all() and (dv[:, : first[head], head] == 0).all()
        assert (dv[:, first[head] + 128 :, head] != 0).any()


@pytest.mark.cpu("elsewhere the backward works in steps")
def test_keys_out_of_reach_are_left_out_in_the_backward():
    """Else their probabilities would be subnormal numbers, which slow a processor down many times."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 600, 1, 16))
    out = attend(q, k, v, alibi_slopes=torch.tensor([0.7]))
    do = torch.zeros_like(out)
    do[:, 400] = torch.randn(16)
    dk, dv = torch.autograd.grad(out, (k, v), do)
    near = (dv != 0).any(-1).flatten().nonzero().flatten()
    assert near[-1] == 400 and 400 - 120 < near[0] < 400 - 20
    assert (dv[0, near].abs().amax(-1) > 1e-35).all() and (dk[:, : near[0]] == 0).all()


@pytest.mark.cpu("elsewhere the backward works in steps")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "g", "b", "t"), [(1, 1, 1, 2048), (3, 3, 1, 1024), (3, 1, 1, 1024), (2, 2, 2, 600)])
def test_few_heads_are_shared_out_by_keys(h: int, g: int, b: int, t: int, dtype: torch.dtype):
    assert plain._parts(h, t) > 1 or t == 600
    both(*qkv(b, 300, h, 16, g, t), dtype, alibi_slopes=kernels.alibi_slopes(h) / 8, query_offset=t - 300)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_scores_are_neither_hidden_nor_spread(dtype: torch.dtype):
    """Those of one document stay there; inf gives NaN to the rows that see it."""
    q, k, v = (x.to(dtype) for x in qkv(1, 64, 1, 16))
    documents = (torch.arange(64) // 32)[None]
    for value in (math.nan, math.inf):
        k[0, 3, 0, 2] = value
        out = attend(q, k, v, sequence_id=documents)
        expected = reference.flash_attention(*(t.double() for t in (q, k, v)), sequence_id=documents)
        assert torch.equal(out.isnan().any(-1), expected.isnan().any(-1)) and out[0, 32:].isfinite().all()
    q *= 60 if dtype == torch.float16 else 1e19
    k = torch.full_like(k, 60.0 if dtype == torch.float16 else 1e20)
    out = attend(q.abs(), k, v, softmax_scale=1.0)
    expected = reference.flash_attention(*(t.float() for t in (q.abs(), k, v)), softmax_scale=1.0)
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.cpu("it reads what a process has held")
def test_masks_are_never_held_whole():
    """(B, S, T) alone would be a GiB."""
    code = """
import torch, kernels

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

q = torch.randn(1, 32768, 1, 8, requires_grad=True)
before = peak()
kernels.flash_attention(q, q, q, sequence_id=(torch.arange(32768) // 100)[None]).sum().backward()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout) < 300 * 1024


def test_not_finite_keys_are_not_hidden_by_skipping():
    q, k, v = qkv(1, 600, 4, 16)
    k[:, 3, :, 0] = math.nan
    out = attend(q, k, v, alibi_slopes=kernels.alibi_slopes(4) * 2)
    assert out.isnan()[reference.flash_attention(q, k, v).isnan()].all()


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [4, 2])
def test_dropout(g: int):
    """The dropped probabilities, read off with v = I, decide output and gradients as if they were a given mask."""
    t, p = 160, 0.3
    q, k, _ = qkv(2, t, 4, t, g)
    kwargs = {"alibi_slopes": kernels.alibi_slopes(4), "dropout_p": p, "seed": 11}
    eye = torch.eye(t)[None, :, None].expand(2, t, g, t)
    dropped = attend(q, k, eye, **kwargs).transpose(1, 2)  # (B, H, S, T)
    plain = attend(q, k, eye, alibi_slopes=kernels.alibi_slopes(4)).transpose(1, 2)
    factor = torch.where(plain > 0, dropped / plain, 0.0)
    kept = factor.round(decimals=3).unique().tolist()
    assert kept == pytest.approx([0, round(1 / (1 - p), 3)])
    assert (factor[plain > 0] == 0).float().mean().item() == pytest.approx(p, abs=0.02)
    factor = (factor > 0) / (1 - p)

    def given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(t)
        scores = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(4 // g, 2)) * t**-0.5
        scores = scores - kernels.alibi_slopes(4)[:, None, None].to(q.dtype) * (i[:, None] - i)
        w = scores.masked_fill(i > i[:, None], -math.inf).softmax(-1) * factor.to(q.dtype)
        return torch.einsum("bhst,bthd->bshd", w, v.repeat_interleave(4 // g, 2))

    compare(partial(attend, **kwargs), given, [q, k, torch.randn(2, t, g, t)], torch.float32)


def test_dropout_seeds():
    q, k, v = qkv(1, 40, 2, 8)
    same = [attend(q, k, v, dropout_p=0.5, seed=s) for s in (1, 1, torch.tensor(1), 2)]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2]) and not torch.equal(same[0], same[3])
    torch.manual_seed(5)
    a, b = (attend(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(a, attend(q, k, v, dropout_p=0.5)) and not torch.equal(a, b)


# ---- the boundary ----------------------------------------------------------------------------------------------------

CASES = [
    {"alibi_slopes": True},
    {"attention_mask": True, "sequence_id": True, "prefix_mask": True, "window": 20},
    {"dropout_p": 0.1, "seed": 3},
]


@pytest.mark.parametrize(("case", "dtype"), zip(CASES, (torch.bfloat16, torch.float32, torch.bfloat16)))
def test_opcheck(case: dict, dtype: torch.dtype):
    q, k, v = (t.to(dtype).requires_grad_() for t in qkv(2, 140, 4, 8, 2))
    m = masks(2, 140)
    tensors = {
        "alibi_slopes": kernels.alibi_slopes(4),
        "attention_mask": m["holes"],
        "sequence_id": m["documents"],
        "prefix_mask": m["prefix"],
    }
    given = [tensors[n] if case.get(n) else None for n in tensors]
    seed = torch.tensor(3) if "seed" in case else None
    settings = (True, 0.3, case.get("window"), 0, case.get("dropout_p", 0.0))
    torch.library.opcheck(torch.ops.mpt.flash_attention, (q, k, v, *given, seed, *settings, True, None))
    with torch.no_grad():
        starts = torch.ops.mpt.flash_attention(q, k, v, *given, seed, *settings, True, None)[2]
        for dlse in (None, torch.randn(2, 4, 140)):
            saved = (q.detach(), k.detach(), v.detach(), None, None, starts)
            args = (torch.randn_like(q), dlse, *saved, *given, seed, *settings, None)
            torch.library.opcheck(torch.ops.mpt.flash_attention_backward, args)


def test_second_derivative_is_refused_by_name():
    q, k, v = (t.requires_grad_() for t in qkv(1, 10, 2, 8))
    (dq,) = torch.autograd.grad(attend(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"mpt::flash_attention has no second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str):
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in qkv(1, 200, 4, 16))
    slopes = kernels.alibi_slopes(4)

    def step(q, k, v):
        return attend(q * 2, k, v, alibi_slopes=slopes).sum() * 3

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, step))):
        torch.testing.assert_close(a, b)


def test_compile_under_autocast_with_dropout():
    """The seed is drawn while the compiled graph runs: each call drops others, and its backward the same ones."""
    torch._dynamo.reset()
    q, k, _ = qkv(1, 64, 2, 64)
    v = torch.eye(64)[None, :, None].expand(1, 64, 2, 64).clone().requires_grad_()
    kind = q.device.type

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def lowered(q, k, v):
        with torch.autocast(kind, torch.bfloat16):
            return attend(q, k, v, dropout_p=0.5)

    first, second = lowered(q, k, v), lowered(q, k, v)
    assert first.dtype == torch.bfloat16 and not torch.equal(first, second)
    (dv,) = torch.autograd.grad(first.sum(), v)
    torch.testing.assert_close(dv[..., 0].float(), first.float().sum(1).mT, rtol=0.02, atol=0.02)


def test_activation_checkpointing_repeats_the_dropout():
    q, k, v = (t.requires_grad_() for t in qkv(1, 200, 4, 16))

    def step(q, k, v):
        return attend(q, k, v, alibi_slopes=kernels.alibi_slopes(4), dropout_p=0.2).square().sum()

    grads = []
    for checkpoint in (True, False):
        torch.manual_seed(9)
        out = torch.utils.checkpoint.checkpoint(step, q, k, v, use_reentrant=False) if checkpoint else step(q, k, v)
        grads.append(torch.autograd.grad(out, (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_autocast():
    q, k, v = (t.requires_grad_() for t in qkv(1, 150, 4, 16))
    slopes = kernels.alibi_slopes(4)
    with torch.autocast(q.device.type, torch.bfloat16):
        out, lse = attend(q, k, v, alibi_slopes=slopes, return_lse=True)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    low = [t.bfloat16() for t in (q, k, v)]
    expected, expected_lse = attend(*low, alibi_slopes=slopes, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    with torch.autocast(q.device.type, torch.bfloat16):
        assert attend(*(t.double() for t in (q, k, v))).dtype == torch.float64
        again = attend(q, k, v, alibi_slopes=slopes, backend="reference")
    assert again.dtype == torch.bfloat16
    assert_close("reference", out, again, reference.flash_attention(*(t.double() for t in low), alibi_slopes=slopes))


def test_bad_arguments():
    q, k, v = qkv(2, 10, 4, 8, 2)
    with pytest.raises(ValueError, match=r"H must be a multiple of G"):
        attend(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match=r"q \(2, 10, 4, 8\), k \(2, 9, 2, 8\)"):
        attend(q, k[:, :9], v)
    for empty in ([q, k[:, :0], v[:, :0]], [q[:, :, :0], k, v], [x[..., :0] for x in (q, k, v)]):
        with pytest.raises(ValueError, match=r"only B and S may be 0"):
            attend(*empty)
    good = torch.ones(4)
    for slopes, error, message in (
        (good[:3], ValueError, r"alibi_slopes is \(3,\)"),
        (good.int(), TypeError, r"alibi_slopes is torch.int32; use float32"),
        (good.to("meta"), TypeError, r"alibi_slopes is on meta and q on"),
        (good.clone().requires_grad_(), ValueError, r"pass alibi_slopes.detach\(\)"),
    ):
        with pytest.raises(error, match=message):
            attend(q, k, v, alibi_slopes=slopes)
    with pytest.raises(TypeError, match=r"window is 2.5; pass an integer"):
        attend(q, k, v, window=2.5)
    for seed in (torch.tensor(1.0), torch.tensor([1, 2])):
        with pytest.raises(TypeError, match=r"seed is .*; pass an int, or an int64 tensor of one number"):
            attend(q, k, v, dropout_p=0.1, seed=seed)
    with pytest.raises(ValueError, match=r"softmax_scale is 1e\+300"):
        attend(q, k, v, softmax_scale=1e300)
    with pytest.raises(ValueError, match=r"window is 0"):
        attend(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"query_offset is -1"):
        attend(q, k, v, query_offset=-1)
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"dropout_p is"):
            attend(q, k, v, dropout_p=p)
    for name in ("attention_mask", "sequence_id", "prefix_mask"):
        with pytest.raises(ValueError, match=rf"{name} is \(2, 9\)"):
            attend(q, k, v, **{name: torch.ones(2, 9, dtype=torch.long)})
        with pytest.raises(TypeError, match=rf"{name} is torch.float32"):
            attend(q, k, v, **{name: torch.ones(2, 10)})
    with pytest.raises(ValueError, match=r"causal=False"):
        attend(q, k, v, causal=False, prefix_mask=torch.ones(2, 10).bool())
    with pytest.raises(ValueError, match=r"sequence_id covers 10 keys"):
        attend(q, k, v, query_offset=1, sequence_id=torch.ones(2, 10).long())
    with pytest.raises(TypeError, match=r"mixed dtypes \(q torch.float32, k torch.bfloat16"):
        attend(q, k.bfloat16(), v)
    with pytest.raises(TypeError, match=r"q is torch.int64"):
        attend(q.long(), k.long(), v.long())
    with pytest.raises(TypeError, match=r"q is list"):
        attend([1], k, v)


@pytest.mark.cpu("nothing waits for slopes on a GPU")
@pytest.mark.parametrize("value", [-0.5, math.nan])
def test_slopes_of_no_value(value: float):
    q, k, v = qkv(2, 10, 4, 8, 2)
    slopes = torch.tensor([1.0, 0.5, value, 0.1])
    with pytest.raises(ValueError, match=rf"alibi_slopes\[2\] is {value}; they must be finite and at"):
        attend(q, k, v, alibi_slopes=slopes)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_sequence_ids_that_decrease(backend: str, dtype: torch.dtype):
    q, k, v = qkv(2, 10, 4, 16, 2)
    if backend == "triton" and q.is_cuda:
        pytest.skip("the Triton path does not wait for ids on a GPU")
    attend = partial(kernels.flash_attention, q, k, v, backend=backend)
    ids = torch.tensor([[0, 0, 0, 4, 4, 9, 9, 9, 9, 9], [0, -1, 1, 1, -1, 5, -1, -1, 5, 4]], dtype=dtype)
    with pytest.raises(
        ValueError, match=r"sequence_id\[1, 9\] is 4 and comes after 5; the ids of a row must not decrease"
    ):
        attend(sequence_id=ids)
    with pytest.raises(ValueError, match=r"sequence_id\[1, 9\] is 4"):
        attend(sequence_id=ids, attention_mask=torch.ones(2, 10, dtype=torch.long))
    hidden = torch.ones(2, 10).bool()
    hidden[1, 9] = False
    assert attend(sequence_id=ids, attention_mask=hidden).isfinite().all()
    ids[1, 9] = 5
    assert attend(sequence_id=ids).isfinite().all()


def test_sequence_ids_that_decrease_in_a_compiled_graph():
    torch._dynamo.reset()
    q, k, v = qkv(1, 10, 2, 8)
    compiled = torch.compile(kernels.flash_attention, backend="eager", fullgraph=True)
    compiled(q, k, v, sequence_id=torch.arange(10)[None], backend="torch")
    with pytest.raises(ValueError, match=r"sequence_id\[0, 1\] is 8"):
        compiled(q, k, v, sequence_id=torch.arange(9, -1, -1)[None], backend="torch")

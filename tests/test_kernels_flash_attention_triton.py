"""Attention by the Triton kernels: outputs and gradients against the float64 reference, masks in combination, exact
skipping on adversarial inputs, dropout, the boundary with autograd.

In the interpreter a tile is 32 x 32 and a skip block 32 keys; keys are looked for that can be skipped from 129 keys up.
"""

import importlib
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import skipping
import torch
from device import size
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import compare, hold
from torch import Tensor

import kernels
from kernels import backend, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODULE = importlib.import_module("kernels.flash_attention")  # kernels has a function of that name
attend = partial(kernels.flash_attention, backend="triton")


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype = torch.float32, **kwargs) -> None:
    """Outputs, lse and gradients within the rule."""
    kwargs["return_lse"] = True
    compare(partial(attend, **kwargs), partial(reference.flash_attention, **kwargs), [q, k, v], dtype)


def qkv(b: int, s: int, h: int, d: int, g: int | None = None, t: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    kv = (b, t or s, g or h, d)
    return torch.randn(b, s, h, d), torch.randn(kv), torch.randn(kv)


@pytest.mark.parametrize(
    ("s", "dtype"), [(17, torch.bfloat16), (64, torch.float16), (127, torch.float32), (129, torch.bfloat16)]
)
def test_lengths(s: int, dtype: torch.dtype):
    both(*qkv(2, s, 2, 32, 1), dtype, alibi_slopes=kernels.alibi_slopes(2))


def test_a_single_query_is_its_value():
    """With one key the probability is 1, so that dq and dk cancel but for the rounding of fp32 sums."""
    q, k, v = (x.requires_grad_() for x in qkv(2, 1, 2, 16))
    out = attend(q, k, v, alibi_slopes=kernels.alibi_slopes(2))
    do = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), do)
    assert torch.equal(out, v)
    torch.testing.assert_close(
        dv, do
    )  # compiled, the backward's product q.k may be rounded otherwise than the forward's
    rounding = 32 * torch.finfo(torch.float32).eps * do.abs().max() * v.abs().max()
    assert dq.abs().max() <= rounding * k.abs().max() and dk.abs().max() <= rounding * q.abs().max()


@pytest.mark.parametrize(
    ("h", "g", "d", "dtype"),
    [
        (4, 2, 16, torch.float32),
        (2, 1, 80, torch.bfloat16),
        (1, 1, 96, torch.float16),
        (1, 1, 112, torch.bfloat16),
        (1, 1, 256, torch.bfloat16),
        (3, 3, 8, torch.float32),
    ],
)
def test_heads(h: int, g: int, d: int, dtype: torch.dtype):
    both(*qkv(1, 70, h, d, g), dtype, alibi_slopes=kernels.alibi_slopes(h))


@pytest.mark.parametrize(
    ("scale", "dtype"), [(0.05, torch.float32), (1.0, torch.float32), (4.0, torch.bfloat16), (4.0, torch.float16)]
)
def test_scale_and_large_scores(scale: float, dtype: torch.dtype):
    both(*qkv(1, 65, 2, 16), dtype, alibi_slopes=kernels.alibi_slopes(2), softmax_scale=scale)


def test_without_bias_and_without_causality():
    both(*qkv(1, 70, 2, 16))
    both(*qkv(1, 70, 2, 16, 1, 45), causal=False)
    both(*qkv(1, 70, 2, 16, 1, 45), causal=False, alibi_slopes=kernels.alibi_slopes(2))


def test_bias_stays_accurate_far_from_the_start():
    q, k, v = torch.zeros(1, 33, 2, 16), torch.zeros(1, 700, 2, 16), torch.randn(1, 700, 2, 16)
    for dtype in (torch.float32, torch.bfloat16):
        both(q, k, v, dtype, alibi_slopes=torch.tensor([0.7, 0.01]), query_offset=660)


# ---- masks -----------------------------------------------------------------------------------------------------------


def masks(b: int, t: int) -> dict[str, Tensor]:
    lengths = torch.randint(1, t + 1, (b, 1))
    at = torch.arange(t)
    return {
        "right padding": at < lengths,
        "left padding": at >= t - lengths,
        "holes": torch.rand(b, t) > 0.5,
        "nothing": torch.zeros(b, t).bool(),
        "documents": torch.randint(0, 20, (b, t)).eq(0).cumsum(1),
        "padded documents": torch.where(at < lengths, torch.randint(0, 20, (b, t)).eq(0).cumsum(1), -1),
        "ids with gaps": torch.where(torch.rand(b, t) < 0.2, -1, torch.randint(0, 20, (b, t)).eq(0).cumsum(1) * 2**33),
        "prefix": at < lengths // 2,
        "any prefix": torch.rand(b, t) > 0.7,
    }


ATTENTION = [None, "right padding", "left padding", "holes", "nothing"]
IDS = [None, "documents", "padded documents", "ids with gaps"]
PREFIX = [None, "prefix", "any prefix"]


def field(name: str) -> str:
    return "attention_mask" if name in ATTENTION else "sequence_id" if name in IDS else "prefix_mask"


@pytest.mark.parametrize("name", [*ATTENTION[1:], *IDS[1:], *PREFIX[1:]])
def test_each_mask(name: str):
    """Skipping is on. In bf16 below."""
    both(*qkv(2, 140, 1, 16), alibi_slopes=torch.tensor([0.5]), **{field(name): masks(2, 140)[name]})


@settings(max_examples=15, deadline=None)
@given(
    s=st.integers(1, 70),
    before=st.integers(0, 70),
    extra=st.integers(0, 20),
    heads=st.sampled_from([(1, 1), (2, 1)]),
    window=st.one_of(st.none(), st.integers(1, 80)),
    causal=st.booleans(),
    slope=st.sampled_from([None, 0.1, 1.0]),
    names=st.tuples(st.sampled_from(ATTENTION), st.sampled_from(IDS), st.sampled_from(PREFIX)),
    seed=st.integers(0, 2**20),
)
def test_masks_in_combination(s, before, extra, heads, window, causal, slope, names, seed):
    """In bf16: where rows see a single key, gradients in fp32 are nothing but what rounding leaves of zero."""
    torch.manual_seed(seed)
    t, (h, g) = before + s + extra, heads
    made = {field(name): masks(2, t)[name] for name in names if name}
    if not causal:
        made.pop("prefix_mask", None)
    slopes = None if slope is None else torch.full((h,), slope)
    made |= {"alibi_slopes": slopes, "window": window, "causal": causal, "query_offset": before}
    both(*qkv(2, s, h, 16, g, t), torch.bfloat16, **made)


@pytest.mark.parametrize(("s", "t", "offset"), [(1, 200, 199), (40, 160, 120), (90, 40, 0), (20, 50, 70)])
@pytest.mark.parametrize(("window", "dtype"), [(None, torch.bfloat16), (30, torch.float32)])
def test_query_offset(s: int, t: int, offset: int, window: int | None, dtype: torch.dtype):
    rules = {"query_offset": offset, "window": window}
    both(*qkv(1, s, 2, 16, 1, t), dtype, alibi_slopes=kernels.alibi_slopes(2), **rules)


def test_a_row_that_sees_nothing_gives_zero():
    q, k, v = (x.requires_grad_() for x in qkv(2, 70, 2, 16))
    mask = torch.ones(2, 70).bool()
    mask[0, :60] = False
    out, lse = attend(q, k, v, alibi_slopes=kernels.alibi_slopes(2), attention_mask=mask, return_lse=True)
    assert (out[0, :60] == 0).all() and (lse[0, :, :60] == -math.inf).all()
    assert lse[0, :, 60:].isfinite().all() and lse[1].isfinite().all()
    grads = torch.autograd.grad([out, lse], (q, k, v), [torch.randn_like(out), torch.full_like(lse, math.inf)])
    assert (grads[0][0, :60] == 0).all() and (grads[2][0, :60] == 0).all()


def ids_of_any_size(dtype: torch.dtype) -> Tensor:
    """(2, 70), in any order: some agree in their low 32 bits, some are padding."""
    largest = torch.iinfo(dtype).max
    values = torch.tensor([7, largest, -1, largest - 1, 0, -largest, 7 + largest // 2 + 1], dtype=dtype)
    if dtype == torch.int64:
        values = torch.cat([values, torch.tensor([7 + 2**32, 7 + 2**40, 2**31 + 7, 2**31])])
    return values[torch.randint(len(values), (2, 70))]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_ids_of_any_size_are_told_apart(dtype: torch.dtype):
    ids = ids_of_any_size(dtype).sort(1).values
    ids = ids.where(torch.rand(2, 70) > 0.1, -1)
    both(*qkv(2, 70, 2, 16), torch.bfloat16, alibi_slopes=kernels.alibi_slopes(2), sequence_id=ids)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_ids_in_any_order_where_nobody_looks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """On a GPU ids are not looked at beforehand, and equal ones see each other wherever they stand."""
    monkeypatch.setattr(MODULE, "_check_order", lambda *ids: None)
    ids = ids_of_any_size(dtype)
    both(*qkv(2, 70, 2, 16), torch.bfloat16, alibi_slopes=kernels.alibi_slopes(2), sequence_id=ids)


@pytest.mark.cpu("there the others run with them")
@pytest.mark.parametrize("tiles", [MODULE._FP32, MODULE._FP32_SM_90[64]])
def test_the_tiles_of_fp32_on_a_gpu(tiles: Any, monkeypatch: pytest.MonkeyPatch, slopes: Tensor):
    """In the interpreter; with the tiles in use on a GPU. They skip."""
    monkeypatch.setattr(MODULE, "_INTERPRETER", tiles)
    q, k, v = qkv(1, 4 * layout(16, torch.float32).block + 22, 2, 16, 1)
    assert (starts(q, k, v, slopes) > 0).any()
    both(q, k, v, alibi_slopes=slopes)


@pytest.mark.gpu
@pytest.mark.parametrize("told", ["none", "tf32"])
def test_skipping_with_fp32_as_torch_was_told(told: str, multiply_fp32: Callable[[str], None], slopes: Tensor):
    """Where nobody said how, in parts of bf16 on sm_90; the bound allows for what tf32 rounds away."""
    multiply_fp32(told)
    for groups, d in ((2, 64), (1, 128)):
        for kind in ("norm 25", "far keys a little larger", *skipping.LIMITS):
            skipping.hold(attend, adversary(kind, d, slopes, groups), slopes, triton=True, skips=kind == "at the limit")


# ---- strides and descriptors -----------------------------------------------------------------------------------------


def test_rows_too_far_apart_for_32_bits_are_copied():
    near, far = torch.randn(1, 2, 1, 16), torch.empty_strided((1, 2, 1, 16), (1, 2**24, 16, 1), dtype=torch.bfloat16)
    far.copy_(near)
    _, (same, copied) = MODULE._readable(near, far)
    assert same is near and copied.stride(1) == 16
    assert torch.equal(copied, far)


@pytest.fixture
def by_tma(monkeypatch: pytest.MonkeyPatch):
    """Says whether tiles are read by TMA or by pointers, wherever there is TMA."""
    name = backend.architecture(torch.empty(0).device)
    if name not in {"interpreter", *MODULE._TMA}:
        pytest.skip(f"{name} has no TMA")
    return lambda on: monkeypatch.setattr(MODULE, "_TMA", {name} if on else set())


@pytest.mark.parametrize("descriptors", [False, True])
def test_views_of_one_projection_and_expanded_gradients(descriptors: bool, by_tma):
    """q, k, v as strided views of (B, S, 3d), gradients with zero strides; read by pointers and by TMA."""
    by_tma(descriptors)

    def projected(function, x):
        q, k, v = (t.view(2, 70, 2, 16) for t in x.split(32, -1))
        return function(q, k, v, alibi_slopes=kernels.alibi_slopes(2))

    def draw(shape):
        wqkv, gradient = torch.randn(2, 70, 3 * 32, requires_grad=True), torch.randn(shape).expand(2, 70, 2, 16)
        pairs = ((attend, wqkv), (reference.flash_attention, wqkv), (reference.flash_attention, wqkv.double()))
        grads = (torch.autograd.grad(projected(f, x), wqkv, gradient.to(x.dtype))[0] for f, x in pairs)
        return [("dWqkv", *grads)]

    for shape in ((), (16,)):
        hold(partial(draw, shape))


@pytest.mark.cpu("compiled twice, a kernel's sums may be fused in two ways")
def test_descriptors_and_pointers_agree(by_tma):
    """Also where TMA pads the head dimension, with one row, and with tensors that must be copied first."""
    for s, t, d in ((150, 150, 24), (1, 40, 16), (33, 33, 20)):
        q, k, v = (x.bfloat16() for x in qkv(1, s, 2, d, 1, t))
        q = q.transpose(-1, -2).contiguous().transpose(-1, -2)
        k = torch.cat([k, k[..., :1]], -1)[..., :-1]
        results = []
        for on in (False, True):
            by_tma(on)
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = attend(*leaves, alibi_slopes=torch.tensor([0.5, 0.1]), query_offset=t - s)
            results.append([out, *torch.autograd.grad(out.float().sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results))


# ---- skipping --------------------------------------------------------------------------------------------------------

starts = partial(skipping.starts, triton=True)
layout = partial(skipping.layout, triton=True)
adversary = partial(skipping.adversary, triton=True)
UNEQUAL = [((64, 64), (32, 32), (32, 32)), ((64, 32), (64, 32), (64, 64))]  # (m, n) of forward, dQ, dK and dV


@pytest.fixture
def slopes() -> Tensor:
    return torch.tensor([1.0, 0.25])


def use_tiles(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if shapes is not None:
        tiles = MODULE._Tiles(*(MODULE._Tile(m, n, 4, 1) for m, n in shapes))
        monkeypatch.setattr(MODULE, "_tiles", lambda *which: tiles)


@pytest.mark.parametrize(("kind", "dtype", "groups"), skipping.CASES)
def test_what_is_skipped_does_not_matter(kind: str, dtype: torch.dtype, groups: int, slopes: Tensor):
    """In 16 bits, where nothing can be skipped, errors would differ by the order of the blocks alone."""
    inputs = adversary(kind, 16, slopes, groups, dtype=dtype)
    skips, tight = kind in skipping.SKIPPED, kind == "at the limit"
    if (dtype == torch.bfloat16 and not skips) or dtype == torch.float16:
        skipping.hold_dropped(*inputs, slopes, triton=True, skips=skips, tight=tight)
    else:
        skipping.hold(attend, inputs, slopes, triton=True, skips=skips, tight=tight)


def test_each_kv_head_of_each_row_has_norms_of_its_own():
    slopes = torch.tensor([1.0, 0.5, 0.5, 0.25])
    skipping.hold_dropped(*skipping.uneven(16, slopes, triton=True), slopes, triton=True, skips=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", skipping.LIMITS)
@pytest.mark.parametrize("shapes", UNEQUAL)
def test_the_limit_for_unequal_tiles(
    shapes: Any, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, slopes: Tensor
):
    use_tiles(shapes, monkeypatch)
    tight = kind == "at the limit"
    skipping.hold_dropped(*adversary(kind, 16, slopes, 1, dtype=dtype), slopes, triton=True, skips=tight, tight=tight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_skipped_of_a_trained_model_does_not_matter(dtype: torch.dtype):
    layers, slopes = skipping.trained()
    s = layout(16, dtype).length
    q, k, v = (x[:, :s, :2].to(dtype) for x in layers[-1])
    skipping.hold(attend, (q, k, v), slopes[:2], triton=True, skips=True)
    assert attend(q, k, v, alibi_slopes=slopes[:2], return_kept=True)[1] < 0.95


def marked(s: int, t: int, groups: int, tile: int, block: int) -> list[Tensor]:
    """q, k, v, do whose products of interest have a dimension for each tile of queries and block of keys: q and do are
    1 at 16 * (1 + head) + tile, k and v at 48 + block, beside random directions in the first 15 dimensions. The first
    row of head 0's second tile is long, where keys are 0: that tile keeps a block that the first one skips.
    """
    q, do, k, v = (torch.zeros(1, n, heads, 64) for n, heads in ((s, 2), (s, 2), (t, groups), (t, groups)))
    for x in (q, do, k, v):
        x[..., :15] = 2 * torch.nn.functional.normalize(torch.randn_like(x[..., :15]), dim=-1)
    q[0, tile, 0, 15] = (12 * tile / block + 15) * 8 / 5**0.5  # that bound in nats over the scale and |k|
    for x in (q, do):
        for head in range(2):
            x[0, torch.arange(s), head, 16 * (1 + head) + torch.arange(s) // tile] = 1
    for x in (k, v):
        x[0, torch.arange(t), :, 48 + torch.arange(t) // block] = 1
    return [q, k, v, do]


@pytest.mark.parametrize(
    ("shapes", "groups", "dtype"),
    [
        (None, 2, torch.float32),
        (None, 1, torch.bfloat16),
        (UNEQUAL[0], 2, torch.bfloat16),
        (UNEQUAL[0], 1, torch.float32),
        (UNEQUAL[1], 2, torch.float32),
        (UNEQUAL[1], 1, torch.bfloat16),
    ],
)
def test_each_kernel_does_the_pairs_that_the_forward_found(
    shapes: Any, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Which tile of queries met which block of keys is read off out, dq, dk and dv. What nobody needs is not even read:
    it may be NaN.
    """
    use_tiles(shapes, monkeypatch)
    tile, block, *_ = layout(64, dtype)
    s, offset = 3 * max(tile, block), 4 * block
    t, tiles, blocks = offset + s, -(-s // tile), -(-(offset + s) // block)
    assert tiles <= 16 and blocks <= 16
    q, k, v, do = (x.to(dtype) for x in marked(s, t, groups, tile, block))
    slopes = torch.tensor([12.0, 11.0]) / block
    rest = (slopes, None, None, None, None, True, 64**-0.5, None, offset, 0.0)
    products = MODULE._products(q)
    out, lse, first, _ = torch.ops.mpt.flash_attention(q, k, v, *rest, True, products)

    def gradients(do: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.mpt.flash_attention_backward(do, None, q, k, v, out, lse, first, *rest, products)

    dq, dk, dv = gradients(do, k, v)
    begin, end = block * torch.arange(blocks), offset + tile * torch.arange(1, tiles + 1)
    needed = (first[0, :, :, None] <= begin) & (begin < end[:, None])  # (heads, tiles, blocks)
    assert (first[0, 0, 1] < first[0, 0, 0]) and (first > 0).all()
    for name, x in (("out", out), ("dq", dq)):
        met = x[0, :, :, 48 : 48 + blocks].unflatten(0, (tiles, tile)) != 0  # (tiles, rows, heads, blocks)
        assert torch.equal(met.any(1).transpose(0, 1), needed), name
    for name, x in (("dk", dk), ("dv", dv)):
        met = torch.stack([x[0, :, head * groups // 2, 16 * (1 + head) :][:, :tiles] for head in range(2)])
        assert torch.equal((met.unflatten(1, (blocks, block)) != 0).any(2).mT, needed), name

    low, cut = int(first.min()), 2 * tile  # the rows from `cut` on need no block before `last`
    do[:, cut:], k[:, :low], v[:, :low] = math.nan, math.nan, math.nan
    poisoned = gradients(do, k, v)
    assert torch.equal(poisoned[0][:, :cut], dq[:, :cut])
    for clean, got in zip((dk, dv), poisoned[1:]):
        for g in range(groups):
            last = int(first[0, g : g + 3 - groups, 2:].min())
            assert last > low and torch.equal(got[:, :last, g], clean[:, :last, g]) and got[:, last:, g].isnan().any()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("right padding", torch.float32),
        ("left padding", torch.bfloat16),
        ("documents", torch.bfloat16),
        ("ids with gaps", torch.float32),
        ("prefix", torch.float32),
        ("window", torch.bfloat16),
    ],
)
def test_what_is_skipped_beside_masks_weighs_at_most_two_to_the_minus_24(name: str, dtype: torch.dtype, slopes: Tensor):
    """A row's total counts what it sees only: here unseen keys near the diagonal would dominate it."""
    q, k, v = adversary("norm 25", 16, slopes, dtype=dtype)
    s = q.shape[1]
    rules = {"window": 3 * s // 4} if name == "window" else {field(name): masks(1, s)[name]}
    hidden = ~reference.visible_pairs(s, s, **rules)[0, 0, -1]
    k[:, hidden] *= 4
    dropped = torch.arange(s) < starts(q, k, v, slopes, **rules)[..., None]
    assert (skipping.weights(q, k, slopes, **rules) * dropped).sum(-1).max() <= skipping.LARGEST


def test_kept_counts_the_pairs_done(slopes: Tensor):
    q, k, v = qkv(1, 256, 2, 16)
    kept = [
        float(attend(q, k, v, return_kept=True, **kwargs)[1])
        for kwargs in (
            {"alibi_slopes": slopes},
            {"alibi_slopes": slopes, "skip": False},
            {},
            {"window": 32},
            {"sequence_id": torch.arange(256)[None] // 64},
        )
    ]
    assert kept[0] < 0.8 and kept[1:3] == pytest.approx([1, 1]) and kept[3] < 0.5 and kept[4] < 0.5
    tile = MODULE._tiles_for(q, "ieee", 0.0).fwd.m
    found = starts(q, k, v, slopes)[..., ::tile]
    ends = (torch.arange(0, 256, tile) + tile).clamp(max=256)
    pairs = ((ends - found).sum() / (2 * ends.sum())).item()
    assert kept[0] == pytest.approx(pairs)
    for queries, offset, keys in ((100, 10, 110), (100, 10, 150), (32, 10, 92)):
        q, k, v = qkv(1, queries, 2, 16, 2, keys)
        assert float(attend(q, k, v, query_offset=offset, return_kept=True)[1]) == pytest.approx(1)


def test_keys_that_are_not_finite_are_not_hidden(slopes: Tensor):
    q, k, v = qkv(1, layout(16, torch.float32).length, 2, 16)
    k[:, 3, :, 0] = math.nan
    out = attend(q, k, v, alibi_slopes=slopes)
    assert torch.equal(out.isnan(), reference.flash_attention(q, k, v, alibi_slopes=slopes).isnan())
    assert (starts(q, k, v, slopes)[..., 64:] == 0).all()


def test_padding_does_not_keep_everything(slopes: Tensor):
    """Rows that see nothing, or only keys far back, do not count or are bounded from the keys that they do see."""
    q, k, v = qkv(1, 300, 1, 16)
    at = torch.arange(300)[None]
    right = starts(q, k, v, slopes[:1], attention_mask=at < 230)
    left = starts(q, k, v, slopes[:1], attention_mask=at >= 70)
    assert right[0, 0, -1] > 0 and left[0, 0, -1] > 70


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [2, 1])
def test_dropout(g: int):
    """The dropped probabilities, read off with v = I, decide output and gradients as if they were a given mask."""
    t, p = 64, 0.3
    q, k, _ = qkv(2, t, 2, t, g)
    kwargs = {"alibi_slopes": kernels.alibi_slopes(2), "dropout_p": p, "seed": 2**40 + 11}
    eye = torch.eye(t)[None, :, None].expand(2, t, g, t)
    dropped = attend(q, k, eye, **kwargs).transpose(1, 2)  # (B, H, S, T)
    plain = attend(q, k, eye, alibi_slopes=kernels.alibi_slopes(2)).transpose(1, 2)
    seen = plain > 1e-30
    factor = torch.where(seen, dropped / plain, 0.0)
    assert factor.round(decimals=3).unique().tolist() == pytest.approx([0, round(1 / (1 - p), 3)])
    assert (factor[seen] == 0).float().mean().item() == pytest.approx(p, abs=0.025)
    assert not torch.equal(factor[0, 0] > 0, factor[0, 1] > 0) and not torch.equal(factor[0, 0] > 0, factor[1, 0] > 0)
    factor = (factor > 0) / (1 - p)

    def given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(t)
        scores = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(2 // g, 2)) * t**-0.5
        scores = scores - kernels.alibi_slopes(2)[:, None, None].to(q.dtype) * (i[:, None] - i)
        w = scores.masked_fill(i > i[:, None], -math.inf).softmax(-1) * factor.to(q.dtype)
        return torch.einsum("bhst,bthd->bshd", w, v.repeat_interleave(2 // g, 2))

    compare(partial(attend, **kwargs), given, [q, k, torch.randn(2, t, g, t)], torch.float32)


def test_dropout_seeds():
    q, k, v = qkv(1, 40, 2, 16)
    same = [attend(q, k, v, dropout_p=0.5, seed=s) for s in (1, 1, torch.tensor(1), 2)]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2]) and not torch.equal(same[0], same[3])


# ---- the boundary ----------------------------------------------------------------------------------------------------

CASES = [
    {"alibi_slopes": True},
    {"attention_mask": True, "sequence_id": True, "prefix_mask": True, "window": 20},
    {"dropout_p": 0.1, "seed": 3},
]


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: dict):
    """The longer length looks for keys to skip. What takes three times as long as all else runs compiled only."""
    s = 140 if case.get("alibi_slopes") else 40
    q, k, v = (t.bfloat16().requires_grad_() for t in qkv(1, s, 2, 16, 1))
    m = masks(1, s)
    tensors = {
        "alibi_slopes": kernels.alibi_slopes(2),
        "attention_mask": m["holes"],
        "sequence_id": m["documents"],
        "prefix_mask": m["prefix"],
    }
    given = [tensors[n] if case.get(n) else None for n in tensors]
    seed = torch.tensor(3) if "seed" in case else None
    settings = (True, 0.3, case.get("window"), 0, case.get("dropout_p", 0.0))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if q.is_cuda:
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.mpt.flash_attention, (q, k, v, *given, seed, *settings, True, "ieee"), test_utils=tests
    )
    with torch.no_grad():
        out, lse, starts_, _ = torch.ops.mpt.flash_attention(q, k, v, *given, seed, *settings, True, "ieee")
        saved = (q.detach(), k.detach(), v.detach(), out, lse, starts_)
        args = (torch.randn_like(q), torch.randn_like(lse), *saved, *given, seed, *settings, "ieee")
        torch.library.opcheck(torch.ops.mpt.flash_attention_backward, args, test_utils=tests)


def test_second_derivative_is_refused_by_name():
    q, k, v = (t.requires_grad_() for t in qkv(1, 10, 1, 16))
    (dq,) = torch.autograd.grad(attend(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"mpt::flash_attention has no second derivative"):
        dq.sum().backward()


def test_compile():
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in qkv(1, 60, 2, 16))

    def step(q, k, v):
        return attend(q * 2, k, v, alibi_slopes=kernels.alibi_slopes(2)).sum() * 3

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, step))):
        torch.testing.assert_close(a, b)


def test_activation_checkpointing_repeats_the_dropout_and_gradients_repeat_themselves():
    q, k, v = (t.requires_grad_() for t in qkv(1, 60, 2, 16))

    def step(q, k, v):
        return attend(q, k, v, alibi_slopes=kernels.alibi_slopes(2), dropout_p=0.2).square().sum()

    grads = []
    for checkpoint in (True, False):
        torch.manual_seed(9)
        out = torch.utils.checkpoint.checkpoint(step, q, k, v, use_reentrant=False) if checkpoint else step(q, k, v)
        grads.append(torch.autograd.grad(out, (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_autocast():
    q, k, v = (t.requires_grad_() for t in qkv(1, 50, 2, 16))
    with torch.autocast(q.device.type, torch.bfloat16):
        out, lse = attend(q, k, v, return_lse=True)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    expected, expected_lse = attend(*(t.bfloat16() for t in (q, k, v)), return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize(("batch", "queries"), [(1, 0), (0, 3)])
def test_nothing_to_do(batch: int, queries: int, backend: str):
    q, k, v = (t.requires_grad_() for t in qkv(batch, queries, 2, 16, 1, 5))
    slopes = kernels.alibi_slopes(2)
    out, lse, kept = kernels.flash_attention(
        q, k, v, alibi_slopes=slopes, return_lse=True, return_kept=True, backend=backend
    )
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and lse.shape == (batch, 2, queries) and kept.isfinite()
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v)] and all((g == 0).all() for g in grads)


def test_bad_arguments():
    q, k, v = qkv(2, 10, 4, 16, 2)
    with pytest.raises(ValueError, match=r"cannot run there: Triton kernels take fp16, bf16 and fp32"):
        attend(*(t.double() for t in (q, k, v)))
    with pytest.raises(ValueError, match=r"head dimensions up to 256, not 264"):
        attend(*qkv(1, 4, 1, 264))
    for scale in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"softmax_scale is"):
            attend(q, k, v, softmax_scale=scale)
    with pytest.raises(ValueError, match=r"alibi_slopes is \(3,\)"):
        attend(q, k, v, alibi_slopes=torch.ones(3))
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 9\)"):
        attend(q, k, v, attention_mask=torch.ones(2, 9).bool())


def test_every_architecture_has_tiles():
    """The forward's rows are a multiple of the others', and every block of keys divides the skip block."""
    for name in (*backend.TRITON_ARCHITECTURES, "interpreter"):
        for d in (1, 16, 64, 80, 128, 256):
            for dtype in DTYPES:
                for products, dropout in itertools.product(("ieee", "tf32", "bf16x6"), (False, True)):
                    tiles = MODULE._tiles(name, d, dtype, products, dropout)
                    assert tiles.fwd.m % tiles.dq.m == 0 and tiles.fwd.m % tiles.dkdv.m == 0
                    assert all(tiles.skip % tile.n == 0 for tile in (tiles.fwd, tiles.dq, tiles.dkdv))


# ---- as large as on a GPU: many tiles, loops that are pipelined, the tables' own tiles -------------------------------


def steep(h: int) -> Tensor:
    """Slopes for which some heads skip nearly all, and some little."""
    return kernels.alibi_slopes(8)[:: 8 // h]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("d", "g", "dtype"),
    [
        (64, 4, torch.bfloat16),
        (64, 2, torch.float16),
        (80, 4, torch.bfloat16),
        (112, 4, torch.bfloat16),
        (128, 4, torch.bfloat16),
        (128, 1, torch.bfloat16),
        (256, 4, torch.float16),
    ],
)
def test_long_rows_of_one_projection(d: int, g: int, dtype: torch.dtype):
    s, h = size((8200, 4), (170, 4))

    def projected(function, wqkv):
        q, k, v = (x.unflatten(-1, (-1, d)) for x in wqkv.split([h * d, g * d, g * d], -1))
        return function(q, k, v, alibi_slopes=steep(h), return_lse=True)

    wqkv = torch.randn(1, s, (h + 2 * g) * d)
    compare(partial(projected, attend), partial(projected, reference.flash_attention), [wqkv], dtype)
    q, k, v = (x.unflatten(-1, (-1, d)) for x in wqkv.to(dtype).split([h * d, g * d, g * d], -1))
    assert attend(q, k, v, alibi_slopes=steep(h), return_kept=True)[1] < size(0.6, 0.99)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "name", ["documents", "right padding", "left padding", "padded documents", "prefix", "window", "offset"]
)
def test_long_rows_with_masks(name: str, d: int):
    s = size(3000, 180)
    at, lengths = torch.arange(s), torch.tensor([[s], [s * 2 // 3]])
    documents = (torch.rand(2, s) < 5 / s).cumsum(1)
    rules = {
        "documents": {"sequence_id": documents},
        "right padding": {"attention_mask": at < lengths},
        "left padding": {"attention_mask": at >= s - lengths},
        "padded documents": {"sequence_id": torch.where(at < lengths, documents, -1)},
        "prefix": {"prefix_mask": at < lengths // 4},
        "window": {"window": s // 3},
        "offset": {"query_offset": s - s // 4},
    }[name]
    q, k, v = qkv(2, s, 4, d, 2)
    q = q[:, rules.get("query_offset", 0) :]
    both(q, k, v, torch.bfloat16, alibi_slopes=steep(4), **rules)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
def test_a_book(d: int):
    """65,536 keys, against the reference of a few rows, to which the gradients come; those reach every key."""
    s, rows = size((65536, 128), (300, 20))
    firsts = (0, s * 5 // 8 + 3, s - rows)
    slopes = kernels.alibi_slopes(8)[::7]

    def ours(q, k, v):
        out, lse = attend(q, k, v, alibi_slopes=slopes, return_lse=True)
        parts = [slice(first, first + rows) for first in firsts]
        return torch.cat([out[:, part] for part in parts], 1), torch.cat([lse[..., part] for part in parts], -1)

    def theirs(q, k, v):
        found = []
        for first in firsts:
            last = first + rows
            rules = {"alibi_slopes": slopes, "query_offset": first, "return_lse": True}
            found.append(reference.flash_attention(q[:, first:last], k[:, :last], v[:, :last], **rules))
        return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], -1)

    q, k, v = qkv(1, s, 2, d)
    compare(ours, theirs, [q, k, v], torch.bfloat16)
    assert attend(*(x.bfloat16() for x in (q, k, v)), alibi_slopes=slopes, return_kept=True)[1] < size(0.5, 0.99)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "none"])
def test_products_of_fp32(precision: str, d: int, multiply_fp32: Callable[[str], None]):
    """TF32 has 10 bits; where nobody says, on sm_90, a product is a sum of 6 D/16 terms, each cut off by the matrix
    unit.
    """
    multiply_fp32(precision)
    function = partial(attend, alibi_slopes=steep(2), return_lse=True)
    plain = partial(reference.flash_attention, alibi_slopes=steep(2), return_lse=True)
    eps = {"ieee": None, "tf32": 2.0**-10, "none": 2.0**-18}[precision]
    compare(function, plain, list(qkv(1, size(1500, 170), 2, d)), torch.float32, eps)


@pytest.mark.gpu
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("d", [24, 64, 128])
def test_descriptors_and_pointers(descriptors: bool, d: int, by_tma):
    """Also of tensors that must be copied for TMA."""
    by_tma(descriptors)
    q, k, v = (x.bfloat16() for x in qkv(1, size(1100, 150), 2, d, 1))
    q = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    k = torch.cat([k, k[..., :1]], -1)[..., :-1]
    both(q, k, v, torch.bfloat16, alibi_slopes=steep(2))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
def test_dropout_over_many_tiles(d: int):
    """As `test_dropout`, the probabilities being read off D columns at a time."""
    t, p = size(512, 128), 0.3
    q, k, _ = (x.bfloat16() for x in qkv(1, t, 2, d, 1))
    rules = {"alibi_slopes": torch.tensor([0.01, 0.001]), "softmax_scale": 0.02}
    dropping = partial(attend, dropout_p=p, seed=5, **rules)
    columns = torch.eye(t, dtype=torch.bfloat16)[None, :, None].split(d, -1)
    dropped, plain = (torch.cat([f(q, k, e) for e in columns], -1).mT for f in (dropping, partial(attend, **rules)))
    kept = (dropped > 0).mT  # (B, S, H, T)
    seen = (plain > 0).mT
    assert seen.sum() == 2 * t * (t + 1) // 2
    assert kept[seen].float().mean().item() == pytest.approx(1 - p, abs=0.02)

    def given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(t)
        up = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bshd,bthd->bsht", q.to(up), k.expand(-1, -1, 2, -1).to(up)) * rules["softmax_scale"]
        scores = scores - rules["alibi_slopes"].to(up)[:, None] * (i[:, None] - i)[:, None]
        w = scores.masked_fill((i > i[:, None])[:, None], -math.inf).softmax(-1) * kept / (1 - p)
        return torch.einsum("bsht,bthd->bshd", w.to(v.dtype), v.expand(-1, -1, 2, -1))

    compare(dropping, given, [q, k, torch.randn(1, t, 1, d)], torch.bfloat16)

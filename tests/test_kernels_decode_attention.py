"""Decoding attention on both paths, Triton under its interpreter: outputs against the float64 reference, ragged rows,
exact skipping by key norms, what lies beyond a row's end, the boundary.
"""

import math
import sys
from collections.abc import Callable
from functools import partial

import limits
import pytest
import torch
from device import size
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import Row, hold
from torch import Tensor

import kernels
from kernels import alibi, backend, reference
from kernels.alibi import GRAIN

# The interpreter is numpy, which warns where a kernel means NaN or infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(
    b: int, s: int, h: int, g: int, t: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(shape).to(dtype) for shape in ((b, s, h, d), (b, g, t, d), (b, g, t, d)))


def norms_of(k: Tensor, path: str) -> Tensor:
    norms = torch.full((*k.shape[:2], -(-k.shape[2] // GRAIN)), math.nan)
    kernels.update_key_norms(norms, k, 0, backend=path)
    return norms


def check(path: str, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **kwargs) -> None:
    """Within the rule; the reference takes no notice of key_norms. More draws change q and v, not k, whose norms may be
    given.
    """
    given = [(q, v)]

    def draw() -> list[Row]:
        q_, v_ = given[0]
        got = kernels.decode_attention(q_, k, v_, lengths, backend=path, **kwargs)
        plain = reference.decode_attention(q_, k, v_, lengths, **kwargs)
        exact = reference.decode_attention(q_.double(), k.double(), v_.double(), lengths, **kwargs)
        assert got.dtype == q.dtype and got.is_contiguous()
        given[0] = (q * (1 + 0.01 * torch.randn_like(q)), v * (1 + 0.01 * torch.randn_like(v)))
        return [("out", got, plain, exact)]

    hold(draw)


@pytest.fixture
def _every_size_skips(monkeypatch: pytest.MonkeyPatch):
    """The torch path looks for windows in small caches too, and joins none."""
    monkeypatch.setattr(sys.modules["kernels.decode_attention"], "_LEAST", 0)
    monkeypatch.setattr(sys.modules["kernels.decode_attention"], "_WASTE", 0)


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [1, 3, 16])
def test_ragged_lengths(s: int, dtype: torch.dtype, path: str):
    """The shortest row there can be, an odd one and a full one; T is no multiple of any block."""
    lengths = torch.tensor([s, 77, 131])
    check(path, *inputs(3, s, 2, 1, 131, 32, dtype), lengths, alibi_slopes=kernels.alibi_slopes(2))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("b", "h", "g", "s", "alibi"),
    [(2, 4, 4, 2, True), (2, 6, 2, 3, True), (2, 6, 2, 3, False), (2, 5, 1, 1, False), (1, 5, 1, 13, True)],
)
def test_heads(b: int, h: int, g: int, s: int, alibi: bool, path: str):
    """The last one has more rows than a tile."""
    lengths = torch.tensor([97, 150], dtype=torch.int32)[:b]
    slopes = kernels.alibi_slopes(h) if alibi else None
    check(path, *inputs(b, s, h, g, 150, 64), lengths, alibi_slopes=slopes)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        (24, torch.float32),
        (80, torch.bfloat16),
        (96, torch.float16),
        (112, torch.bfloat16),
        (256, torch.float32),
        (256, torch.bfloat16),
    ],
)
def test_head_dimensions(d: int, dtype: torch.dtype, path: str):
    check(path, *inputs(1, 3, 4, 2, 70, d, dtype), torch.tensor([70]), alibi_slopes=kernels.alibi_slopes(4))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [0.0, 0.05, 0.5])
def test_scale(scale: float, path: str):
    check(path, *inputs(2, 2, 4, 2, 90, 64), torch.tensor([90, 40]), softmax_scale=scale)


def test_float64_on_the_torch_path():
    q, k, v = inputs(2, 3, 4, 2, 90, 16, torch.float64)
    got, true = (
        f(q, k, v, torch.tensor([90, 31]), alibi_slopes=kernels.alibi_slopes(4))
        for f in (kernels.decode_attention, reference.decode_attention)
    )
    torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["(B, T, G, D)", "(T, B, G, D)", "wide rows", "shared by the batch"])
def test_strides(layout: str, path: str):
    b, s, h, g, t, d = 2, 2, 4, 2, 70, 32
    q = torch.randn(b, h, s, 2 * d)[..., ::2].transpose(1, 2)
    if layout == "(B, T, G, D)":
        k, v = (torch.randn(b, t, g, d).transpose(1, 2) for _ in range(2))
    elif layout == "(T, B, G, D)":
        k, v = (torch.randn(t, b, g, d).permute(1, 2, 0, 3) for _ in range(2))
    elif layout == "wide rows":
        k, v = torch.randn(b, g, t + 30, 2 * d)[:, :, 9 : t + 9].chunk(2, -1)
    else:
        k, v = (torch.randn(1, g, t, d).expand(b, -1, -1, -1) for _ in range(2))
    check(path, q, k, v, torch.tensor([t, 33]), alibi_slopes=kernels.alibi_slopes(h))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("s", [1, 3])
def test_what_lies_beyond_a_row_is_not_read(s: int, path: str):
    q, k, v = inputs(2, s, 2, 1, 130, 32)
    lengths = torch.tensor([130, 67])
    kwargs = {"alibi_slopes": kernels.alibi_slopes(2), "backend": path}
    clean = kernels.decode_attention(q, k, v, lengths, **kwargs)
    for x in (k, v):
        x[1, :, 67:] = math.nan
    assert torch.equal(kernels.decode_attention(q, k, v, lengths, **kwargs), clean)


@pytest.mark.parametrize("path", PATHS)
def test_nan_in_a_row_stays_in_it(path: str):
    q, k, v = inputs(2, 1, 2, 2, 70, 16)
    k[0, 1, 5] = math.nan
    out = kernels.decode_attention(q, k, v, torch.tensor([70, 70]), backend=path)
    assert out[0, 0, 1].isnan().all() and out[1].isfinite().all() and out[0, 0, 0].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_it_is_flash_attention_at_an_offset(path: str):
    def draw() -> list[Row]:
        q, k, v = inputs(2, 4, 4, 2, 100, 32)
        kwargs = {"alibi_slopes": kernels.alibi_slopes(4)}
        got = kernels.decode_attention(q, k, v, torch.tensor([100, 100]), backend=path, **kwargs)
        k, v, kwargs = k.transpose(1, 2), v.transpose(1, 2), kwargs | {"query_offset": 96}
        flash = kernels.flash_attention(q, k, v, **kwargs)
        return [("out", got, flash, reference.flash_attention(q.double(), k.double(), v.double(), **kwargs))]

    hold(draw)


# ---- exact skipping --------------------------------------------------------------------------------------------------


def weights(q: Tensor, k: Tensor, lengths: Tensor, slopes: Tensor, scale: float) -> Tensor:
    """Probabilities (B, H, S, T) in float64."""
    s, t = q.shape[1], k.shape[2]
    k = k.repeat_interleave(q.shape[2] // k.shape[1], 1).double()
    away = (lengths[:, None] - s + torch.arange(s))[:, :, None] - torch.arange(t)
    scores = torch.einsum("bshd,bhtd->bhst", q.double(), k) * scale - slopes.double()[:, None, None] * away[:, None]
    return scores.masked_fill(away[:, None] < 0, -math.inf).softmax(-1)


CASES = [
    "random",
    "one far key dominates",
    "huge far key along one query",
    "identical keys",
    "zero queries",
    "huge",
    "tiny",
    "squares underflow",
    "shrinking keys",
    "near keys opposed",
    "no slope",
]


def case(name: str, s: int, h: int, g: int, t: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (2, S, H, D), k, slopes; the softmax scale is 1."""
    slopes = kernels.alibi_slopes(h).flip(0) * 2
    q, k = torch.randn(2, s, h, d) * d**-0.5, torch.randn(2, g, t, d)
    if name == "one far key dominates":
        k[:, :, t // 7] *= 60
    if name == "huge far key along one query":
        k[1, -1, 2] = q[1, s // 2, -1] * 400  # in one row and kv head: the norms are not those of another
    if name == "identical keys":
        k[:] = k[:, :, :1].clone()
    if name == "zero queries":
        q.zero_()
    if name == "huge":
        q, k = q * 30, k * 30
    if name == "tiny":
        q, k = q * 1e-3, k * 1e-3
    if name == "squares underflow":
        q, k = q * 1e-25, k * 1e-25
    if name == "shrinking keys":
        k *= torch.linspace(6, 0.2, t)[:, None]
    if name == "near keys opposed":
        k = -q[:, -1, :: h // g, None].expand(-1, -1, t, -1) * 4
        k[:, :, : t // 3] *= -1.5
    if name == "no slope":
        slopes[1] = 0
    return q, k, slopes


@pytest.mark.usefixtures("_every_size_skips")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_skipped_keys_weigh_at_most_two_to_the_minus_24(name: str, path: str):
    s, h, g, t = 2, 4, 2, 400
    q, k, slopes = case(name, s, h, g, t, 16)
    lengths = torch.tensor([t, 333])
    out, first = torch.ops.mpt.decode_attention(
        q, k, torch.randn_like(k), lengths, slopes, norms_of(k, path), 1.0, path == "triton"
    )
    assert first.shape == (2, h) and first.dtype == torch.int32 and out.isfinite().all()
    assert (first % GRAIN == 0).all() and (first >= 0).all() and (first <= lengths[:, None] - s).all()
    skipped = torch.arange(t) < first[..., None, None]
    assert (weights(q, k, lengths, slopes, 1.0) * skipped).sum(-1).max() <= 2.0**-24


@pytest.mark.usefixtures("_every_size_skips")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beyond", [False, True])
def test_the_limit(beyond: bool, dtype: torch.dtype, path: str):
    """Keys before a cut in line with the query, as long as the bound allows, and those after it zero: nearly 2^-24 is
    lost. A little longer, in one query, it is more than may be.
    """
    module = sys.modules["kernels.decode_attention"]
    s, h, t, d, lengths, slopes = 3, 2, 400, 16, torch.tensor([400, 343]), torch.tensor([1.0, 0.25])
    q, k = torch.zeros(2, s, h, d), torch.zeros(2, 1, t, d)
    if path == "torch":
        near, rho = module._NEAR, alibi._RHO if q.device.type == "cpu" else alibi._RHO_TF32
    else:
        tile = module._tile(backend.architecture(q.device), h * s, d, dtype)
        near, rho = tile.near, tile.rho
    for b, length in enumerate(lengths.tolist()):
        row = torch.arange(length - s, length)
        count = row - (length - near) + 1 if path == "triton" else torch.ones_like(row)  # torch takes the largest alone
        for cut in range((length - near) // GRAIN * GRAIN, 0, -GRAIN):
            away = row - cut + 1
            sizes = [limits.longest(m, away, limits.near_sum(m, count), rho) for m in slopes.double()]
            if all(size[0] > 0 for size in sizes):
                break
        k[b, 0, :cut, 0] = 1
        q[b, ..., 0] = limits.rounded(torch.stack(sizes, 1), dtype).to(q.dtype)
        if beyond:
            past = torch.stack([limits.past(m, away, cut) for m in slopes.double()], 1)
            q[b, 1, :, 0] = limits.rounded(past[1], dtype, up=True).to(q.dtype)
    q, k = q.to(dtype), k.to(dtype)
    args = (q, k, torch.zeros_like(k), lengths, slopes, norms_of(k, path), 1.0, path == "triton")
    first = torch.ops.mpt.decode_attention(*args)[1]
    skipped = torch.arange(t) < first[..., None, None]
    lost = (weights(q, k, lengths, slopes, 1.0) * skipped).sum(-1).amax(-1) / limits.LARGEST
    known = 1 - torch.exp(-slopes) if path == "torch" else torch.ones(2)  # of the total
    share = (
        0.7 * limits.least(dtype, rho) if dtype == torch.bfloat16 else 0.95 * limits.least(dtype, rho)
    )  # few queries
    assert (lost <= 1).all() and (beyond or (lost >= share * known).all())


@pytest.mark.usefixtures("_every_size_skips")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("far_key", [False, True])
def test_outputs_with_skipping(far_key: bool, dtype: torch.dtype, path: str):
    q, k, v = inputs(2, 2, 4, 2, 340, 32, dtype)
    if far_key:
        k[:, :, 5] *= 30
    slopes = kernels.alibi_slopes(4) * 2
    check(path, q, k, v, torch.tensor([340, 290]), alibi_slopes=slopes, key_norms=norms_of(k, path))


@pytest.mark.usefixtures("_every_size_skips")
@pytest.mark.parametrize("path", PATHS)
def test_it_does_skip_and_the_skipped_is_not_read(path: str):
    """NaN in front of the window changes nothing; the report is the count."""
    q, k, v = inputs(2, 1, 2, 2, 420, 16)
    lengths, slopes = torch.tensor([420, 360]), torch.tensor([0.4, 0.004])
    norms = norms_of(k, path)
    first = torch.ops.mpt.decode_attention(q, k, v, lengths, slopes, norms, 0.25, path == "triton")[1]
    assert (first[:, 0] >= 192).all() and (first[:, 1] == 0).all()
    run = partial(kernels.decode_attention, q, k, v, lengths, alibi_slopes=slopes, key_norms=norms, backend=path)
    clean, kept = run(return_kept=True)
    assert kept.shape == () and kept.dtype == torch.float32
    torch.testing.assert_close(kept.item(), 1 - first.sum().item() / (2 * 780))
    for row in range(2):
        k[row, 0, : first[row, 0]] = math.nan
    assert torch.equal(run(), clean)


@settings(max_examples=12, deadline=None)
@given(
    s=st.sampled_from([1, 2, 5]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    t=st.integers(64, 420),
    d=st.sampled_from([16, 24]),
    dtype=st.sampled_from(DTYPES),
    steepest=st.floats(0.01, 2.0),
    size=st.sampled_from([0.3, 1.0, 3.0]),
    large=st.lists(st.integers(0, 419), max_size=3),
    data=st.data(),
    number=st.integers(0, 2**20),
)
def test_windows_in_combination(s, heads, t, d, dtype, steepest, size, large, data, number):
    """Ragged lengths, groups, and key norms from a prefill and steps, of keys of which a few are large."""
    torch.manual_seed(number)
    (h, g), slopes = heads, steepest * 0.3 ** torch.arange(float(heads[0]))
    lengths = torch.tensor(data.draw(st.lists(st.integers(s, t), min_size=2, max_size=2)))
    q, k, v = inputs(2, s, h, g, t, d)
    k[:, :, [at for at in large if at < t]] *= 6
    q, k, v = (x.to(dtype) for x in (q * size, k, v))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_LEAST", "_WASTE"):
            patch.setattr(sys.modules["kernels.decode_attention"], name, 0)
        for path in PATHS:
            norms = torch.full((2, g, -(-t // GRAIN)), math.nan)
            begun = int(lengths.min()) // 2
            kernels.update_key_norms(norms, k[:, :, :begun], 0, backend=path)
            for b, length in enumerate(lengths.tolist()):
                kernels.update_key_norms(norms[b : b + 1], k[b : b + 1, :, begun:length], begun, backend=path)
            args = (q, k, v, lengths, slopes, norms, d**-0.5, path == "triton")
            first = torch.ops.mpt.decode_attention(*args)[1]
            skipped = torch.arange(t) < first[..., None, None]
            assert (weights(q, k, lengths, slopes, d**-0.5) * skipped).sum(-1).max() <= limits.LARGEST
            check(path, q, k, v, lengths, alibi_slopes=slopes, key_norms=norms)


@pytest.mark.gpu
@pytest.mark.parametrize("told", ["none", "tf32"])
def test_skipping_with_fp32_as_torch_was_told(told: str, multiply_fp32: Callable[[str], None]):
    """The bound allows for what tf32 rounds away."""
    multiply_fp32(told)
    q, k, v = inputs(2, 2, 4, 2, 1500, 64)
    lengths, slopes, norms = torch.tensor([1500, 1111]), kernels.alibi_slopes(4) * 2, norms_of(k, "triton")
    first = torch.ops.mpt.decode_attention(q, k, v, lengths, slopes, norms, 0.125, True)[1]
    skipped = torch.arange(1500) < first[..., None, None]
    assert skipped.any() and (weights(q, k, lengths, slopes, 0.125) * skipped).sum(-1).max() <= limits.LARGEST


def test_long_caches_are_mostly_skipped():
    """The slopes of 12 heads on 8192 random keys: a fifth is read."""
    q, k, v = inputs(1, 1, 12, 12, 8192, 16)
    lengths, slopes = torch.tensor([8192]), kernels.alibi_slopes(12)
    run = partial(kernels.decode_attention, q, k, v, lengths, alibi_slopes=slopes, return_kept=True)
    out, kept = run(key_norms=norms_of(k, "torch"), backend="torch")
    assert kept < 0.2
    dense, all_of_them = run(backend="torch")
    assert all_of_them == 1
    exact = reference.decode_attention(q.double(), k.double(), v.double(), lengths, alibi_slopes=slopes)
    errors = [(x - exact).abs().max() for x in (out, dense)]
    assert errors[0] <= errors[1] + 2**-22 * v.abs().max()


@pytest.mark.usefixtures("_every_size_skips")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("where", ["key", "query", "slope"])
def test_not_finite_keeps_everything_it_touches(where: str, value: float, path: str):
    q, k, v = inputs(1, 2, 2, 2, 300, 16)
    slopes = torch.tensor([1.0, 0.5])
    if where == "key":
        k[0, 0, 3, 5] = value
    elif where == "query":
        q[0, 1, 0, 5] = value
    else:
        slopes[0] = -1.0 if value == 3e38 else math.nan
    norms = norms_of(k, path)
    first = torch.ops.mpt.decode_attention(q, k, v, torch.tensor([300]), slopes, norms, 0.25, path == "triton")[1]
    assert first[0, 0] == 0 and first[0, 1] > 0


# ---- as large as on a GPU: many pieces, loops over many tiles --------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("s", [1, 4])
@pytest.mark.parametrize(
    ("h", "g", "d", "dtype"),
    [
        (8, 8, 64, torch.bfloat16),
        (8, 2, 128, torch.bfloat16),
        (16, 1, 128, torch.float16),
        (8, 8, 112, torch.bfloat16),
        (8, 2, 256, torch.bfloat16),
        (8, 4, 128, torch.float32),
    ],
)
def test_long_caches(h: int, g: int, d: int, dtype: torch.dtype, s: int, skip: bool):
    t = size(65536, 600)
    q, k, v = inputs(4, s, h, g, t, d, dtype)
    lengths, slopes = torch.tensor([t, t * 5 // 8 + 3, t // 90, s]), kernels.alibi_slopes(h)
    norms = norms_of(k, "triton") if skip else None
    check("triton", q, k, v, lengths, alibi_slopes=slopes, key_norms=norms)
    if skip:
        torch.testing.assert_close(norms, norms_of(k, "torch"), rtol=1e-6, atol=0)
        run = partial(kernels.decode_attention, q, k, v, lengths, alibi_slopes=slopes, key_norms=norms)
        assert run(return_kept=True, backend="triton")[1] <= size(0.95, 1)


@pytest.mark.gpu
def test_products_of_fp32_in_tf32(multiply_fp32: Callable[[str], None]):
    multiply_fp32("tf32")
    q, k, v = inputs(2, 2, 8, 2, size(5000, 300), 128)
    rest = {"lengths": torch.tensor([k.shape[2], 130]), "alibi_slopes": kernels.alibi_slopes(8)}
    ours = partial(kernels.decode_attention, backend="triton", key_norms=norms_of(k, "triton"))
    given = [(q, k, v), tuple(x.double() for x in (q, k, v))]
    got, plain, exact = (f(*x, **rest) for f, x in zip((ours, *[reference.decode_attention] * 2), (given[0], *given)))
    hold(lambda: [("out", got, plain, exact)], 2.0**-10)


# ---- key norms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_kept_step_by_step(dtype: torch.dtype, path: str):
    """A ragged prefill, then steps of various lengths, and a row that starts again; strided keys."""
    t, lengths = 300, torch.tensor([130, 64, 1])
    norms = torch.full((3, 2, 5), math.nan)
    k = torch.randn(3, t, 2, 24).to(dtype).transpose(1, 2)
    expected = torch.full((3, 2, 5), math.nan)
    for f, into in ((partial(kernels.update_key_norms, backend=path), norms), (reference.update_key_norms, expected)):
        f(into, k[:, :, :130], 0)
        at = lengths.clone()
        for step in (1, 3, 62, 70):
            new = torch.stack([k[b, :, n : n + step] for b, n in enumerate(at.tolist())])
            f(into, new, at)
            at += step
    held = torch.arange(5) * GRAIN < at[:, None]
    for b in range(3):
        torch.testing.assert_close(norms[b, :, held[b]], expected[b, :, held[b]], rtol=1e-6, atol=0)
    true = k[0, :, : at[0]].float().norm(dim=-1)
    torch.testing.assert_close(norms[0, :, 4], true.amax(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_norms_of_a_long_prompt(path: str):
    """On a GPU several programs share it."""
    t, s = 3000, 2500
    starts = torch.tensor([0, 37, 500])
    k = torch.randn(3, 2, t, 16) * torch.linspace(1, 0.5, t)[:, None]  # most maxima come from a part before
    found, expected = (torch.full((3, 2, -(-t // GRAIN)), math.nan) for _ in range(2))
    for f, into in ((partial(kernels.update_key_norms, backend=path), found), (reference.update_key_norms, expected)):
        f(into, k[:, :, :500], 0)
        f(into, torch.stack([k[b, :, n : n + s] for b, n in enumerate(starts.tolist())]), starts)
    for b, n in enumerate(starts.tolist()):
        held = -(-(n + s) // GRAIN)
        torch.testing.assert_close(found[b, :, :held], expected[b, :, :held], rtol=1e-6, atol=0)
        assert found[b, :, held:].isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_norms_that_are_not_finite_become_large(path: str):
    k = torch.randn(1, 1, 130, 16)
    k[0, 0, 70, 3] = math.nan
    norms = norms_of(k, path)
    assert norms.isfinite().all() and norms[0, 0, 0] < 100 and (norms[0, 0, 1:] > 1e38).all()


# ---- the boundary ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("skip", [False, True])
def test_opcheck(skip: bool, path: str):
    q, k, v = inputs(2, 1, 2, 2, 70, 16)
    slopes, norms = (kernels.alibi_slopes(2), norms_of(k, path)) if skip else (None, None)
    args = (q, k, v, torch.tensor([70, 9]), slopes, norms, 0.25, path == "triton")
    torch.library.opcheck(torch.ops.mpt.decode_attention, args)
    new = (norms_of(k, path), k[:, :, :3], torch.tensor([20, 40]), path == "triton")
    torch.library.opcheck(torch.ops.mpt.update_key_norms, new)


@pytest.mark.parametrize("path", PATHS)
def test_compile(path: str):
    q, k, v = inputs(2, 2, 4, 2, 140, 16)
    slopes, lengths = kernels.alibi_slopes(4), torch.tensor([140, 70])

    def step(q, k, v, lengths, norms):
        kernels.update_key_norms(norms, k, 0, backend=path)
        return kernels.decode_attention(q, k, v, lengths, alibi_slopes=slopes, key_norms=norms, backend=path)

    norms = torch.zeros(2, 2, 3)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(q, k, v, lengths, norms)
    assert torch.equal(norms, norms_of(k, path))
    assert torch.equal(got, step(q, k, v, lengths, norms))


@pytest.mark.parametrize("path", PATHS)
def test_it_has_no_derivative_and_says_so(path: str):
    q, k, v = inputs(1, 1, 2, 2, 10, 16)
    out = kernels.decode_attention(q.requires_grad_(), k, v, torch.tensor([10]), backend=path)
    with pytest.raises(NotImplementedError, match=r"mpt::decode_attention has no derivative.*flash_attention"):
        out.sum().backward()


@pytest.mark.parametrize("path", PATHS)
def test_autocast_leaves_the_caches(path: str):
    q, k, v = inputs(1, 2, 4, 2, 40, 16, torch.bfloat16)
    with torch.autocast(q.device.type, torch.bfloat16):
        got = kernels.decode_attention(q.float(), k, v, torch.tensor([40]), backend=path)
    assert torch.equal(got, kernels.decode_attention(q, k, v, torch.tensor([40]), backend=path))


def test_meta():
    q, k = torch.empty(2, 3, 4, 16, device="meta"), torch.empty(2, 2, 50, 16, device="meta")
    lengths = torch.empty(2, dtype=torch.long, device="meta")
    assert kernels.decode_attention(q, k, k, lengths).shape == q.shape


def test_nothing_to_do():
    q, k, v = inputs(0, 2, 4, 2, 40, 16)
    for path in PATHS:
        lengths = torch.zeros(0, dtype=torch.long)
        assert kernels.decode_attention(q, k, v, lengths, backend=path).shape == q.shape
        kernels.update_key_norms(torch.zeros(1, 2, 1), torch.zeros(1, 2, 0, 16), 5, backend=path)


def test_pieces_fill_the_device_and_cover_the_cache():
    from kernels.decode_attention import _MACHINES, _MAX_PIECES, _piece

    for machine in _MACHINES:
        for heads, keys, block in ((1, 1, 64), (32, 4096, 64), (8, 65536, 128), (1, 2**20, 64), (4096, 84000, 64)):
            for skipping in (False, True):
                piece = _piece(machine, heads, keys, block, skipping)
                pieces = -(-keys // piece)
                assert piece % block == 0 and piece * pieces >= keys and 1 <= pieces <= _MAX_PIECES
                enough = pieces * heads >= _MACHINES[machine].processors or piece <= 2 * block or pieces > 256
                assert enough, f"{machine} {heads} {keys}: {pieces} pieces of {piece}"


# ---- bad arguments ---------------------------------------------------------------------------------------------------

BAD = [
    ({"lengths": [41, 30]}, ValueError, r"lengths\[0\] is 41; .* the caches hold 40: pass 2 to 40"),
    ({"lengths": [40, 1]}, ValueError, r"lengths\[1\] is 1; it counts the row's keys with those of its 2 queries"),
    ({"lengths": [40]}, ValueError, r"lengths is \(1,\); pass one per row: \(2,\)"),
    ({"lengths": [40.0, 30.0]}, TypeError, r"lengths is torch.float32; pass int32 or int64"),
    ({"lengths": torch.zeros(2, dtype=torch.long, device="meta")}, TypeError, r"lengths is on meta and q on"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes is \(3,\); q has 4 heads: pass \(4,\)"),
    ({"softmax_scale": -1.0}, ValueError, r"softmax_scale is -1.0; it must be finite and not negative"),
    ({"softmax_scale": math.nan}, ValueError, r"softmax_scale is nan"),
    ({"softmax_scale": math.inf}, ValueError, r"softmax_scale is inf"),
    ({"q": torch.zeros(2, 17, 4, 16)}, ValueError, r"q has 17 queries; 1 to 16, more are for flash_attention"),
    ({"q": torch.zeros(2, 2, 0, 16)}, ValueError, r"0 heads of q on 2 of the caches"),
    ({"alibi_slopes": torch.ones(4).int()}, TypeError, r"alibi_slopes is torch.int32; use float32"),
    ({"alibi_slopes": [0.5] * 4}, TypeError, r"alibi_slopes is list; pass a torch.Tensor"),
    ({"q": torch.zeros(2, 2, 3, 16)}, ValueError, r"3 heads of q on 2 of the caches"),
    ({"q": torch.zeros(2, 2, 4, 8)}, ValueError, r"pass q \(B, S, H, D\) and caches \(B, G, T, D\)"),
    ({"q": torch.zeros(2, 2, 4, 16).half()}, TypeError, r"mixed dtypes"),
    ({"q": torch.zeros(2, 2, 4, 16).long()}, TypeError, r"q is torch.int64"),
    ({"k_cache": torch.zeros(2, 2, 16, 40).mT}, ValueError, r"k_cache has strides .*; its last must be 1"),
    ({"v_cache": torch.zeros(2, 2, 41, 16)}, ValueError, r"v_cache \(2, 2, 41, 16\)"),
    ({"key_norms": torch.zeros(2, 2, 2)}, ValueError, r"key_norms is \(2, 2, 2\); pass .* = \(2, 2, 1\)"),
    ({"key_norms": torch.zeros(2, 2, 1).half()}, TypeError, r"key_norms is torch.float16; they are float32"),
    ({"backend": "cuda"}, ValueError, r"backend is 'cuda'"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
@pytest.mark.parametrize("path", [*PATHS, "reference"])
def test_bad_arguments(changed: dict, error: type[Exception], message: str, path: str):
    q, k, v = inputs(2, 2, 4, 2, 40, 16)
    given = {"q": q, "k_cache": k, "v_cache": v, "lengths": torch.tensor([40, 30]), "backend": path} | changed
    given = {n: x.to(q.device) if isinstance(x, Tensor) and x.device.type == "cpu" else x for n, x in given.items()}
    if isinstance(given["lengths"], list):
        given["lengths"] = torch.tensor(given["lengths"])
    if q.device.type != "cpu" and "lengths[" in message.replace("\\", ""):
        pytest.skip("values of lengths on a GPU are not looked at")
    with pytest.raises(error, match=message):
        kernels.decode_attention(**given)


def test_wide_heads_are_refused():
    q, k, v = inputs(1, 1, 1, 1, 4, 264)
    with pytest.raises(ValueError, match=r"head dimension 264; it must be 1 to 256"):
        kernels.decode_attention(q, k, v, torch.tensor([4]))


@pytest.mark.parametrize(
    ("norms", "start", "error", "message"),
    [
        ((2, 2, 1), 60, ValueError, r"keys go to positions 60 to 69, and key_norms covers 0 to 63"),
        ((2, 2, 1), -1, ValueError, r"keys go to positions -1 to 8"),
        ((2, 3, 1), 0, ValueError, r"key_norms \(2, 3, 1\), k_new \(2, 2, 10, 16\)"),
        ((2, 2, 1), [1.0, 2.0], TypeError, r"start is torch.float32"),
        ((2, 2, 1), [1], ValueError, r"start is \(1,\)"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_bad_arguments_of_update(norms, start, error, message, path):
    k = torch.randn(2, 2, 10, 16)
    if k.device.type != "cpu" and "positions" in message:
        pytest.skip("values of start on a GPU are not looked at")
    start = torch.tensor(start) if isinstance(start, list) else start
    with pytest.raises(error, match=message):
        kernels.update_key_norms(torch.zeros(norms), k, start, backend=path)

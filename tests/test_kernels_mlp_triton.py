"""The MLP's Triton kernels, each test in both forms: the product with GELU in its epilogue, and the library's product
with a pointwise kernel.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from device import size
from tolerance import assert_close, compare, compare_pooled, run

import kernels
from kernels import reference

ours = importlib.import_module("kernels.mlp")  # the name in the package is the function's
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
mlp = partial(kernels.mlp, backend="triton")


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["fused", "pointwise"], autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    with ours.only(request.param):
        yield request.param


def inputs(n: tuple[int, ...], d: int, f: int, bias: bool, out: int | None = None) -> list[torch.Tensor | None]:
    out = out or d
    weights = [torch.randn(f, d) * d**-0.5, torch.randn(out, f) * f**-0.5]
    return [torch.randn(*n, d), *weights, *([torch.randn(f), torch.randn(out)] if bias else [None, None])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chunk_size", "bias"), [(None, True), (50, False)])
def test_outputs_and_gradients(chunk_size: int | None, bias: bool, dtype: torch.dtype):
    given = inputs((3, 43), 64, 144, bias, out=40)
    compare(partial(mlp, chunk_size=chunk_size), reference.mlp, given, dtype)


@pytest.mark.parametrize(("d", "f"), [(31, 63), (33, 65), (100, 129)])
def test_widths(d: int, f: int):
    compare_pooled(mlp, reference.mlp, [inputs((33,), d, f, True) for _ in range(2)], torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "d", "f", "chunk_size"),
    size([(1000, 1024, 4096, None), (1000, 1024, 4096, 300), (777, 1000, 4090, None)], [(70, 70, 150, None)]),
)
def test_many_tiles(rows: int, d: int, f: int, chunk_size: int | None, dtype: torch.dtype):
    """Several groups of tiles, and many steps of the product's loop; the last with edges on every side."""
    compare(partial(mlp, chunk_size=chunk_size), reference.mlp, inputs((rows,), d, f, True, out=d // 2 + 8), dtype)


@pytest.mark.gpu
def test_products_of_fp32_in_tf32(multiply_fp32: Callable[[str], None]):
    multiply_fp32("tf32")
    given = inputs((size(500, 70),), size(512, 70), size(1024, 150), True)
    compare(mlp, reference.mlp, given, torch.float32, eps=2.0**-10)


@pytest.mark.gpu
def test_elements_beyond_2_to_the_31():
    """The last rows, against the reference of them alone."""
    f, last = size((16384, 300), (150, 9))
    rows = size(2**31 // f + 300, 70)
    low = [None if t is None else t.bfloat16() for t in inputs((rows,), 64, f, False)]
    dy = torch.randn(rows, 64, dtype=torch.bfloat16)
    few = [low[0][-last:], *low[1:]]
    (y, dx, *_), (plain_y, plain_dx, *_) = run(mlp, low, [dy]), run(reference.mlp, few, [dy[-last:]])
    exact_y, exact_dx, *_ = run(reference.mlp, [None if t is None else t.double() for t in few], [dy[-last:]])
    assert_close("y", y[-last:], plain_y, exact_y)
    assert_close("dx", dx[-last:], plain_dx, exact_dx)


def test_one_column():
    given = inputs((3,), 1, 1, True)
    torch.testing.assert_close(mlp(*given), reference.mlp(*given))


@pytest.mark.parametrize("n", [(), (0,), (1,), (17,), (33,)])
def test_lengths(n: tuple[int, ...]):
    draws = [inputs(n, 48, 80, True) for _ in range(3)]
    compare_pooled(partial(mlp, chunk_size=16), reference.mlp, draws, torch.float32)


def test_large_values_in_bf16():
    """GELU far out on both sides, where the exact form and the tanh form part."""
    given = inputs((64,), 32, 128, False)
    given[0] = given[0] * 6
    compare(mlp, reference.mlp, given, torch.bfloat16)


def test_values_that_overflow_a_square():
    x = torch.tensor([[1e30], [-1e30], [0.0]], requires_grad=True)
    y = mlp(x, torch.ones(4, 1), torch.ones(1, 4))
    assert torch.equal(y, torch.tensor([[4e30], [0.0], [0.0]]))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([[4.0], [0.0], [2.0]]))


def test_strided_inputs_and_expanded_gradients():
    x, up, down, up_b, _ = inputs((40,), 32, 48, True)
    strided = [x.T.contiguous().T, up.T.contiguous().T, torch.cat([down, down], 1)[:, :48], up_b[:, None].expand(48, 2)]
    strided[3] = strided[3][:, 1]
    wide = torch.cat([x, x], 1)[:, :32]  # rows with gaps
    for g in (torch.ones(()).expand(40, 32), torch.randn(32).expand(40, 32), torch.randn(32, 40).T):
        for first in (strided[0], wide):
            leaves = [t.detach().requires_grad_() for t in (first, *strided[1:])]
            got = torch.autograd.grad(mlp(*leaves), leaves, g)
            plain = torch.autograd.grad(reference.mlp(*leaves), leaves, g.contiguous())
            for a, b in zip(got, plain):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_a_second_backward_finds_what_was_saved(chunk_size: int | None):
    leaves = [t.requires_grad_() for t in inputs((20,), 16, 32, True)]
    y = mlp(*leaves, chunk_size=chunk_size)
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y.sum(), leaves)))


def test_frozen_weights_get_no_gradient():
    given = inputs((6,), 8, 12, True)
    for chosen in ([0], [1], [2], [3], [4], [0, 3], [2, 4]):
        leaves = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(given)]
        got = torch.autograd.grad(mlp(*leaves).sum(), [leaves[i] for i in chosen])
        plain = torch.autograd.grad(reference.mlp(*leaves).sum(), [leaves[i] for i in chosen])
        for a, b in zip(got, plain):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("chunk_size", "wide"), [(None, 1), (10, 0)])
def test_what_is_kept(chunk_size: int | None, wide: int):
    """x, the weights and one f wide tensor; none with chunk_size."""
    x, up, down, *_ = (t if t is None else t.requires_grad_() for t in inputs((40,), 8, 32, False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        mlp(x, up, down, chunk_size=chunk_size)
    assert sum(t.shape == (40, 32) for t in kept) == wide


def test_autocast():
    given = [t.requires_grad_() for t in inputs((40,), 16, 24, True)]
    with torch.autocast(given[0].device.type, torch.bfloat16):
        y = mlp(*given)
    low = [t.detach().bfloat16().requires_grad_() for t in given]
    expected = mlp(*low)
    assert torch.equal(y, expected)
    for got, want in zip(torch.autograd.grad(y.sum(), given), torch.autograd.grad(expected.sum(), low)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("bias", "chunk_size"), [(True, None), (False, 4)])
def test_opcheck(bias: bool, chunk_size: int | None):
    given = [None if t is None else t.bfloat16().requires_grad_() for t in inputs((5,), 8, 12, bias)]
    torch.library.opcheck(torch.ops.mpt.mlp, (*given, chunk_size, True))
    with torch.no_grad():
        y, pre = torch.ops.mpt.mlp(*given, chunk_size, True)
        given = [None if t is None else t.detach() for t in given]
        for wanted in ([True] * 3 + [bias] * 2, [True, False, False, False, False]):
            torch.library.opcheck(torch.ops.mpt.mlp_backward, (y, pre, *given, chunk_size, wanted, True))


def test_compile_and_checkpoint():
    torch._dynamo.reset()
    given = [t.requires_grad_() for t in inputs((2, 9), 8, 12, True)]

    def step(*given):
        return mlp(*given).square().sum()

    expected = torch.autograd.grad(step(*given), given)
    checkpointed = partial(torch.utils.checkpoint.checkpoint, step, use_reentrant=False)
    for other in (torch.compile(step, backend="aot_eager", fullgraph=True), checkpointed):
        for got, want in zip(torch.autograd.grad(other(*given), given), expected):
            torch.testing.assert_close(got, want)


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match=r"mlp cannot run there: .*this is float64"):
        mlp(*(t.double() for t in inputs((3,), 8, 12, True)))


def test_the_table_of_measurements_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ours, "_only", None)
    entry = ours._Measured("backward", (1024, 8192), (4096, 2**20), "a machine")
    monkeypatch.setitem(ours._FUSED_IS_FASTER, "sm_90", (entry,))
    assert ours._fused("backward", "sm_90", 1024, 768, 4096)
    for other in (
        ("forward", "sm_90", 1024, 768, 4096),
        ("backward", "sm_80", 1024, 768, 4096),
        ("backward", "sm_90", 1023, 768, 4096),
        ("backward", "sm_90", 8193, 768, 4096),
        ("backward", "sm_90", 1024, 768, 4080),
        ("backward", "sm_90", 1024, 769, 4096),
    ):
        assert not ours._fused(*other)

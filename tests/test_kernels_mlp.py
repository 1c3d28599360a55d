"""The MLP: the error rule, chunks, what it keeps, frozen weights, the boundary with autograd."""

import math
from functools import partial

import pytest
import torch
from tolerance import compare, compare_pooled

import kernels
from kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n: tuple[int, ...], d: int, f: int, bias: bool) -> list[torch.Tensor | None]:
    weights = [torch.randn(f, d) * d**-0.5, torch.randn(d, f) * f**-0.5]
    return [torch.randn(*n, d), *weights, *([torch.randn(f), torch.randn(d)] if bias else [None, None])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 50, 1000])
def test_outputs_and_gradients(chunk_size: int | None, bias: bool, dtype: torch.dtype):
    n = (3, 4) if chunk_size == 1 else (3, 43)  # summing many chunks in turn rounds more than plain torch's one sum
    draws = [inputs(n, 24, 60, bias) for _ in range(4)]
    compare_pooled(partial(kernels.mlp, chunk_size=chunk_size), reference.mlp, draws, dtype)


@pytest.mark.parametrize("n", [(), (0,), (1,), (17,), (127,)])
def test_lengths(n: tuple[int, ...]):
    for chunk_size in (None, 16):
        draws = [inputs(n, 8, 12, True) for _ in range(max(4, 40 // max(math.prod(n), 1)))]
        compare_pooled(partial(kernels.mlp, chunk_size=chunk_size), reference.mlp, draws, torch.float32)


def test_large_values_in_bf16():
    """GELU far out on both sides, where the exact form and the tanh form part."""
    given = inputs((64,), 16, 64, False)
    given[0] = given[0] * 6
    compare(kernels.mlp, reference.mlp, given, torch.bfloat16)


def test_gradcheck():
    given = [None if t is None else t.double().requires_grad_() for t in inputs((5,), 3, 4, True)]
    for chunk_size in (None, 2):
        assert torch.autograd.gradcheck(partial(kernels.mlp, chunk_size=chunk_size), given)


def test_an_expanded_gradient():
    x, up, down, *_ = (t if t is None else t.requires_grad_() for t in inputs((6,), 8, 12, False))
    for g in (torch.ones(()).expand(6, 8), torch.randn(8).expand(6, 8)):
        ours = torch.autograd.grad(kernels.mlp(x, up, down), (x, up, down), g)
        plain = torch.autograd.grad(reference.mlp(x, up, down), (x, up, down), g.contiguous())
        for a, b in zip(ours, plain):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("chunk_size", "wide"), [(None, 1), (10, 0)])
def test_what_is_kept(chunk_size: int | None, wide: int):
    """x, the weights and one f wide tensor; none with chunk_size."""
    x, up, down, *_ = (t if t is None else t.requires_grad_() for t in inputs((40,), 8, 32, False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        kernels.mlp(x, up, down, chunk_size=chunk_size)
    assert sum(t.shape == (40, 32) for t in kept) == wide
    assert {t.data_ptr() for t in kept if t.numel() and t.shape != (40, 32)} <= {t.data_ptr() for t in (x, up, down)}


def test_frozen_weights_get_no_gradient():
    given = inputs((6,), 8, 12, True)
    for chosen in ([0], [1], [2], [3], [4], [0, 3], [2, 4]):
        leaves = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(given)]
        ours = torch.autograd.grad(kernels.mlp(*leaves).sum(), [leaves[i] for i in chosen])
        plain = torch.autograd.grad(reference.mlp(*leaves).sum(), [leaves[i] for i in chosen])
        for a, b in zip(ours, plain):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast(backend: str | None):
    given = [t.requires_grad_() for t in inputs((40,), 16, 24, True)]
    with torch.autocast(given[0].device.type, torch.bfloat16):
        y = kernels.mlp(*given, backend=backend)
    low = [t.detach().bfloat16() for t in given]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, reference.mlp(*low))
    grads = torch.autograd.grad(y.sum(), given)
    assert [g.dtype for g in grads] == [torch.float32] * 5


@pytest.mark.parametrize(("bias", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_opcheck(bias: bool, chunk_size: int | None, dtype: torch.dtype):
    given = [None if t is None else t.to(dtype).requires_grad_() for t in inputs((9,), 8, 12, bias)]
    torch.library.opcheck(torch.ops.mpt.mlp, (*given, chunk_size, False))
    with torch.no_grad():
        y, pre = torch.ops.mpt.mlp(*given, chunk_size, False)
        given = [None if t is None else t.detach() for t in given]
        for wanted in ([True] * 3 + [bias] * 2, [True, False, False, False, False]):
            torch.library.opcheck(torch.ops.mpt.mlp_backward, (y, pre, *given, chunk_size, wanted, False))


def test_compile_and_checkpoint():
    torch._dynamo.reset()
    given = [t.requires_grad_() for t in inputs((2, 9), 8, 12, True)]

    def step(*given):
        return kernels.mlp(*given).square().sum()

    expected = torch.autograd.grad(step(*given), given)
    checkpointed = partial(torch.utils.checkpoint.checkpoint, step, use_reentrant=False)
    for other in (torch.compile(step, backend="aot_eager", fullgraph=True), checkpointed):
        for got, want in zip(torch.autograd.grad(other(*given), given), expected):
            torch.testing.assert_close(got, want)


def test_second_derivative_is_refused_by_name():
    x, up, down, *_ = (t if t is None else t.requires_grad_() for t in inputs((6,), 8, 12, False))
    (dx,) = torch.autograd.grad(kernels.mlp(x, up, down).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"mpt::mlp has no second derivative"):
        dx.sum().backward()


def test_bad_arguments():
    x, up, down, up_b, down_b = inputs((6,), 8, 12, True)
    with pytest.raises(ValueError, match=r"x \(6, 8\), up_weight \(12, 7\)"):
        kernels.mlp(x, up[:, :7], down)
    with pytest.raises(ValueError, match=r"down_weight \(8, 11\)"):
        kernels.mlp(x, up, down[:, :11])
    with pytest.raises(ValueError, match=r"up_bias is \(11,\); pass \(12,\)"):
        kernels.mlp(x, up, down, up_b[:11])
    with pytest.raises(ValueError, match=r"down_bias is \(7,\); pass \(8,\)"):
        kernels.mlp(x, up, down, up_b, down_b[:7])
    with pytest.raises(ValueError, match=r"chunk_size is 0"):
        kernels.mlp(x, up, down, chunk_size=0)
    with pytest.raises(TypeError, match=r"chunk_size is 2.0; it counts tokens: pass an integer"):
        kernels.mlp(x, up, down, chunk_size=2.0)
    with pytest.raises(TypeError, match=r"mixed dtypes"):
        kernels.mlp(x.bfloat16(), up, down)
    with (
        torch.autocast(x.device.type, torch.bfloat16),
        pytest.raises(TypeError, match=r"up_weight is torch.int64; use float16"),
    ):
        kernels.mlp(x, up.long(), down)

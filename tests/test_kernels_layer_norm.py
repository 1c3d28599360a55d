"""LayerNorm and RMSNorm: the error rule, the residual, fp32 statistics, the boundary with autograd."""

from functools import partial

import pytest
import torch
from tolerance import compare, hold, run
from torch import Tensor

import kernels
from kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def with_residual(function, *weights: Tensor | None):
    return lambda x, residual, *w: function(x, *w, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 17), (3, 127, 64), (2, 129, 80), (300, 768), (5,)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["layer_norm", "layer_norm with bias", "rms_norm"])
def test_outputs_and_gradients(norm: str, residual: bool, shape: tuple[int, ...], dtype: torch.dtype):
    name, d = norm.split()[0], shape[-1]
    weights = [torch.randn(d), torch.randn(d) if norm.endswith("bias") else None][: 2 if name == "layer_norm" else 1]
    x = torch.randn(shape) * 3 + 1
    ours, plain = getattr(kernels, name), getattr(reference, name)
    if residual:
        compare(with_residual(ours), with_residual(plain), [x, torch.randn(shape), *weights], dtype)
    else:
        compare(ours, plain, [x, *weights], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_and_weight_gradients_are_summed_in_fp32(dtype: torch.dtype):
    """4096 rows with a mean far from zero: sums in the low precision would lose whole digits."""
    x, w, b = torch.randn(4096, 64) + 20, torch.ones(64), torch.zeros(64)
    compare(kernels.layer_norm, reference.layer_norm, [x, w, b], dtype)
    low = [t.to(dtype) for t in (x, w, b)]
    dw = run(kernels.layer_norm, low)[2].double()
    exact = run(reference.layer_norm, [t.double() for t in low])[2]
    assert (dw - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_eps_and_float64():
    x, w, b, r = (torch.randn(shape).double().requires_grad_() for shape in ((3, 4), (4,), (4,), (3, 4)))
    assert torch.autograd.gradcheck(lambda *a: kernels.layer_norm(a[0], a[1], a[2], 0.5, a[3]), (x, w, b, r))
    assert torch.autograd.gradcheck(lambda *a: kernels.rms_norm(a[0], a[1], 0.5, a[2]), (x, w, r))
    torch.testing.assert_close(kernels.layer_norm(x, w, b, 0.5), reference.layer_norm(x, w, b, 0.5))


def only(norm, pick: int, x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    return norm(x, w, residual=residual)[pick] + 0 * w.sum()


@pytest.mark.parametrize("use", ["y", "sum"])
def test_either_output_alone(use: str):
    x, w, r = torch.randn(5, 8), torch.randn(8), torch.randn(5, 8)
    pick = 0 if use == "y" else 1
    for name in ("layer_norm", "rms_norm"):
        ours, plain = (partial(only, getattr(module, name), pick) for module in (kernels, reference))
        compare(ours, plain, [x, r, w], torch.float32)


@pytest.mark.parametrize("shape", [(), (8,)])
def test_expanded_gradients_and_strided_inputs(shape: tuple[int, ...]):
    def draw(name):
        gradient, w = torch.randn(shape).expand(4, 6, 8), torch.randn(8)
        x = torch.randn(6, 4, 16)[..., ::2].transpose(0, 1)
        ours, plain, exact = (
            run(getattr(module, name), [x.to(dtype), w.to(dtype)], [gradient])
            for module, dtype in ((kernels, torch.float32), (reference, torch.float32), (reference, torch.float64))
        )
        return [(name, *row) for row in zip(ours, plain, exact)]

    for name in ("layer_norm", "rms_norm"):
        hold(partial(draw, name))


def test_autocast():
    """Output in the low dtype from inputs cast to it; the residual stream keeps fp32."""
    x, r, w = (torch.randn(6, 16).bfloat16(), torch.randn(6, 16), torch.randn(16).requires_grad_())
    for backend in (None, "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            y, total = kernels.layer_norm(x, w, residual=r, backend=backend)
            alone = kernels.layer_norm(total, w, backend=backend)
            rms = kernels.rms_norm(total, w, backend=backend)
        assert y.dtype == alone.dtype == rms.dtype == torch.bfloat16 and total.dtype == torch.float32
        assert torch.equal(total, x + r) and torch.equal(y, alone)
        torch.testing.assert_close(y, reference.layer_norm(total.bfloat16(), w.bfloat16()))
        assert torch.autograd.grad(y.sum(), w)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.layer_norm(x.double(), w.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual: bool, rms: bool, dtype: torch.dtype):
    x, w, b, r = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 5, 8), (8,), (8,), (3, 5, 8)))
    args = (x, w, None if rms else b, r if residual else None, 1e-5, rms)
    torch.library.opcheck(torch.ops.mpt.layer_norm, args)
    with torch.no_grad():
        _, total, mean, rstd = torch.ops.mpt.layer_norm(*args)
        given = (torch.randn_like(x), torch.randn_like(x) if residual else None, (total if residual else x).detach())
        weights = (w.detach(), None if rms else b.detach())
        torch.library.opcheck(torch.ops.mpt.layer_norm_backward, (*given, *weights, mean, rstd, rms))


def test_compile_and_checkpoint():
    torch._dynamo.reset()
    x, w, r = (torch.randn(s, requires_grad=True) for s in ((4, 8), (8,), (4, 8)))

    def step(x, w, r):
        y, total = kernels.layer_norm(x, w, residual=r)
        return (y * total).sum()

    expected = torch.autograd.grad(step(x, w, r), (x, w, r))
    checkpointed = partial(torch.utils.checkpoint.checkpoint, step, use_reentrant=False)
    for other in (torch.compile(step, backend="aot_eager", fullgraph=True), checkpointed):
        for got, want in zip(torch.autograd.grad(other(x, w, r), (x, w, r)), expected):
            torch.testing.assert_close(got, want)


def test_second_derivative_is_refused_by_name():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    (dx,) = torch.autograd.grad(kernels.layer_norm(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"mpt::layer_norm has no second derivative"):
        dx.sum().backward()


def test_bad_arguments():
    x, w = torch.randn(4, 8), torch.randn(8)
    for norm in (kernels.layer_norm, kernels.rms_norm):
        with pytest.raises(ValueError, match=r"weight is \(7,\)"):
            norm(x, w[:7])
        with pytest.raises(ValueError, match=r"residual is \(3, 8\)"):
            norm(x, w, residual=x[:3])
        with pytest.raises(ValueError, match=r"eps is -1"):
            norm(x, w, eps=-1)
        with pytest.raises(TypeError, match=r"mixed dtypes \(x torch.bfloat16, weight torch.float32\)"):
            norm(x.bfloat16(), w)
    with pytest.raises(ValueError, match=r"bias is \(1,\)"):
        kernels.layer_norm(x, w, torch.zeros(1))

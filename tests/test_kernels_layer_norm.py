"""LayerNorm and RMSNorm on plain torch and in Triton: the error rule, the residual, fp32 statistics, the boundary with
autograd.
"""

import math
from functools import partial

import pytest
import torch
from device import size
from tolerance import assert_close, compare, compare_pooled, hold, run
from torch import Tensor

import kernels
from kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "triton"]
# In the interpreter rows of up to 128 elements are one block, several rows a tile, and longer ones are wide.
SHAPES = {
    "torch": [(1, 17), (3, 127, 64), (2, 129, 80), (300, 768), (5,)],
    "triton": [(1, 17), (2, 129, 80), (5,), (35, 300)],
}


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def with_residual(function):
    return lambda x, residual, *w: function(x, *w, residual=residual)


def ours(name: str, backend: str):
    return partial(getattr(kernels, name), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, shape", [(b, shape) for b in BACKENDS for shape in SHAPES[b]])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["layer_norm", "layer_norm with bias", "rms_norm"])
def test_outputs_and_gradients(norm: str, residual: bool, backend: str, shape: tuple[int, ...], dtype: torch.dtype):
    follow_the_rule(norm, residual, backend, shape, dtype)


def follow_the_rule(norm: str, residual: bool, backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    name, d = norm.split()[0], shape[-1]
    weights = [torch.randn(d), torch.randn(d) if norm.endswith("bias") else None][: 2 if name == "layer_norm" else 1]
    x = torch.randn(shape) * 3 + 1
    norms = ours(name, backend), getattr(reference, name)
    if residual:
        compare(*map(with_residual, norms), [x, torch.randn(shape), *weights], dtype)
    else:
        compare(*norms, [x, *weights], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("d", size((768, 4096, 7168, 8192, 12288), (80, 300)))
@pytest.mark.parametrize(
    ("norm", "residual", "dtype"),
    [
        ("layer_norm with bias", True, torch.bfloat16),
        ("layer_norm", False, torch.float16),
        ("rms_norm", True, torch.float32),
    ],
)
def test_rows_for_which_each_program_takes_many_turns(norm: str, residual: bool, dtype: torch.dtype, d: int):
    """The backward's loop over tiles is pipelined there, and sums dweight over them. The longest rows are wide."""
    rows = size(min(40_001, 200_000_000 // d), 70)  # what float64 makes of them fits beside it
    follow_the_rule(norm, residual, "triton", (rows, d), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("d", size((4096, 12288), (80, 300)))
def test_elements_beyond_2_to_the_31(d: int):
    """The last rows, against the reference of them alone."""
    rows, last = size((2**31 // d + 300, 300), (50, 9))
    x, w, b, dy = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((rows, d), (d,), (d,), (rows, d)))
    y, dx, *_ = run(ours("layer_norm", "triton"), [x, w, b], [dy])
    few = [x[-last:], w, b]
    plain = run(reference.layer_norm, few, [dy[-last:]])
    exact = run(reference.layer_norm, [t.double() for t in few], [dy[-last:]])
    assert_close("y", y[-last:], plain[0], exact[0])
    assert_close("dx", dx[-last:], plain[1], exact[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_and_weight_gradients_are_summed_in_fp32(dtype: torch.dtype, backend: str):
    """4096 rows with a mean far from zero: sums in the low precision would lose whole digits."""
    x, w, b = torch.randn(4096, 64) + 20, torch.ones(64), torch.zeros(64)
    compare(ours("layer_norm", backend), reference.layer_norm, [x, w, b], dtype)
    low = [t.to(dtype) for t in (x, w, b)]
    dw = run(ours("layer_norm", backend), low)[2].double()
    exact = run(reference.layer_norm, [t.double() for t in low])[2]
    assert (dw - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_eps_and_float64():
    x, w, b, r = (torch.randn(shape).double().requires_grad_() for shape in ((3, 4), (4,), (4,), (3, 4)))
    assert torch.autograd.gradcheck(lambda *a: kernels.layer_norm(a[0], a[1], a[2], 0.5, a[3]), (x, w, b, r))
    assert torch.autograd.gradcheck(lambda *a: kernels.rms_norm(a[0], a[1], 0.5, a[2]), (x, w, r))
    torch.testing.assert_close(kernels.layer_norm(x, w, b, 0.5), reference.layer_norm(x, w, b, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_element(dtype: torch.dtype, backend: str):
    for name, weights in (("layer_norm", 2), ("rms_norm", 1)):
        norms = (partial(f, eps=0.5) for f in (ours(name, backend), getattr(reference, name)))
        draws = [[1 + torch.rand(700, 1), *(torch.randn(1) for _ in range(weights))] for _ in range(8)]
        compare_pooled(*norms, draws, dtype)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, shape: tuple[int, ...]):
    x, w = torch.randn(shape), torch.randn(8)
    for name in ("layer_norm", "rms_norm"):
        y, dx, dw = run(ours(name, backend), [x, w])
        assert y.shape == dx.shape == shape and torch.equal(dw, torch.zeros(8))


def only(norm, pick: int, x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    return norm(x, w, residual=residual)[pick] + 0 * w.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use", ["y", "sum"])
def test_either_output_alone(use: str, backend: str):
    x, w, r = torch.randn(5, 8), torch.randn(8), torch.randn(5, 8)
    pick = 0 if use == "y" else 1
    for name in ("layer_norm", "rms_norm"):
        norms = (partial(only, norm, pick) for norm in (ours(name, backend), getattr(reference, name)))
        compare(*norms, [x, r, w], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["every other element", "part of each row"])
@pytest.mark.parametrize("shape", [(), (120,)])
def test_expanded_gradients_and_strided_inputs(shape: tuple[int, ...], view: str, backend: str):
    """As the gradient of a sum is, and as q is within Wqkv's output."""

    def draw(name: str, residual: bool):
        gradient = torch.randn(shape).expand(4, 15, 120)
        base, w = torch.randn(15, 4, 240).transpose(0, 1), torch.randn(240)[::2]
        more = [torch.randn(15, 4, 120).transpose(0, 1)] if residual else []
        x = base[..., ::2] if view == "every other element" else base[..., 120:]
        plain = getattr(reference, name)
        norms = [with_residual(f) if residual else f for f in (ours(name, backend), plain, plain)]
        results = (
            run(norm, [t.to(dtype) for t in (x, *more, w)], [gradient] * (1 + len(more)))
            for norm, dtype in zip(norms, (torch.float32, torch.float32, torch.float64))
        )
        return [(name, *row) for row in zip(*results)]

    for name in ("layer_norm", "rms_norm"):
        for residual in (False, True):
            hold(partial(draw, name, residual))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str):
    """Output in the low dtype from inputs cast to it; the residual stream keeps fp32."""
    x, r, w = (torch.randn(6, 16).bfloat16(), torch.randn(6, 16), torch.randn(16).requires_grad_())
    for which in (backend, "reference"):
        with torch.autocast(x.device.type, torch.bfloat16):
            y, total = kernels.layer_norm(x, w, residual=r, backend=which)
            alone = kernels.layer_norm(total, w, backend=which)
            rms = kernels.rms_norm(total, w, backend=which)
        assert y.dtype == alone.dtype == rms.dtype == torch.bfloat16 and total.dtype == torch.float32
        assert torch.equal(total, x + r) and torch.equal(y, alone)
        torch.testing.assert_close(y, reference.layer_norm(total.bfloat16(), w.bfloat16()))
        assert torch.autograd.grad(y.sum(), w)[0].dtype == torch.float32
    with torch.autocast(x.device.type, torch.bfloat16):
        assert kernels.layer_norm(x.double(), w.double()).dtype == torch.float64
        assert kernels.layer_norm(x, w, residual=r.double())[1].dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [80, 300])
def test_gradients_under_autocast(d: int, backend: str):
    """A bf16 branch joins an fp32 residual stream, whose own gradient is fp32."""

    def mixed(norm):
        def call(*args: Tensor):
            with torch.autocast(args[0].device.type, torch.bfloat16):
                return norm(*args)

        return call

    def draw():
        x, r, w, b = torch.randn(70, d).bfloat16(), torch.randn(70, d), torch.randn(d), torch.randn(d)
        grads = [torch.randn(70, d).bfloat16(), torch.randn(70, d)]
        got, plain = (
            run(mixed(with_residual(ours("layer_norm", which))), [x, r, w, b], grads)
            for which in (backend, "reference")
        )
        low = [t.double() for t in (x, r, w.bfloat16(), b.bfloat16())]
        exact = run(with_residual(reference.layer_norm), low, grads)
        return [(str(i), *tensors) for i, tensors in enumerate(zip(got, plain, exact))]

    hold(draw, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [80, 300])
def test_gradients_are_the_same_every_time(d: int, backend: str):
    inputs = [torch.randn(200, d), torch.randn(d), torch.randn(d)]
    first, second = (run(ours("layer_norm", backend), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize(("rms", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual: bool, rms: bool, dtype: torch.dtype, triton: bool):
    x, w, b, r = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 5, 8), (8,), (8,), (3, 5, 8)))
    args = (x, w, None if rms else b, r if residual else None, 1e-5, rms, triton)
    torch.library.opcheck(torch.ops.mpt.layer_norm, args)
    with torch.no_grad():
        _, total, mean, rstd = torch.ops.mpt.layer_norm(*args)
        given = (torch.randn_like(x), torch.randn_like(x) if residual else None, (total if residual else x).detach())
        weights = (w.detach(), None if rms else b.detach())
        torch.library.opcheck(torch.ops.mpt.layer_norm_backward, (*given, *weights, mean, rstd, rms, triton))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_and_checkpoint(backend: str):
    torch._dynamo.reset()
    x, w, r = (torch.randn(s, requires_grad=True) for s in ((4, 8), (8,), (4, 8)))

    def step(x, w, r):
        y, total = kernels.layer_norm(x, w, residual=r, backend=backend)
        return (y * total).sum()

    expected = torch.autograd.grad(step(x, w, r), (x, w, r))
    checkpointed = partial(torch.utils.checkpoint.checkpoint, step, use_reentrant=False)
    for other in (torch.compile(step, backend="aot_eager", fullgraph=True), checkpointed):
        for got, want in zip(torch.autograd.grad(other(x, w, r), (x, w, r)), expected):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused_by_name(backend: str):
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    (dx,) = torch.autograd.grad(kernels.layer_norm(x, w, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"mpt::layer_norm has no second derivative"):
        dx.sum().backward()


def test_bad_arguments():
    x, w = torch.randn(4, 8), torch.randn(8)
    for norm in (kernels.layer_norm, kernels.rms_norm):
        with pytest.raises(ValueError, match=r"weight is \(7,\)"):
            norm(x, w[:7])
        with pytest.raises(ValueError, match=r"residual is \(3, 8\)"):
            norm(x, w, residual=x[:3])
        for eps in (-1, math.inf, math.nan):
            with pytest.raises(ValueError, match=rf"eps is {eps}; it must be finite and at least 0"):
                norm(x, w, eps=eps)
        with pytest.raises(TypeError, match=r"eps is a tensor; pass a number"):
            norm(x, w, eps=w)
        with pytest.raises(ValueError, match=r"weight is \(\); x is \(\)"):
            norm(x[0, 0], w[0])
        with (
            torch.autocast(x.device.type, torch.bfloat16),
            pytest.raises(TypeError, match=r"weight is torch.int64; use float16"),
        ):
            norm(x, w.long())
        with pytest.raises(TypeError, match=r"mixed dtypes \(x torch.bfloat16, weight torch.float32\)"):
            norm(x.bfloat16(), w)
    with pytest.raises(ValueError, match=r"bias is \(1,\)"):
        kernels.layer_norm(x, w, torch.zeros(1))

"""The Lion step on plain torch and in Triton: the reference, in place, mixed precision, and what it refuses."""

import math
from functools import partial

import pytest
import torch
from device import size

import kernels
from kernels import reference

BACKENDS = ["torch", "triton"]
SHAPES = [(), (1,), (17,), (3, 129), (2, 3, 5), (0, 4), (7, 128)]  # in the interpreter a chunk has 256 elements
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def state(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> list[list[torch.Tensor]]:
    return [[torch.randn(s).to(dtype) for s in SHAPES] for dtype in dtypes]


@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(
    "low, backend", [(torch.float64, "torch"), (F32, "torch"), (BF16, "torch"), (F32, "triton"), (BF16, "triton")]
)
def test_steps_follow_the_reference(low: torch.dtype, backend: str, decay: float):
    params, _, averages = state((low, low, torch.float64 if low == torch.float64 else torch.float32))
    theirs, their_averages = ([t.clone() for t in ts] for ts in (params, averages))
    for _ in range(5):
        grads = [torch.randn(s).to(low) for s in SHAPES]
        before = [g.clone() for g in grads]
        kernels.lion_step(params, grads, averages, lr=0.01, betas=(0.9, 0.99), decay=decay, backend=backend)
        reference.lion_step(theirs, grads, their_averages, lr=0.01, betas=(0.9, 0.99), decay=decay)
        assert all(torch.equal(a, b) for a, b in zip(grads, before))
    for a, b in zip(params + averages, theirs + their_averages):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32), (F32, BF16, F32), (F16, F32, F32)])
def test_triton_gives_the_very_bits_of_plain_torch(dtypes: tuple[torch.dtype, ...]):
    """With numbers whose products need no rounding, as no implementation says whether it fuses a product with a sum.
    Updates that are exactly zero are among them.
    """
    follow_torch_bit_by_bit(SHAPES, dtypes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32), (BF16, BF16, BF16), (F32, BF16, F32)])
@pytest.mark.parametrize("offset", [0, 1])
def test_chunks_of_many_blocks(offset: int, dtypes: tuple[torch.dtype, ...]):
    """Whole blocks, and the rest behind them, which is masked; at addresses that are aligned, and others."""
    follow_torch_bit_by_bit([(size(100_003, 700),), (3,), (size(70_000, 300),), (17, 128)], dtypes, offset)


def follow_torch_bit_by_bit(shapes: list[tuple[int, ...]], dtypes: tuple[torch.dtype, ...], offset: int = 0) -> None:
    """offset: of the tensors from an aligned address, in elements."""

    def placed(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)

    lists = [[placed(torch.randint(-8, 9, s).to(dtype) / 4) for s in shapes] for dtype in dtypes]
    lists[1][-1][0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    copies = [[placed(t) for t in ts] for ts in lists]
    for backend, (params, grads, averages) in (("torch", lists), ("triton", copies)):
        kernels.lion_step(params, grads, averages, lr=0.125, betas=(0.75, 0.875), decay=0.25, backend=backend)
    for ours, theirs in zip(copies, lists):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert copies[2][-1][0, 0].isnan() and not copies[0][-1].isnan().any()


@pytest.mark.parametrize(
    "p, g, m, backend",
    [(F32, F32, BF16, "torch"), (F32, F32, BF16, "reference"), (F32, F32, BF16, "triton")]
    + [(p, g, m, "triton") for p, g, m in ((BF16, BF16, BF16), (BF16, F32, F16), (F16, F16, F16))],
)
def test_low_precision_averages(p: torch.dtype, g: torch.dtype, m: torch.dtype, backend: str):
    """Computed in fp32, so as near to float64 as what is stored allows."""
    params, grads, averages = ([torch.randn(500, 3).to(dtype)] for dtype in (p, g, m))
    exact = [[t.double() for t in ts] for ts in (params, grads, averages)]
    kernels.lion_step(params, grads, averages, lr=0.01, betas=(0.9, 0.99), decay=0.1, backend=backend)
    clear = (0.9 * exact[2][0] + 0.1 * exact[1][0]).abs() > 1e-5  # elsewhere a rounding decides the sign
    reference.lion_step(*exact, lr=0.01, betas=(0.9, 0.99), decay=0.1)
    assert clear.float().mean() > 0.9
    for got, true in ((params[0][clear], exact[0][0][clear]), (averages[0], exact[2][0])):
        assert (got.double() - true).abs().max() <= torch.finfo(got.dtype).eps * true.abs().max()


def test_triton_leaves_the_memory_around_a_tensor_alone():
    """Views into larger memory: not aligned, transposed, with gaps, and empty."""
    base = [torch.randn(40, 33) for _ in range(3)]
    expected = [t.clone() for t in base]
    for backend, tensors in (("triton", base), ("reference", expected)):
        views = [
            [t[0, 1:30], t[1], t[2:12, :16].T, t[12:20, 3:20:2], t[20:20], t[21:39].reshape(-1)[:500]] for t in tensors
        ]
        kernels.lion_step(*views, lr=0.1, betas=(0.9, 0.99), decay=0.1, backend=backend)
    for got, want in zip(base, expected):
        torch.testing.assert_close(got, want)
        assert torch.equal(got[39], want[39]) and torch.equal(got[12:20, 4:20:2], want[12:20, 4:20:2])


def test_float64_beside_others():
    """Triton has none: plain torch takes it, unless Triton was asked for by name."""
    lists = [[torch.randn(5), torch.randn(5).double()] for _ in range(3)]
    with pytest.raises(ValueError, match=r"lion_step cannot run there: .* this is float64"):
        kernels.lion_step(*lists, lr=0.1, betas=(0.9, 0.99), decay=0.1, backend="triton")
    expected = [[t.clone() for t in ts] for ts in lists]
    kernels.lion_step(*lists, lr=0.1, betas=(0.9, 0.99), decay=0.1)
    reference.lion_step(*expected, lr=0.1, betas=(0.9, 0.99), decay=0.1)
    for ours, theirs in zip(lists, expected):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


def test_backends_agree():
    params, grads, averages = state((torch.float32,) * 3)
    copy = [[t.clone() for t in ts] for ts in (params, grads, averages)]
    kernels.lion_step(params, grads, averages, lr=0.1, betas=(0.9, 0.99), decay=0.1)
    kernels.lion_step(*copy, lr=0.1, betas=(0.9, 0.99), decay=0.1, backend="reference")
    for a, b in zip(params + averages, copy[0] + copy[2]):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_update_moves_nothing_and_nothing_to_do_is_fine(backend: str):
    p, zero = torch.ones(3), torch.zeros(3)
    kernels.lion_step([p], [zero], [zero.clone()], lr=0.1, betas=(0.9, 0.99), decay=0.0, backend=backend)
    assert torch.equal(p, torch.ones(3))
    kernels.lion_step([], [], [], lr=0.1, betas=(0.9, 0.99), decay=0.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_require_grad(backend: str):
    p = torch.nn.Parameter(torch.ones(3))
    kernels.lion_step([p], [torch.ones(3)], [torch.zeros(3)], lr=0.1, betas=(0.9, 0.99), decay=0.0, backend=backend)
    torch.testing.assert_close(p.data, torch.full((3,), 0.9))


@pytest.mark.parametrize("triton", [False, True])
def test_opcheck(triton: bool):
    params, grads, averages = state((torch.float32,) * 3)
    torch.library.opcheck(torch.ops.mpt.lion_step, (params, grads, averages, 0.1, 0.9, 0.99, 0.1, triton))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend: str):
    torch._dynamo.reset()
    lists = state((torch.float32,) * 3)
    copies = [[t.clone() for t in ts] for ts in lists]
    step = partial(kernels.lion_step, lr=0.1, betas=(0.9, 0.99), decay=0.1, backend=backend)
    torch.compile(step, backend="aot_eager", fullgraph=True)(*lists)
    step(*copies)
    for got, want in zip(lists, copies):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_bad_arguments():
    p, g, m = torch.ones(3), torch.ones(3), torch.ones(3)
    good = {"lr": 0.1, "betas": (0.9, 0.99), "decay": 0.0}
    with pytest.raises(ValueError, match=r"1 params, 2 grads, 1 exp_avgs"):
        kernels.lion_step([p], [g, g], [m], **good)
    with pytest.raises(ValueError, match=r"number 0 has param \(3,\), grad \(2,\)"):
        kernels.lion_step([p], [g[:2]], [m], **good)
    for bad in ({"lr": -1.0}, {"lr": math.inf}, {"betas": (1.0, 0.99)}, {"betas": (0.9,)}, {"decay": 1.5}):
        with pytest.raises(ValueError, match=r"lr >= 0, two betas in \[0, 1\), decay in \[0, 1\]"):
            kernels.lion_step([p], [g], [m], **(good | bad))
    for triple in ((p, p, m), (p, g, p), (p, g, g)):
        with pytest.raises(ValueError, match=r"number 0 passes one tensor twice"):
            kernels.lion_step(*([t] for t in triple), **good)
    with pytest.raises(TypeError, match=r"number 0 is torch.int64"):
        kernels.lion_step([p.long()], [g], [m], **good)

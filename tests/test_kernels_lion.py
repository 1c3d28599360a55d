"""The Lion step against the reference, in place, in mixed precision, and what it refuses."""

import pytest
import torch

import kernels
from kernels import reference

SHAPES = [(), (1,), (17,), (3, 129), (2, 3, 5)]


def state(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> list[list[torch.Tensor]]:
    return [[torch.randn(s).to(dtype) for s in SHAPES] for dtype in dtypes]


@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("low", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_follow_the_reference(low: torch.dtype, decay: float):
    params, _, averages = state((low, low, torch.float64 if low == torch.float64 else torch.float32))
    theirs, their_averages = ([t.clone() for t in ts] for ts in (params, averages))
    for _ in range(5):
        grads = [torch.randn(s).to(low) for s in SHAPES]
        before = [g.clone() for g in grads]
        kernels.lion_step(params, grads, averages, lr=0.01, betas=(0.9, 0.99), decay=decay)
        reference.lion_step(theirs, grads, their_averages, lr=0.01, betas=(0.9, 0.99), decay=decay)
        assert all(torch.equal(a, b) for a, b in zip(grads, before))
    for a, b in zip(params + averages, theirs + their_averages):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_backends_agree():
    params, grads, averages = state((torch.float32,) * 3)
    copy = [[t.clone() for t in ts] for ts in (params, grads, averages)]
    kernels.lion_step(params, grads, averages, lr=0.1, betas=(0.9, 0.99), decay=0.1)
    kernels.lion_step(*copy, lr=0.1, betas=(0.9, 0.99), decay=0.1, backend="reference")
    for a, b in zip(params + averages, copy[0] + copy[2]):
        torch.testing.assert_close(a, b)


def test_a_zero_update_moves_nothing_and_nothing_to_do_is_fine():
    p, zero = torch.ones(3), torch.zeros(3)
    kernels.lion_step([p], [zero], [zero.clone()], lr=0.1, betas=(0.9, 0.99), decay=0.0)
    assert torch.equal(p, torch.ones(3))
    kernels.lion_step([], [], [], lr=0.1, betas=(0.9, 0.99), decay=0.0)


def test_parameters_that_require_grad():
    p = torch.nn.Parameter(torch.ones(3))
    kernels.lion_step([p], [torch.ones(3)], [torch.zeros(3)], lr=0.1, betas=(0.9, 0.99), decay=0.0)
    torch.testing.assert_close(p.data, torch.full((3,), 0.9))


def test_opcheck():
    params, grads, averages = state((torch.float32,) * 3)
    torch.library.opcheck(torch.ops.mpt.lion_step, (params, grads, averages, 0.1, 0.9, 0.99, 0.1))


def test_bad_arguments():
    p, g, m = torch.ones(3), torch.ones(3), torch.ones(3)
    good = {"lr": 0.1, "betas": (0.9, 0.99), "decay": 0.0}
    with pytest.raises(ValueError, match=r"1 params, 2 grads, 1 exp_avgs"):
        kernels.lion_step([p], [g, g], [m], **good)
    with pytest.raises(ValueError, match=r"number 0 has param \(3,\), grad \(2,\)"):
        kernels.lion_step([p], [g[:2]], [m], **good)
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.99)}, {"decay": 1.5}):
        with pytest.raises(ValueError, match=r"lr >= 0, betas in \[0, 1\), decay in \[0, 1\]"):
            kernels.lion_step([p], [g], [m], **(good | bad))
    with pytest.raises(TypeError, match=r"number 0 is torch.int64"):
        kernels.lion_step([p.long()], [g], [m], **good)

"""The error rule of the kernels' tests: it passes what rounds like plain torch, and nothing that is worse."""

import pytest
import torch
from tolerance import compare, hold
from torch import Tensor


def plain(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def off_by(parts: float):
    """plain, and an error of so many eps of the largest output in one number."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        out = plain(x, y)
        wrong = torch.zeros_like(out)
        wrong[3] = parts * torch.finfo(out.dtype).eps * out.detach().abs().max()
        return out + wrong

    return function


def inputs() -> list[Tensor]:
    return [torch.randn(20, 8), torch.randn(20, 8)]


def test_another_order_of_summation_passes():
    def reversed_(x: Tensor, y: Tensor) -> Tensor:
        return plain(x.flip(-1), y.flip(-1))

    for _ in range(100):
        compare(reversed_, plain, inputs(), torch.float32)


@pytest.mark.parametrize("parts", [6, 100])
def test_a_steady_excess_fails_small_or_large(parts: float):
    with pytest.raises(AssertionError, match="output 0: error"):
        compare(off_by(parts), plain, inputs(), torch.float32)


def test_a_rare_excess_passes_only_while_it_is_small():
    one, zero = torch.ones(4), torch.zeros(4)
    eps = torch.finfo(torch.float32).eps
    small, large = iter([3 * eps, *[zero] * 4]), iter([5 * eps, *[zero] * 4])
    hold(lambda: [("x", one + next(small), one, one)])
    with pytest.raises(AssertionError, match="x: error"):
        hold(lambda: [("x", one + next(large), one, one)])


def test_shapes_infinities_and_nan_are_told_apart():
    one = torch.ones(4)
    for got, message in ((one[:3], "shape"), (one / 0, "not finite"), (one * torch.nan, "not finite")):
        with pytest.raises(AssertionError, match=message):
            hold(lambda got=got: [("x", got, one, one)])
    with pytest.raises(AssertionError, match="infinities differ"):
        hold(lambda: [("x", one, one / 0, one / 0)])

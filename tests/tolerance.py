"""The one error rule of the kernels' tests: no guessed tolerances.

max|err| <= 2 * max|err of plain torch in the same dtype, same input| + 2 * eps(dtype) * max|exact|, exact being the
reference run in float64.

Both maxima hang on a few numbers, those that happen to round worst, so that one draw in some hundreds breaks the rule
without a fault. A close call, up to twice the bound, is therefore decided by the median over more draws of the random
numbers. Anything larger fails at once.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DRAWS = 4  # more draws that decide a close call
Row = tuple[str, Tensor, Tensor, Tensor]  # a name, what was computed, the same by plain torch, and exactly


def assert_close(name: str, got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    """Hold `got` to the rule by one draw; `dtype` where the working precision is not that of `got`."""
    ratio, text = _excess(name, got, plain, exact, dtype)
    assert ratio <= 1, text


def _excess(
    name: str, got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype | float | None = None
) -> tuple[float, str]:
    """The error over what the rule allows, and both in words. AssertionError where `got` is of another shape, not
    finite where `exact` is, or has other infinities.
    """
    got, plain, exact = got.detach(), plain.detach(), exact.detach().double()
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    infinite = exact.isinf()
    assert torch.equal(got.double()[infinite], exact[infinite]), f"{name}: infinities differ"
    finite = ~infinite
    assert got[finite].isfinite().all(), f"{name}: not finite where the exact one is"
    error, usual = ((t.double() - exact)[finite].abs() for t in (got, plain))
    if error.numel() == 0:
        return 0.0, ""
    eps = dtype if isinstance(dtype, float) else torch.finfo(dtype or got.dtype).eps
    bound = 2 * usual.max() + 2 * eps * exact[finite].abs().max()
    ratio = float(error.max() / bound) if error.max() > 0 else 0.0
    return ratio, f"{name}: error {error.max():.3e}, bound {bound:.3e} (plain torch {usual.max():.3e})"


def run(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The outputs of function(*inputs), then the gradient of each floating input, for the given gradients of the
    outputs (or ones).

    Inputs are detached first; None stays None and gets no gradient.
    """
    leaves = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    given = [torch.ones_like(t) for t in outputs] if grads is None else [g.to(t.dtype) for g, t in zip(grads, outputs)]
    return outputs + list(torch.autograd.grad(outputs, wanted, given))


def compare(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    eps: float | None = None,
) -> None:
    """Hold outputs and every gradient of `function` in `dtype` to `reference`, run in float64 and, as plain torch, in
    `dtype`. More draws are the same inputs, each number changed by about 1 %. eps: where products round more coarsely
    than `dtype`.
    """
    given: list[Sequence[Tensor | None]] = [inputs]

    def draw() -> list[Row]:
        rows = _rows(function, reference, given[0], dtype)
        given[0] = [
            t * (1 + 0.01 * torch.randn_like(t)) if t is not None and t.is_floating_point() else t for t in inputs
        ]
        return rows

    hold(draw, eps or dtype)


def compare_pooled(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    draws: Sequence[Sequence[Tensor | None]],
    dtype: torch.dtype,
) -> None:
    """As `compare`, for inputs that are small by intent: the numbers of many such draws are held to the rule as if they
    were one tensor's.
    """

    def draw() -> list[Row]:
        found = []
        for same in zip(*(_rows(function, reference, inputs, dtype) for inputs in draws)):
            for name, got, _, exact in same:
                assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
            parts = (torch.cat([row[i].detach().flatten() for row in same]) for i in (1, 2, 3))
            found.append((same[0][0], *parts))
        return found

    hold(draw, dtype)


def hold(draw: Callable[[], Sequence[Row]], dtype: torch.dtype | float | None = None) -> None:
    """Hold each row of draw() to the rule; called again, it has to give the same rows for other random numbers. dtype:
    the working precision, or its eps, where that is not the result's.
    """
    first = [_excess(*row, dtype) for row in draw()]
    close = [i for i, (ratio, _) in enumerate(first) if ratio > 1]
    for i in close:
        assert first[i][0] <= 2, first[i][1]
    if not close:
        return
    draws = [first, *([_excess(*row, dtype) for row in draw()] for _ in range(DRAWS))]
    for i in close:
        ratios = [ratios[i][0] for ratios in draws]
        listed = " ".join(f"{ratio:.2f}" for ratio in ratios)
        assert statistics.median(ratios) <= 1, f"{first[i][1]}; error over bound in {len(draws)} draws: {listed}"


def _rows(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Row]:
    """Outputs and gradients, the outputs' own gradients being drawn here."""
    low = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs]
    high = [t.double() if t is not None and t.is_floating_point() else t for t in low]
    shapes = reference(*low)
    outputs = [shapes] if isinstance(shapes, Tensor) else list(shapes)
    grads = [torch.randn(t.shape).to(dtype) for t in outputs]
    exact = run(reference, high, grads)
    names = [f"output {i}" if i < len(outputs) else f"gradient {i - len(outputs)}" for i in range(len(exact))]
    return list(zip(names, run(function, low, grads), run(reference, low, grads), exact))

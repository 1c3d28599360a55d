"""The one error rule of the kernels' tests: no guessed tolerances.

max|err| <= 2 * max|err of plain torch in the same dtype, same input| + 2 * eps(dtype) * max|exact|, exact being the
reference run in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_close(name: str, got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    """Hold `got` to the rule; `dtype` where the working precision is not that of `got`. Infinities must be the same
    ones.
    """
    got, plain, exact = got.detach(), plain.detach(), exact.detach().double()
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    infinite = exact.isinf()
    assert torch.equal(got.double()[infinite], exact[infinite]), f"{name}: infinities differ"
    finite = ~infinite
    assert got[finite].isfinite().all(), f"{name}: not finite where the exact one is"
    error, usual = ((t.double() - exact)[finite].abs() for t in (got, plain))
    if error.numel() == 0:
        return
    eps = torch.finfo(dtype or got.dtype).eps
    bound = 2 * usual.max() + 2 * eps * exact[finite].abs().max()
    assert error.max() <= bound, f"{name}: error {error.max():.3e}, bound {bound:.3e} (plain torch {usual.max():.3e})"


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
    function: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Tensor | None], dtype: torch.dtype
) -> None:
    """Hold outputs and every gradient of `function` in `dtype` to `reference`, run in float64 and, as plain torch, in
    `dtype`.
    """
    low = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs]
    high = [t.double() if t is not None and t.is_floating_point() else t for t in low]
    shapes = reference(*low)
    outputs = [shapes] if isinstance(shapes, Tensor) else list(shapes)
    grads = [torch.randn(t.shape).to(dtype) for t in outputs]
    exact = run(reference, high, grads)
    for i, (got, plain, true) in enumerate(zip(run(function, low, grads), run(reference, low, grads), exact)):
        assert_close(f"output {i}" if i < len(outputs) else f"gradient {i - len(outputs)}", got, plain, true, dtype)

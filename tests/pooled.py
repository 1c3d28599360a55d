"""The error rule on several independent draws together.

A maximum over few numbers is a lottery: where an input is small by intent, many such inputs are drawn, and the numbers
of all are held to the rule as if they were one tensor's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tolerance import assert_close, run
from torch import Tensor


def compare_pooled(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    draws: Sequence[Sequence[Tensor | None]],
    dtype: torch.dtype,
) -> None:
    """As tolerance.compare, for functions of one output."""
    got, plain, exact = [], [], []
    for inputs in draws:
        low = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs]
        high = [t.double() if t is not None and t.is_floating_point() else t for t in low]
        grads = [torch.randn(reference(*low).shape).to(dtype)]
        got.append(run(function, low, grads))
        plain.append(run(reference, low, grads))
        exact.append(run(reference, high, grads))
        assert [t.shape for t in got[-1]] == [t.shape for t in exact[-1]]
    for i in range(len(exact[0])):
        rows = (torch.cat([each[i].detach().flatten() for each in part]) for part in (got, plain, exact))
        assert_close(f"gradient {i - 1}" if i else "output", *rows, dtype)

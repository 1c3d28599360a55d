"""The mended interpreter computes what a GPU would: bf16 casts that round, dots in fp32, no other bf16 arithmetic."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.interpreter


@triton.jit
def _cast_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def _dot_kernel(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


@triton.jit
def _add_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i))


@triton.jit
def _sum_kernel(x, y, N: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, N)), 0))


@triton.jit
def _range_kernel(n, y):
    total = 0
    for i in range(tl.load(n)):
        total += i
    tl.store(y, total)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(to: torch.dtype):
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8, 3e38])
    x = torch.cat([torch.randn(1016) * torch.exp(torch.randn(1016)), special])
    low, back = torch.empty(1024, dtype=to), torch.empty(1024)
    _cast_kernel[(1,)](x, low, 1024)
    torch.testing.assert_close(low, x.to(to), rtol=0, atol=0, equal_nan=True)
    _cast_kernel[(1,)](low, back, 1024)
    torch.testing.assert_close(back, low.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dots_are_in_fp32(dtype: torch.dtype):
    a, b, c = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, c, 32)
    torch.testing.assert_close(c, a.float() @ b.float())


@pytest.mark.parametrize("kernel", [_add_kernel, _sum_kernel])
def test_other_arithmetic_on_bf16_is_refused(kernel):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="cast to fp32 first"):
        kernel[(1,)](x, torch.empty_like(x), 16)


def test_tensors_bound_ranges():
    n, y = torch.tensor([7], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _range_kernel[(1,)](n, y)
    assert int(y) == 21

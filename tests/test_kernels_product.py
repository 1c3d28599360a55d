"""The matrix product: fp32 accuracy whatever the library, shape and strides."""

import pytest
import torch
from tolerance import Row, hold

from kernels.product import _rounded, mkl_at_its_best, product

pytestmark = pytest.mark.cpu("elsewhere it is torch.mm")


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (1, 7, 3),
        (65, 129, 33),
        (128, 640, 96),
        (130, 2500, 70),
        (40, 9000, 33),
        (9, 600, 7001),
        (1, 640, 1000),
        (3, 768, 2002),
        (4, 513, 577),
        (1, 2500, 900),
        (3, 2500, 900),
        (7, 2500, 900),
        (16, 8000, 90),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_product_is_as_exact_as_torch(m: int, k: int, n: int, dtype: torch.dtype, layout: str) -> None:
    """Where MKL is not at its best, up to 16 rows as exact as torch's product of each row alone."""
    alone = m <= 16 and not mkl_at_its_best()

    def make(rows: int) -> torch.Tensor:
        if layout == "columns":
            return torch.randn(k, rows).to(dtype).mT
        return torch.randn(rows, 2 * k).to(dtype)[:, ::2] if layout == "strided" else torch.randn(rows, k).to(dtype)

    def draw() -> list[Row]:
        a, b = make(m), make(n)
        ours = product(a, b)
        assert ours.dtype == dtype and ours.shape == (m, n) and ours.is_contiguous()
        theirs = torch.cat([torch.mm(few, b.mT) for few in a.split(1 if alone else m)])
        return [("product", ours, theirs, a.double() @ b.double().mT)]

    hold(draw)


def test_few_shapes_occur() -> None:
    """Of 4,096 numbers of rows, with little added to any."""
    rounded = [_rounded(rows) for rows in range(1, 4097)]
    assert all(rows <= up <= rows + min(64, max(1, rows / 8)) for rows, up in enumerate(rounded, 1))
    assert len(set(rounded)) < 120

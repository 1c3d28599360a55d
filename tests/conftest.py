"""What every test shares: one seed for the session, printed so that a failure can be repeated, and where kernels run.

Triton kernels run in Triton's interpreter on the CPU. With MPT_TEST_DEVICE=cuda (`make test-gpu`) the tests of kernels
run compiled on a GPU instead: their tensors are then made there. What means something on one of them only is marked
`cpu` or `gpu`.
"""

import os
import sys
from collections.abc import Callable, Iterator

import hypothesis
import pytest
from device import DEVICE

if DEVICE == "cpu":
    # Triton decides at a kernel's definition whether it is interpreted.
    assert "triton" not in sys.modules, "triton was imported before tests/conftest.py could ask for its interpreter"
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # The tests ask for deterministic algorithms; torch then refuses every cuBLAS product without this.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

torch.backends.cuda.matmul.fp32_precision = "ieee"  # so that kernels multiply exactly too

SEED = int(os.environ.get("MPT_TEST_SEED", torch.seed() % 2**31))


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE == "cpu":
        import interpreter

        interpreter.mend()


def pytest_report_header(config: pytest.Config) -> str:
    return f"torch {torch.__version__}, kernels on {DEVICE}, seed {SEED} (repeat with MPT_TEST_SEED={SEED})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = "gpu" in config.option.markexpr  # -m gpu runs them here as well, at small sizes
    for item in items:
        if isinstance(item, pytest.Function) and getattr(item.obj, "is_hypothesis_test", False):
            hypothesis.seed(SEED)(item.obj)  # what it draws repeats too
        if DEVICE != "cpu" and item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason="about Triton's interpreter, which is off on a GPU"))
        if DEVICE != "cpu" and (mark := item.get_closest_marker("cpu")):
            item.add_marker(pytest.mark.skip(reason=f"only on a CPU: {mark.args[0]}"))
        if DEVICE == "cpu" and item.get_closest_marker("gpu") and not asked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(SEED)
    if request.path.name.startswith("test_kernels_"):
        with torch.device(DEVICE):
            yield
    else:
        yield


@pytest.fixture
def multiply_fp32() -> Iterator[Callable[[str], None]]:
    """Tells torch how a GPU multiplies fp32: "ieee", "tf32", or "none" as where nobody says."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda precision: setattr(matmul, "fp32_precision", precision)
    matmul.fp32_precision = before


@pytest.fixture
def generator() -> torch.Generator:
    """A generator seeded for this session; the header says with what."""
    return torch.Generator().manual_seed(SEED)

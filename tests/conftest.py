"""What every test shares: one seed for the session, printed so that a failure can be repeated, and where kernels run.

Triton kernels run in Triton's interpreter on the CPU. With MPT_TEST_DEVICE=cuda (`make test-gpu`) the tests of kernels
run compiled on a GPU instead: their tensors are then made there.
"""

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest

DEVICE = os.environ.get("MPT_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    # Triton decides at a kernel's definition whether it is interpreted.
    assert "triton" not in sys.modules, "triton was imported before tests/conftest.py could ask for its interpreter"
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

torch.backends.cuda.matmul.fp32_precision = "ieee"  # so that kernels multiply exactly too

SEED = int(os.environ.get("MPT_TEST_SEED", torch.seed() % 2**31))


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE == "cpu":
        import interpreter

        interpreter.mend()


def pytest_report_header(config: pytest.Config) -> str:
    return f"torch {torch.__version__}, kernels on {DEVICE}, seed {SEED} (repeat with MPT_TEST_SEED={SEED})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and getattr(item.obj, "is_hypothesis_test", False):
            hypothesis.seed(SEED)(item.obj)  # what it draws repeats too
        if DEVICE != "cpu" and item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason="about Triton's interpreter, which is off on a GPU"))


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(SEED)
    if request.path.name.startswith("test_kernels_"):
        with torch.device(DEVICE):
            yield
    else:
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """A generator seeded for this session; the header says with what."""
    return torch.Generator().manual_seed(SEED)

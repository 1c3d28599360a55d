"""What every test shares: one seed for the session, printed so that a failure can be repeated."""

import os

import pytest
import torch

SEED = int(os.environ.get("MPT_TEST_SEED", torch.seed() % 2**31))


def pytest_report_header(config: pytest.Config) -> str:
    return f"torch {torch.__version__}, seed {SEED} (repeat with MPT_TEST_SEED={SEED})"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(SEED)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator seeded for this session; the header says with what."""
    return torch.Generator().manual_seed(SEED)

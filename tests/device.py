"""Where the tests of kernels run: compiled on a GPU (MPT_TEST_DEVICE=cuda), or in Triton's interpreter on the CPU."""

import os
from typing import TypeVar

DEVICE = os.environ.get("MPT_TEST_DEVICE", "cpu")
Size = TypeVar("Size")


def size(on_gpu: Size, interpreted: Size) -> Size:
    """How large a test marked `gpu` is: as in training, or so small that the interpreter shows that its code is right
    (`pytest -m gpu`).
    """
    return interpreted if DEVICE == "cpu" else on_gpu

"""Ahead-of-time compilation of the Triton kernels, without a GPU, and the report of what they use."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel as it is shipped for one architecture: with one dtype, one tile, one set of options.

    Each file of kernels has `variants(architecture)`, which lists its own. op: of kernels' public functions. label: the
    kernel and its tile in words. kernel: the @triton.jit function. signature: Triton's type of each argument that is
    no constexpr ("*bf16", "i32", "fp32", "tensordesc<bf16[1,1,64,128]>"). constants: values of the constexprs.
    divisible: names of the arguments known to be multiples of 16 (pointers, strides): the JIT specialises on that.
    scores: score elements per iteration of the inner loop of the whole program (BLOCK_M * BLOCK_N), for kernels that
    have one.
    """

    op: str
    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    scores: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

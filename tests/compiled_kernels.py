"""Small kernels for the tests of ahead-of-time compilation: each shows one thing that the report must see."""

from typing import Any

import triton
import triton.language as tl

from kernels.compile import Variant


@triton.jit(do_not_specialize=("scale",))
def _attend_kernel(Q, K, V, O, S, scale, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One head, no mask; S a multiple of the tile."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    q = tl.load(Q + offs_m[:, None] * D + offs_d[None, :])
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for n0 in range(0, S, BLOCK_N):
        at = (n0 + offs_n)[:, None] * D + offs_d[None, :]
        s = tl.dot(q, tl.load(K + at).T, input_precision="ieee") * scale
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        shrink = tl.exp2(m_i - m_new)
        l_i = l_i * shrink + tl.sum(p, 1)
        v = tl.load(V + at)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new
    tl.store(O + offs_m[:, None] * D + offs_d[None, :], (acc / l_i[:, None]).to(O.dtype.element_ty))


@triton.jit
def _multiply_kernel(A, B, C, K, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """C (D, D) = A (D, K) @ B (K, D), both read through TMA descriptors."""
    acc = tl.zeros((D, D), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        acc = tl.dot(A.load([0, k0]), B.load([k0, 0]), acc)
    tl.store(C + tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :], acc)


@triton.jit
def _sum_kernel(X, Y, N, BLOCK: tl.constexpr):
    """No matrices: a loop and a sum."""
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, N, BLOCK):
        total += tl.load(X + i + tl.arange(0, BLOCK), mask=i + tl.arange(0, BLOCK) < N, other=0.0)
    tl.store(Y + tl.arange(0, 1), tl.sum(total, 0))


def attend(label: str, block_n: int, d: int = 64, **changes: Any) -> Variant:
    """128 queries and a tile of keys, by 4 warps."""
    given: dict[str, Any] = {
        "op": "attend",
        "label": label,
        "kernel": _attend_kernel,
        "signature": dict.fromkeys("QKVO", "*bf16") | {"S": "i32", "scale": "fp32"},
        "constants": {"D": d, "BLOCK_M": 128, "BLOCK_N": block_n},
        "divisible": ("Q", "K", "V", "O", "S"),
        "num_warps": 4,
        "num_stages": 2,
        "scores": 128 * block_n,
        "options": {"enable_fp_fusion": True},
    }
    return Variant(**given | changes)


def variants(architecture: str) -> list[Variant]:
    amd = architecture.startswith("gfx")
    tile = 32 if amd else 64
    few_registers = {"waves_per_eu": 8} if amd else {"maxnreg": 64}
    squeezed: dict[str, Any] = {"options": few_registers | {"enable_fp_fusion": True}}
    found = [attend("fits", tile, no_spill=True), attend("spills", tile, **squeezed)]
    found.append(attend("spills and must not", tile, no_spill=True, **squeezed))
    found.append(
        Variant("sum", "sum", _sum_kernel, {"X": "*fp32", "Y": "*fp32", "N": "i32"}, {"BLOCK": 1024}, ("X", "Y"), 4, 1)
    )
    found.append(attend("misspelled", tile, options={"num_ctaz": 1}))
    if architecture in ("sm_90", "sm_100"):
        signature = {"A": "tensordesc<bf16[128,64]>", "B": "tensordesc<bf16[64,128]>", "C": "*fp32", "K": "i32"}
        for label, stages in (("three stages", 3), ("nine stages", 9)):
            constants = {"D": 128, "BLOCK_K": 64}
            found.append(Variant("tma", label, _multiply_kernel, signature, constants, ("C", "K"), 4, stages))
    return found

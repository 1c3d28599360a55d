"""The Lion step (Chen et al. 2023, arXiv 2302.06675) with decoupled weight decay, in place, over lists of tensors.

    p *= 1 - decay;  p -= lr * sign(b1*m + (1-b1)*g);  m = b2*m + (1-b2)*g;  sign(0) = sign(NaN) = 0

On plain torch the arithmetic is in the wider dtype of p and m, so fp32 averages serve bf16 parameters and gradients,
and bf16 averages (half the memory, each rounded once a step) leave fp32 parameters as exact as they were. The kernel
always computes in fp32, and with fp32 averages rounds where torch does; it reads and writes each tensor once, in one
launch for all tensors of the same dtypes.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.backend import FLOATS, TRITON_ARCHITECTURES, architecture, check_tensors, choose, on_device
from kernels.compile import Variant

# ---- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit
def _update(p, g, m, mask, lr, beta1, rest1, beta2, rest2, keep):  # type: ignore[no-untyped-def]
    """One block, at pointers p, g, m."""
    g_new = tl.load(g, mask).to(tl.float32)
    m_old = tl.load(m, mask).to(tl.float32)
    p_old = tl.load(p, mask).to(tl.float32)
    direction = tl.fma(g_new, rest1, m_old * beta1)
    sign = (direction > 0).to(tl.float32) - (direction < 0).to(tl.float32)
    tl.store(p, (p_old * keep - lr * sign).to(p.dtype.element_ty), mask)
    tl.store(m, tl.fma(g_new, rest2, m_old * beta2).to(m.dtype.element_ty), mask)


@triton.jit
def _lion_step_kernel(  # type: ignore[no-untyped-def]
    TENSORS, CHUNKS, lr, beta1, rest1, beta2, rest2, keep,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, M_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of CHUNK elements of one tensor. TENSORS (n, 4) int64: addresses of p, g and m, number of elements;
    ALIGNED: the addresses are multiples of 16. CHUNKS (programs, 2) int32: which tensor, and which chunk of it.
    """
    tensor = TENSORS + 4 * tl.load(CHUNKS + 2 * tl.program_id(0))
    start = CHUNK * tl.load(CHUNKS + 2 * tl.program_id(0) + 1).to(tl.int64)
    p = tl.load(tensor).to(tl.pointer_type(P_TYPE))
    g = tl.load(tensor + 1).to(tl.pointer_type(G_TYPE))
    m = tl.load(tensor + 2).to(tl.pointer_type(M_TYPE))
    if ALIGNED:
        p, g, m = tl.multiple_of(p, 16), tl.multiple_of(g, 16), tl.multiple_of(m, 16)
    p, g, m = p + start, g + start, m + start
    size = tl.minimum(tl.load(tensor + 3) - start, CHUNK).to(tl.int32)
    whole = size // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        _update(p + offs, g + offs, m + offs, None, lr, beta1, rest1, beta2, rest2, keep)
    if whole < size:
        offs = whole + tl.arange(0, BLOCK)
        _update(p + offs, g + offs, m + offs, offs < size, lr, beta1, rest1, beta2, rest2, keep)


# ---- launcher --------------------------------------------------------------------------------------------------------

_GPU = {"CHUNK": 32768, "BLOCK": 2048}
_TILES = dict.fromkeys(TRITON_ARCHITECTURES, _GPU) | {"interpreter": {"CHUNK": 256, "BLOCK": 64}}
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _lion_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
) -> None:
    """One launch per device, dtypes and alignment; what is not contiguous is copied, and copied back."""
    groups: dict[tuple[torch.device, tuple[torch.dtype, ...], bool], list[list[Tensor]]] = {}
    changed: list[tuple[Tensor, Tensor]] = []
    for given in zip(params, grads, exp_avgs):
        if given[0].numel() == 0:
            continue
        triple = [t.contiguous() for t in given]
        changed += [(given[i], triple[i]) for i in (0, 2) if triple[i] is not given[i]]
        aligned = all(t.data_ptr() % 16 == 0 for t in triple)
        groups.setdefault((given[0].device, tuple(t.dtype for t in triple), aligned), []).append(triple)
    for (device, dtypes, aligned), triples in groups.items():
        tile = _TILES[architecture(device)]
        sizes = tuple(triple[0].numel() for triple in triples)
        addresses = [[*(t.data_ptr() for t in triple), size] for triple, size in zip(triples, sizes)]
        chunks = _chunks(sizes, tile["CHUNK"], device)
        with on_device(triples[0][0]):
            _lion_step_kernel[(len(chunks),)](
                _table(addresses, torch.int64, device),
                chunks,
                *(lr, beta1, 1 - beta1, beta2, 1 - beta2, 1 - decay),
                *(_TYPES[dtype] for dtype in dtypes),
                aligned,
                **tile,
                num_warps=4,
                num_stages=1,
                enable_fp_fusion=False,  # p * keep is rounded before lr is taken off it, as torch does
            )
    for old, new in changed:
        old.copy_(new)


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """CHUNKS for tensors of these sizes; the same at every step."""
    return _table(
        [[i, j] for i, size in enumerate(sizes) for j in range(triton.cdiv(size, chunk))], torch.int32, device
    )


def _table(rows: list[list[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of numbers on a device, without waiting for it."""
    table = torch.tensor(rows, dtype=dtype, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def variants(architecture: str) -> list[Variant]:
    """Parameters, gradients and averages in fp32, and in bf16 with fp32 averages or none."""
    tile = _TILES[architecture]
    found = []
    for p, g, m in (("fp32",) * 3, ("bf16", "bf16", "fp32"), ("bf16",) * 3, ("fp32", "bf16", "fp32")):
        types = {
            name: tl.bfloat16 if t == "bf16" else tl.float32
            for name, t in zip(("P_TYPE", "G_TYPE", "M_TYPE"), (p, g, m))
        }
        signature = {"TENSORS": "*i64", "CHUNKS": "*i32"}
        signature |= dict.fromkeys(("lr", "beta1", "rest1", "beta2", "rest2", "keep"), "fp32")
        found.append(
            Variant(
                op="lion_step",
                label=f"_lion_step_kernel {p} {g} {m}",
                kernel=_lion_step_kernel,
                signature=signature,
                constants={**types, "ALIGNED": True, **tile},
                divisible=("TENSORS", "CHUNKS"),
                num_warps=4,
                num_stages=1,
                options={"enable_fp_fusion": False},
            )
        )
    return found


# ---- the boundary ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("mpt::lion_step", mutates_args=("params", "exp_avgs"))
def _op(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
    triton: bool,
) -> None:
    if triton:
        return _lion_step(params, grads, exp_avgs, lr, beta1, beta2, decay)
    # itself where the dtypes agree
    wide_m = [m.to(torch.promote_types(p.dtype, m.dtype)) for p, m in zip(params, exp_avgs)]
    wide = [p.to(m.dtype) for p, m in zip(params, wide_m)]
    grads = [g.to(m.dtype) for g, m in zip(grads, wide_m)]
    updates = torch._foreach_mul(wide_m, beta1)
    torch._foreach_add_(updates, grads, alpha=1 - beta1)
    torch._foreach_sign_(updates)
    torch._foreach_mul_(wide, 1 - decay)
    torch._foreach_add_(wide, updates, alpha=-lr)
    torch._foreach_copy_(params, wide)
    torch._foreach_mul_(wide_m, beta2)
    torch._foreach_add_(wide_m, grads, alpha=1 - beta2)
    torch._foreach_copy_(exp_avgs, wide_m)


@_op.register_fake
def _(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
    triton: bool,
) -> None:
    return None


@torch.no_grad()
def lion_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    decay: float,
    backend: str | None = None,
) -> None:
    """One Lion step on every parameter, in place; params and exp_avgs change, grads do not.

    Three sequences of equal length, tensor by tensor of one shape and device, floating dtypes (those of a triple may
    differ). lr >= 0, each of betas in [0, 1), decay in [0, 1]: the factor's complement, so decoupled decay passes
    lr/lr_initial * weight_decay. ValueError, TypeError otherwise; DTensors are refused: pass their local parts.
    """
    if not len(params) == len(grads) == len(exp_avgs):
        raise ValueError(
            f"lion_step: {len(params)} params, {len(grads)} grads, {len(exp_avgs)} exp_avgs; pass as many of each"
        )
    if not (0 <= lr < math.inf and 0 <= decay <= 1 and len(betas) == 2 and all(0 <= b < 1 for b in betas)):
        raise ValueError(
            f"lion_step: lr {lr}, betas {betas}, decay {decay}; lr >= 0, two betas in [0, 1), decay in [0, 1]"
        )
    for i, (p, g, m) in enumerate(zip(params, grads, exp_avgs)):
        check_tensors("lion_step", **{f"params[{i}]": p, f"grads[{i}]": g, f"exp_avgs[{i}]": m})
        if not p.shape == g.shape == m.shape:
            raise ValueError(
                f"lion_step: number {i} has param {tuple(p.shape)}, grad {tuple(g.shape)}, "
                f"exp_avg {tuple(m.shape)}; give all one shape"
            )
        if m is p or g is p or g is m:
            raise ValueError(f"lion_step: number {i} passes one tensor twice; param, grad and exp_avg are three")
        if any(t.dtype not in FLOATS for t in (p, g, m)):
            raise TypeError(f"lion_step: number {i} is {p.dtype}, {g.dtype}, {m.dtype}; pass floating tensors")
    groups: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for triple in zip(params, grads, exp_avgs):
        widest = next((t for t in triple if t.dtype == torch.float64), triple[0])
        groups.setdefault(choose("lion_step", widest, backend), []).append(triple)
    for which, triples in groups.items():
        lists = [list(tensors) for tensors in zip(*triples)]
        if which == "reference":
            reference.lion_step(*lists, lr=lr, betas=betas, decay=decay)
        else:
            _op(*lists, float(lr), *map(float, betas), float(decay), which == "triton")

"""The Lion step (Chen et al. 2023, arXiv 2302.06675) with decoupled weight decay, in place, over lists of tensors.

    p *= 1 - decay;  p -= lr * sign(b1*m + (1-b1)*g);  m = b2*m + (1-b2)*g

The moving average m decides the arithmetic's dtype, so fp32 averages serve bf16 parameters and gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.backend import FLOATS, check_tensors, choose


@torch.library.custom_op("mpt::lion_step", mutates_args=("params", "exp_avgs"))
def _op(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
) -> None:
    grads = [g.to(m.dtype) for g, m in zip(grads, exp_avgs)]
    updates = torch._foreach_mul(exp_avgs, beta1)
    torch._foreach_add_(updates, grads, alpha=1 - beta1)
    torch._foreach_sign_(updates)
    wide = [p.to(m.dtype) for p, m in zip(params, exp_avgs)]  # itself where the dtypes agree
    torch._foreach_mul_(wide, 1 - decay)
    torch._foreach_add_(wide, updates, alpha=-lr)
    torch._foreach_copy_(params, wide)
    torch._foreach_mul_(exp_avgs, beta2)
    torch._foreach_add_(exp_avgs, grads, alpha=1 - beta2)


@_op.register_fake
def _(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
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
    if not (lr >= 0 and 0 <= decay <= 1 and all(0 <= b < 1 for b in betas)):
        raise ValueError(f"lion_step: lr {lr}, betas {betas}, decay {decay}; lr >= 0, betas in [0, 1), decay in [0, 1]")
    for i, (p, g, m) in enumerate(zip(params, grads, exp_avgs)):
        check_tensors("lion_step", **{f"params[{i}]": p, f"grads[{i}]": g, f"exp_avgs[{i}]": m})
        if not p.shape == g.shape == m.shape:
            raise ValueError(
                f"lion_step: number {i} has param {tuple(p.shape)}, grad {tuple(g.shape)}, "
                f"exp_avg {tuple(m.shape)}; give all one shape"
            )
        if any(t.dtype not in FLOATS for t in (p, g, m)):
            raise TypeError(f"lion_step: number {i} is {p.dtype}, {g.dtype}, {m.dtype}; pass floating tensors")
    if not params:
        return
    if choose("lion_step", params[0], backend) == "reference":
        reference.lion_step(params, grads, exp_avgs, lr=lr, betas=betas, decay=decay)
    else:
        _op(list(params), list(grads), list(exp_avgs), float(lr), *betas, float(decay))

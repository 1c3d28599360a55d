"""Optimizers, learning-rate schedules and gradient clipping, for plain and for sharded (FSDP2) parameters.

Decay is decoupled from the learning rate as in llm-foundry: a step multiplies a decayed weight by
1 - (lr / lr_initial) * weight_decay, so weight_decay is the share lost per step at the full learning rate.
AdamW: Loshchilov and Hutter, arXiv:1711.05101. Lion: Chen et al., arXiv:2302.06675.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from omegaconf import MISSING
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kernels import lion_step
from trainer.errors import InputError

ADAMW_BETAS, ADAMW_EPS, ADAMW_DECAY = (0.9, 0.95), 1e-8, 1e-5
LION_BETAS, LION_DECAY = (0.9, 0.99), 0.0
OFFLOAD_PIECE = 2**28  # bytes of state on the device at once
# A share this large halves the weights within 700 steps: nearly always torch's coupled value, copied.
SUSPICIOUS_DECAY = 1e-3


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. `null` takes the optimizer's own default.

    lr: the full learning rate, which the schedule multiplies.
    betas: (0.9, 0.95) for AdamW, (0.9, 0.99) for Lion.
    eps: 1e-8; AdamW only.
    weight_decay: share of a decayed weight lost per step at the full learning rate; 1e-5 for AdamW, 0 for Lion.
        torch.optim.AdamW's value times lr is the same decay here.
    state_dtype: of Lion's moving average; bf16 halves its memory, and rounds it once a step. AdamW's are fp32.
    offload: keep the state in host memory, and on the device a piece at a time while the optimizer steps. The numbers
        are the same; on a CPU it saves nothing.
    decay_all: decay norms, biases and embeddings too, as llm-foundry does; otherwise matrices only.
    """

    name: Literal["decoupled_adamw", "decoupled_lionw"] = "decoupled_adamw"
    lr: float = MISSING
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    offload: bool = False
    decay_all: bool = False

    def __post_init__(self) -> None:
        # MISSING is a string; the configuration's loader reports it.
        if not isinstance(self.lr, str) and not (0 < self.lr < math.inf):
            raise InputError(f"optimizer.lr={self.lr} is not a learning rate; give a number above 0")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas={list(self.betas)}: each has to be at least 0 and below 1")
        if self.eps is not None and not (0 < self.eps < math.inf):
            raise InputError(f"optimizer.eps={self.eps} has to be above 0, e.g. 1e-8")
        if self.eps is not None and self.name == "decoupled_lionw":
            raise InputError(f"optimizer.eps={self.eps}: decoupled_lionw has none; remove the key")
        if self.state_dtype != "fp32" and self.name != "decoupled_lionw":
            raise InputError(
                f"optimizer.state_dtype={self.state_dtype}: {self.name} changes its second average by less a step than "
                "bf16 can hold; use fp32, perhaps with optimizer.offload=true, or decoupled_lionw"
            )
        if self.weight_decay is not None and not (0 <= self.weight_decay < 1):
            raise InputError(
                f"optimizer.weight_decay={self.weight_decay} is the share of a weight lost per step, at least 0 and "
                "below 1; torch.optim.AdamW's value times lr is the same decay here"
            )


@dataclass(frozen=True)
class SchedulerConfig:
    """The learning rate over the run, as a multiple of optimizer.lr.

    t_warmup: length of the linear warm-up from 0: "100ba", "1e9tok", "0.1ep" or a number of steps.
    alpha_f: the multiple that the decay ends at (cosine, linear) or tends to (inverse square root). null: 0.1 for
        cosine, 0 for linear and inverse square root. The constant schedule has none.
    t_max: where cosine and linear decay end; null: max_duration.
    """

    name: Literal["cosine_with_warmup", "linear_decay_with_warmup", "constant_with_warmup", "inv_sqrt_with_warmup"] = (
        "cosine_with_warmup"
    )
    t_warmup: int | str = "0ba"
    alpha_f: float | None = None
    t_max: int | str | None = None

    def __post_init__(self) -> None:
        if self.alpha_f is not None and not (0 <= self.alpha_f <= 1):
            raise InputError(f"scheduler.alpha_f={self.alpha_f} is a multiple of optimizer.lr, between 0 and 1")
        if self.alpha_f is not None and self.name == "constant_with_warmup":
            raise InputError(f"scheduler.alpha_f={self.alpha_f}: constant_with_warmup never decays; remove the key")
        if self.t_max is not None and self.name in ("constant_with_warmup", "inv_sqrt_with_warmup"):
            raise InputError(f"scheduler.t_max={self.t_max}: {self.name} has no end of its own; remove the key")


def lr_multiplier(config: SchedulerConfig, step: int, *, total_steps: int, warmup_steps: int) -> float:
    """The multiple of optimizer.lr for the update after `step` updates (0 for the first): a pure function of the step.

    With t = step, t_w = warmup_steps, T = total_steps, a = alpha_f and u = (t - t_w) / (T - t_w), at most 1:
    t / t_w while t < t_w, then
    cosine: a + (1 - a) * (1 + cos(pi * u)) / 2; linear: a + (1 - a) * (1 - u); constant: 1;
    inverse square root: a + (1 - a) / sqrt(1 + (t - t_w) / max(t_w, 1)), which for a = 0 is sqrt(t_w / t).
    """
    if step < warmup_steps:
        return step / warmup_steps
    if config.name == "constant_with_warmup":
        return 1.0
    floor = config.alpha_f
    if floor is None:
        floor = 0.1 if config.name == "cosine_with_warmup" else 0.0
    since = step - warmup_steps
    if config.name == "inv_sqrt_with_warmup":
        return floor + (1 - floor) / math.sqrt(1 + since / max(warmup_steps, 1))
    u = min(since / max(total_steps - warmup_steps, 1), 1.0)
    shape = (1 + math.cos(math.pi * u)) / 2 if config.name == "cosine_with_warmup" else 1 - u
    return floor + (1 - floor) * shape


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> float:
    """Set every group's learning rate to `multiplier` times its initial one; returns that rate (groups share one)."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
    return float(optimizer.param_groups[0]["lr"])


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters in named order, without repetition: those that decay, and those that do not.

    Matrices decay; vectors (norms, biases) and embeddings do not, nor does an lm_head tied to one.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    return decayed, [p for p in trainable if p.ndim < 2 or id(p) in embeddings]


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer over the model's trainable parameters, with its state allocated.

    Parameters may be plain tensors or DTensors (then the state is sharded alike) and have to be on their device.
    Groups carry `initial_lr`, for `set_lr`. Their `weight_decay` is torch's, config.weight_decay / config.lr: torch
    multiplies a weight by 1 - lr * that, which is the decoupled factor at every learning rate.

    Raises InputError if nothing in the model is trainable.
    """
    decayed, others = decay_groups(model)
    if not decayed and not others:
        raise InputError("the model has no trainable parameter: at least one has to require a gradient")
    adamw = config.name == "decoupled_adamw"
    decay = config.weight_decay if config.weight_decay is not None else (ADAMW_DECAY if adamw else LION_DECAY)
    if decay >= SUSPICIOUS_DECAY and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"optimizer.weight_decay={decay:g} takes {decay:.2%} off every decayed weight at each step of the full "
            f"learning rate; torch.optim.AdamW's weight_decay={decay:g} is {decay * config.lr:.3g} here",
            stacklevel=2,
        )
    if config.decay_all:
        decayed, others = [p for p in model.parameters() if p.requires_grad], []
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": share / config.lr, "initial_lr": config.lr}
        for params, share in ((decayed, decay), (others, 0.0))
        if params
    ]
    optimizer: torch.optim.Optimizer
    if adamw:
        eps = config.eps if config.eps is not None else ADAMW_EPS
        kind = _OffloadedAdamW if config.offload else torch.optim.AdamW
        optimizer = kind(groups, lr=config.lr, betas=config.betas or ADAMW_BETAS, eps=eps, fused=True)
    else:
        state_dtype = torch.bfloat16 if config.state_dtype == "bf16" else None
        lion = _OffloadedLionW if config.offload else LionW
        optimizer = lion(groups, lr=config.lr, betas=config.betas or LION_BETAS, state_dtype=state_dtype)
    _allocate_state(optimizer, adamw=adamw, offload=config.offload)
    return optimizer


def _allocate_state(optimizer: torch.optim.Optimizer, *, adamw: bool, offload: bool) -> None:
    """Zero state for every parameter now: a lack of memory shows before the first step, and a checkpoint taken before
    it holds step 0. (torch's checkpointing would otherwise make the state with a step of its own, counted as one.)
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            place: dict[str, Any] = {"device": "cpu", "pin_memory": p.is_cuda} if offload else {}
            state["exp_avg"] = torch.zeros_like(p, dtype=getattr(optimizer, "state_dtype", None), **place)
            if adamw:
                state["exp_avg_sq"] = torch.zeros_like(p, **place)
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)


class LionW(torch.optim.Optimizer):
    """Lion with decay in torch's convention: p *= 1 - lr * weight_decay; p -= lr * sign(b1 * m + (1 - b1) * g);
    m = b2 * m + (1 - b2) * g. State: `exp_avg` (m), of the parameter's shape and sharding, in state_dtype (None: the
    parameter's).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = LION_BETAS,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.state_dtype = state_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=self.state_dtype)
            # A shard of an uneven split may be empty.
            params = [p for p in params if _local(p).numel()]
            if params:
                beta1, beta2 = group["betas"]
                lion_step(
                    [_local(p) for p in params],
                    [_local(p.grad) for p in params],
                    [_local(self.state[p]["exp_avg"]) for p in params],
                    lr=group["lr"],
                    betas=(beta1, beta2),
                    decay=group["lr"] * group["weight_decay"],
                )
        return loss


class _Offloaded(torch.optim.Optimizer):
    """A base before an optimizer's class: its state is in host memory, and in a step on the parameters' device, that of
    a few parameters at a time.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        groups = self.param_groups
        try:
            for group in groups:
                for params in _pieces(group["params"], self.state):
                    hosts = [(p, name, host) for p in params for name, host in self.state[p].items() if host.dim()]
                    for p, name, host in hosts:
                        self.state[p][name] = here = torch.empty_like(p, dtype=host.dtype, requires_grad=False)
                        _local(here).copy_(_local(host), non_blocking=True)
                    self.param_groups = [group | {"params": params}]
                    super().step()
                    for p, name, host in hosts:
                        _local(host).copy_(_local(self.state[p][name]), non_blocking=True)
                        self.state[p][name] = host
        finally:
            self.param_groups = groups
        if params[0].is_cuda:
            torch.cuda.current_stream(params[0].device).synchronize()  # a checkpoint may read the host's copies next
        return None


class _OffloadedAdamW(_Offloaded, torch.optim.AdamW):
    pass


class _OffloadedLionW(_Offloaded, LionW):
    pass


def _pieces(params: list[nn.Parameter], state: dict[Any, Any]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters whose state has OFFLOAD_PIECE bytes at most, or of one."""
    piece: list[nn.Parameter] = []
    held = 0
    for p in params:
        size = sum(_local(x).numel() * x.element_size() for x in state[p].values())
        if piece and held + size > OFFLOAD_PIECE:
            yield piece
            piece, held = [], 0
        piece.append(p)
        held += size
    yield piece


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """The sum of all elements' squares, a float64 scalar on the tensors' device."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=torch.float32)).double().square().sum()
    # On the CPU torch adds a norm's squares one after the other: 40 million elements lose 1e-3 of the sum, and the
    # norm would depend on the number of ranks. Norms of 1024 elements are as fast and lose 1e-7.
    norms = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = flat.numel() // 1024 * 1024
        norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1, dtype=torch.float32))
        if whole < flat.numel():
            norms.append(torch.linalg.vector_norm(flat[whole:], dtype=torch.float32).view(1))
    return torch.cat(norms).double().square().sum()


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """The 2-norm of all gradients together, over all ranks; with `max_norm`, gradients above it are scaled down to it.

    Gradients may be plain tensors (whole on every rank) or DTensors, sharded over one or more meshes: the squares are
    summed over the dimensions that shard, in one all-reduce per such dimension (FSDP2 has one). All ranks have to
    call it. Returns a scalar, fp32, on the gradients' device; on CUDA nothing waits for it. A norm that is not
    finite makes the gradients not finite either: check before stepping.

    Raises ValueError if max_norm is not above 0 or a gradient is a pending (partial) sum.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} has to be above 0; None clips nothing")
    groups: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for p in parameters:
        grad = p.grad
        if isinstance(grad, DTensor):
            if any(placement.is_partial() for placement in grad.placements):
                raise ValueError(f"a gradient of shape {tuple(grad.shape)} is a partial sum; reduce it before clipping")
            sharding = tuple(i for i, placement in enumerate(grad.placements) if not placement.is_replicate())
            groups.setdefault((grad.device_mesh, sharding), []).append(grad.to_local())
        elif grad is not None:
            groups.setdefault((None, ()), []).append(grad)
    if not groups:
        return torch.zeros(())
    grads = [grad for group in groups.values() for grad in group]
    # float64: the sum of squares of finite fp32 norms does not overflow.
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    for (mesh, sharding), group in groups.items():
        squares = _sum_of_squares(group)
        for dim in sharding:
            if mesh.size(dim) > 1:
                # Offloaded gradients are on the CPU, their mesh may not be.
                squares = squares.to(mesh.device_type)
                dist.all_reduce(squares, group=mesh.get_group(dim))
        total += squares.to(total.device)
    norm = total.sqrt().float()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        # On the CPU looking at the scale is free, on CUDA it would wait.
        if scale.is_cuda or scale < 1:
            torch._foreach_mul_(grads, scale)
    return norm

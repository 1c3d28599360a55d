"""Which implementation runs an operation, the one switch to override it, and the argument checks every operation
shares.

Precedence: the `backend` argument of a call > the environment's MPT_KERNELS > `set_default` (a recipe's `kernels:`) >
auto.
"""

import math
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NoReturn

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Implementation = Literal["triton", "torch", "reference"]

NAMES = ("auto", "triton", "torch", "reference")
TRITON_ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx90a", "gfx942")
FP32_MAX = torch.finfo(torch.float32).max
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_default = "auto"
_told: set[str] = set()


def set_default(name: str) -> None:
    """Set what runs where neither an argument nor MPT_KERNELS says. ValueError on an unknown name."""
    global _default
    _checked(name, "kernels")
    _default = name


def choose(op: str, tensor: Tensor, override: str | None = None, *, unfit: str | None = None) -> Implementation:
    """The implementation of `op` for a call on `tensor`. unfit: what else keeps Triton from running it, in words.

    ValueError on a name that is unknown, or that cannot run it.
    """
    source, name = "backend", override
    if name is None:
        source, name = "MPT_KERNELS", os.environ.get("MPT_KERNELS")
    if name is None:
        source, name = "kernels", _default
    _checked(name, source)
    if name == "reference":
        return "reference"
    if name == "torch" or (name == "auto" and tensor.device.type != "cuda"):
        return "torch"
    problem = _triton_problem(tensor) or unfit
    if not problem:
        return "triton"
    if name == "triton":
        raise ValueError(f"{source} is 'triton', but {op} cannot run there: {problem}; use 'auto' or 'torch'")
    if tensor.dtype != torch.float64:  # nobody expects that to be fast
        _tell(f"{op} runs on plain torch, slower than its Triton kernels: {problem}")
    return "torch"


@torch.compiler.assume_constant_result
def _tell(message: str) -> None:
    """A warning, once."""
    if message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=4)


def _triton_problem(tensor: Tensor) -> str | None:
    """Why Triton kernels cannot run on a tensor; None if they can."""
    if tensor.dtype == torch.float64:
        return "Triton kernels take fp16, bf16 and fp32, and this is float64"
    if tensor.device.type == "cuda":
        name = architecture(tensor.device)
        return None if name in TRITON_ARCHITECTURES else f"{name} is too old or unknown; sm_80, gfx90a or later"
    if tensor.device.type == "cpu" and interpreting():
        return None
    return f"the tensor is on {tensor.device}, and Triton compiles for NVIDIA and AMD GPUs"


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1): for tests."""
    return bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def architecture(device: torch.device) -> str:
    """The name under which tables of tile shapes hold a device: sm_80, sm_86 (also 8.7, 8.9 and all from 11.0 on: 12.x
    has the same small shared memory, and later ones no less), sm_90, sm_100, gfx90a, gfx942; "interpreter" for a CPU;
    another name for what has no table.
    """
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    major, minor = properties.major, properties.minor
    if major >= 11 or (major == 8 and minor):
        return "sm_86"
    return f"sm_{major}0" if major >= 8 else f"sm_{major}{minor}"


@torch.compiler.assume_constant_result
def fp32_products(device: torch.device) -> str:
    """How torch was told to multiply fp32 on a device: "ieee", "tf32" (NVIDIA alone), "none" where nobody said.

    The older torch.backends.cuda.matmul.allow_tf32 sets this as well; to read that one raises where this was set.
    """
    if device.type != "cuda":
        return "ieee"
    told = torch.backends.cuda.matmul.fp32_precision
    return "none" if told == "tf32" and torch.version.hip else told


def _checked(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}; it must be one of {', '.join(NAMES)}")


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """TypeError unless the given ones are plain tensors on one device; None is left out."""
    first: tuple[str, Tensor] | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is {type(t).__name__}; pass a torch.Tensor")
        if type(t).__name__ == "DTensor":
            raise TypeError(f"{op}: {name} is a DTensor; pass its local part (`.to_local()`) or the full tensor")
        if first is None:
            first = (name, t)
        elif t.device != first[1].device:
            raise TypeError(f"{op}: {name} is on {t.device} and {first[0]} on {first[1].device}; move them together")


def check_dtypes(op: str, *, mixed: bool = False, **tensors: Tensor | None) -> None:
    """TypeError unless the given ones share one floating dtype (fp16, bf16, fp32 or fp64). mixed: each may have its
    own, as under autocast.
    """
    given = {name: t.dtype for name, t in tensors.items() if t is not None}
    for name, dtype in given.items():
        if dtype not in FLOATS:
            raise TypeError(f"{op}: {name} is {dtype}; use float16, bfloat16, float32 or float64")
    if not mixed and len(set(given.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in given.items())
        raise TypeError(f"{op}: mixed dtypes ({listed}); cast them to one, or run under torch.autocast")


def check_slopes(op: str, slopes: Tensor | None, q: Tensor, heads: int) -> None:
    """TypeError, ValueError unless they are (heads,), floating, on q's device and without a gradient; on a CPU also
    unless they are finite and not negative.
    """
    if slopes is None:
        return
    check_tensors(op, q=q, alibi_slopes=slopes)
    if slopes.dtype not in FLOATS:
        raise TypeError(f"{op}: alibi_slopes is {slopes.dtype}; use float32")
    if slopes.shape != (heads,):
        raise ValueError(f"alibi_slopes is {tuple(slopes.shape)}; q has {heads} heads: pass ({heads},)")
    if slopes.requires_grad:
        raise ValueError("alibi_slopes requires a gradient, and there is none: pass alibi_slopes.detach()")
    if slopes.device.type == "cpu" and not torch.compiler.is_compiling() and type(slopes) is Tensor:
        wrong = ((slopes >= 0) & (slopes < math.inf)).logical_not().nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(f"alibi_slopes[{at}] is {float(slopes[at])}; they must be finite and at least 0")


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    """TypeError, ValueError unless it is a number of tokens or None."""
    if chunk_size is not None and not isinstance(chunk_size, int):
        raise TypeError(f"{op}: chunk_size is {chunk_size!r}; it counts tokens: pass an integer or None")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}; it counts tokens, at least 1 (None: all, or by memory)")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast asks for on this tensor's device; None outside autocast, and for float64, which it leaves alone."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not _has_autocast(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@torch.compiler.assume_constant_result
def _has_autocast(kind: str) -> bool:
    """Whether a kind of device has autocast; torch 2.10 cannot compile the question itself."""
    return torch.amp.is_autocast_available(kind)


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which the operations on this tensor's device keep the dtypes that they are given."""
    kind = tensor.device.type
    on = _has_autocast(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def eager(tensor: Tensor) -> bool:
    """Whether an operation may run without its boundary, the custom operator, which costs a tenth of a millisecond:
    nothing is differentiated, traced or watched.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and _get_current_dispatch_mode() is None
    )


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels launch on this tensor's device, whichever is the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse_second_derivative(op: str) -> Any:
    """The autograd formula of `mpt::<op>_backward`: there is none, and the error says so by name."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"mpt::{op} has no second derivative; MPT_KERNELS=reference runs a form that has every derivative"
        )

    return refuse

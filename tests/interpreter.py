"""Makes Triton's interpreter compute bf16 as a GPU does, so that kernels can be tested in it without one.

The interpreter keeps bf16 as uint16 and lets numpy work on the raw bits: products and sums of those are garbage, and
its casts truncate. Here casts round to nearest even and dots multiply in fp32. Our kernels compute in fp32 and touch
bf16 in loads, stores, casts and dots only, so any other arithmetic on bf16 is an error here: on a GPU it would round
after every operation.
"""

import dataclasses
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder
_ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_fabs", "create_erf", "create_rsqrt", "create_idiv")


def mend() -> None:
    """Change the interpreter of this process; a second call does nothing."""
    if getattr(_Builder, "bf16_mended", False):
        return
    _Builder.bf16_mended = True
    cast = _Builder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        old, new = source.dtype.scalar, to.scalar
        if old == tl.bfloat16 and new != tl.bfloat16:
            wide = _widened(source)
            return wide if new == tl.float32 else cast(self, wide, to)
        if new == tl.bfloat16 and old != tl.bfloat16:
            return _Handle(_rounded(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        return cast_impl(self, source, to)  # numpy rounds to nearest even; the interpreter's own truncates

    def dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        a, b = (_widened(x).data if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32) for x in (a, b))
        return _Handle((np.matmul(a, b) + total.data).astype(total.data.dtype), total.dtype.scalar)

    _Builder.cast_impl, _Builder.create_fp_to_fp, _Builder.create_dot = cast_impl, fp_to_fp, dot
    for name in _ARITHMETIC:
        setattr(_Builder, name, _refusing(name, getattr(_Builder, name)))
    reduce = interpreter.ReduceOps.apply_impl
    interpreter.ReduceOps.apply_impl = _refusing_inputs("a reduction", reduce)
    _let_tensors_bound_ranges()
    _spare_time()


def _widened(handle: Any) -> Any:
    """bf16 to fp32, exactly."""
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(x: Any) -> Any:
    """fp32 to the bits of the nearest bf16, ties to even; NaN stays NaN."""
    x = np.asarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def _refusing(name: str, original: Any) -> Any:
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, _Handle) and x.dtype == tl.bfloat16 for x in args):
            raise TypeError(f"{name} on bf16: cast to fp32 first, as the kernels' other arithmetic does")
        return original(self, *args, **kwargs)

    return checked


def _refusing_inputs(name: str, original: Any) -> Any:
    def checked(self: Any, inputs: Any) -> Any:
        if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            raise TypeError(f"{name} of bf16: cast to fp32 first, as the kernels' other arithmetic does")
        return original(self, inputs)

    return checked


def _let_tensors_bound_ranges() -> None:
    """range() over tensor bounds: numpy 2.4 refuses int() of an array of one element, which triton 3.6 relies on."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *args: Any) -> None:
        patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])

    interpreter._patch_lang_tensor = patched


def _spare_time() -> None:
    """Half of the interpreter's time: it patches triton.language again at each call of one @triton.jit function by
    another, and computes overflow checks whose result it drops.
    """
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    patch, run, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patched(fn: Any) -> Any:
        if id(fn.__globals__) in done:  # one file of kernels, one of triton's own
            return interpreter._LangPatchScope()
        done.add(id(fn.__globals__))
        return patch(fn)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return run(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patched, launched

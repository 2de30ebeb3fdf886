"""Repairs to Triton's interpreter, for tests only; import after TRITON_INTERPRET=1 is set. It computes on the raw bits
of bfloat16, its dot is a BLAS call whose rows round by their place in the tile, and half its time goes into replacing
triton.language's functions, which it does anew for each call of one of ours."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

WHOLE = {tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, float, bool, str, type(None)}  # hold no constexpr
BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bfloat16(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def widen(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(to_float32(handle.data), tl.float32) if is_bfloat16(handle) else handle


def narrow(data: np.ndarray) -> TensorHandle:
    if data.dtype == np.bool_:
        return TensorHandle(data, tl.int1)
    return TensorHandle(to_bfloat16(data), tl.bfloat16)


look_up_numpy_dtype = cache(interpreter._get_np_dtype)


def numpy_dtype(kind: tl.dtype) -> np.dtype:
    """The interpreter's own fills a table for each question."""
    scalar = kind.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else look_up_numpy_dtype(scalar)


@cache
def builtins_of(package: object) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtin(package: object, *how: object) -> None:
    for name in builtins_of(package):
        if tl.core.is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, *how)


def patch_once_a_launch() -> None:
    """Functions of one module see the same triton.language."""
    launch, patch, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def launch_anew(*args, **kwargs):
        patched.clear()
        return launch(*args, **kwargs)

    def patch_lang(function):
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    # Python keeps frames in chunks of 16 KB, and a loop whose calls reach the next one maps and unmaps it each time:
    # a frame that needs more begins a larger chunk, in which there is room for those of its calls, too
    launch_anew.__code__ = launch_anew.__code__.replace(co_stacksize=20_000)
    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_anew, patch_lang


def remember_shapes() -> None:
    """What a tensor and its type say of their shape is the same for each tensor of that shape, and one object; types
    are compared and shapes adapted without a look where they are the same."""
    start, start_type, equal, unwrap = (
        tl.tensor.__init__,
        tl.block_type.__init__,
        tl.dtype.__eq__,
        tl.core._unwrap_if_constexpr,
    )
    broadcast, shapes, types, sides = TritonSemantic.broadcast_impl_value, {}, {}, {}

    def tensor_init(self, handle, kind):
        shape = kind.shape if kind.is_block() else None
        if (known := shapes.get(id(shape))) is None:
            start(self, handle, kind)
            if shape is None or sides.get(tuple(shape)) is shape:
                shapes[id(shape)] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, kind, kind.scalar, known

    def type_init(self, element_ty, shape):
        key = element_ty.name, *(side.value if isinstance(side, tl.constexpr) else side for side in shape)
        if (known := types.get(key)) is None:
            start_type(self, element_ty, shape)
            self.shape = sides.setdefault(key[1:], self.shape)
            types[key] = self.shape, self.numel, self.name
        else:
            self.element_ty, (self.shape, self.numel, self.name) = element_ty, known

    def broadcast_impl_value(self, left, right):
        alike = getattr(left.type, "shape", None) is getattr(right.type, "shape", None)
        return (left, right) if alike else broadcast(self, left, right)

    def unwrap_if_constexpr(value):
        kind = value.__class__
        return value.value if kind is tl.constexpr else value if kind in WHOLE else unwrap(value)

    tl.tensor.__init__, tl.block_type.__init__ = tensor_init, type_init
    tl.dtype.__eq__ = lambda one, other: one is other or equal(one, other)
    TritonSemantic.broadcast_impl_value, tl.core._unwrap_if_constexpr = broadcast_impl_value, unwrap_if_constexpr


def install() -> None:
    """Patch casts and arithmetic for bfloat16, and dot to sum every row in the same order, as an MMA unit does."""
    cast, binary, unary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    convert = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, source, target):
        scalar = target.scalar
        if is_bfloat16(source):
            return source if scalar == tl.bfloat16 else cast(self, widen(source), target)
        if scalar == tl.bfloat16:
            return narrow((source if source.dtype.scalar == tl.float32 else cast(self, source, tl.float32)).data)
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        if {source.dtype.scalar, target.scalar} <= {tl.bfloat16, tl.float32}:
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    def binary_op(self, left, right, op):
        if op not in BITWISE and (is_bfloat16(left) or is_bfloat16(right)):
            return narrow(op(widen(left).data, widen(right).data))
        return binary(self, left, right, op)

    def unary_op(self, value, op):
        return narrow(unary(self, widen(value), op).data) if is_bfloat16(value) else unary(self, value, op)

    def create_dot(self, a, b, accumulator, *_options):
        left, right = widen(a).data.astype(np.float32), widen(b).data.astype(np.float32)
        return TensorHandle(np.einsum("mk,kn->mn", left, right) + accumulator.data, accumulator.dtype.scalar)

    # overflows are looked for in all sums of integers, at a third of the time, and told only where `debug` is on
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = numpy_dtype
    interpreter._patch_builtin = patch_builtin
    patch_once_a_launch()
    remember_shapes()
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op
    InterpreterBuilder.create_dot = create_dot

"""Repair of Triton's interpreter, which runs kernels in NumPy where there is no GPU (`TRITON_INTERPRET=1`).

NumPy has no bf16: the interpreter carries the bits in uint16, converts to it by cutting bits off and multiplies the
bits themselves in `tl.dot`. `repair_bf16` puts the conversions (bf16 ↔ fp32, round to nearest even as the hardware
does) and the operands of `tl.dot` right. Arithmetic on bf16 values stays wrong there: kernels compute in fp32.
`repair_nan` puts boxes padded with NaN and the maximum with a NaN right. `hasten` leaves out what it does over and
over: it then takes half the time.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 to the bits of bf16 (uint16), to the nearest, ties to even; infinities and NaN stay."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    return torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    """Turn bits of bf16 (uint16) into float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def repair_bf16() -> None:
    """Make the interpreter's bf16 right, for the rest of the process; a second call does nothing."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "_bf16_is_right", False):
        return
    convert, dot = interpreter._convert_float, builder.create_dot

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        # returns the bits of the target type, as unsigned integers
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = from_bf16_bits(data.view(np.uint16))
            return wide.view(np.uint32) if target == tl.float32 else convert(wide, tl.float32, target, rounding)
        if target == tl.bfloat16 and source != tl.bfloat16:
            wide = data if source == tl.float32 else convert(data, source, tl.float32, rounding).view(np.float32)
            return bf16_bits(wide)
        return convert(data, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        operands = [
            interpreter.TensorHandle(from_bf16_bits(x.data.view(np.uint16)), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        ]
        return dot(self, *operands, d, input_precision, max_num_imprecise_acc)

    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
    # int -> bf16 goes by way of float32: the interpreter would write the integer itself into the bits
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, target_type: Any) -> Any:
        if target_type.scalar == tl.bfloat16 and not source.dtype.scalar.is_floating():
            return interpreter.TensorHandle(bf16_bits(source.data.astype(np.float32)), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 and not target_type.scalar.is_floating():
            wide = interpreter.TensorHandle(from_bf16_bits(source.data.view(np.uint16)), tl.float32)
            return cast(self, wide, target_type)
        return cast(self, source, target_type)

    builder.cast_impl = cast_impl
    builder._bf16_is_right = True


def repair_nan() -> None:
    """Make boxes of bf16 that are padded with NaN, and a maximum that prefers numbers, what the hardware has."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "_nan_is_right", False):
        return
    load = builder.create_descriptor_load

    def create_descriptor_load(self: Any, box: Any, indices: Any, cache: Any, eviction: Any) -> Any:
        if box.padding != ir.PADDING_OPTION.PAD_NAN or box.base.get_element_ty() != tl.bfloat16:
            return load(self, box, indices, cache, eviction)
        pointers, mask = box.materialize_pointers(indices)
        other = interpreter.TensorHandle(np.full(pointers.data.shape, 0x7FC0, np.uint16), tl.bfloat16)
        return self.create_masked_load(pointers, mask, other, cache, eviction, False)

    builder.create_descriptor_load = create_descriptor_load
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder._nan_is_right = True


def hasten() -> None:
    """Keep what the interpreter finds out again for every operation and every call: the same results in half the time.

    What a release of Triton has no such function for stays as it is.
    """
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "_is_hastened", False):
        return
    if hasattr(interpreter, "_get_np_dtype"):
        _keep_numpy_types()
    if hasattr(interpreter, "_patch_builtin"):
        _keep_builtins()
    _name_tuple_types_late()
    _keep_block_types(builder)
    builder._is_hastened = True


def _keep_numpy_types() -> None:
    """Look types up in one table, where the interpreter builds it for each of some thousand lookups a kernel."""
    find, scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)

    def find_numpy_type(dtype: Any) -> np.dtype[Any]:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return find(dtype) if isinstance(element, tl.pointer_type) else scalar(element)

    interpreter._get_np_dtype = find_numpy_type


def _keep_builtins() -> None:
    """List a module's builtins once: every call of a jit function looks through all of its members."""

    @functools.cache
    def names_of(package: Any) -> list[str]:
        # asked first before anything is patched, for what is patched is no builtin any more
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
        for name in names_of(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtins


def _name_tuple_types_late() -> None:
    """Find the type of a tuple when it is asked for: few of the shapes that every tensor has ever are."""
    made: Any = tl.core.tuple
    init, find = made.__init__, made.__getattr__

    def initialise(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            init(self, args, type)

    def get_attribute(self: Any, name: str) -> Any:
        if name != "type":
            return find(self, name)
        init(self, self.values)
        return self.__dict__["type"]

    made.__init__, made.__getattr__ = initialise, get_attribute


def _keep_block_types(builder: Any) -> None:
    """Make the type of blocks of one shape once."""
    block_type: Any = tl.block_type
    make = functools.cache(lambda element, shape: block_type(element, list(shape)))

    def block_of(element: Any, shape: Any) -> Any:
        try:
            return make(element, tuple(getattr(side, "value", side) for side in shape))
        except TypeError:  # a pointer has no hash
            return block_type(element, shape)

    block_type.with_element_ty = lambda self, element: block_of(element, self.shape)
    builder.get_block_ty = lambda self, element, shape: block_of(element, shape)

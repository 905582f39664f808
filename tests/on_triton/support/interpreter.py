"""Runs kernels in triton's interpreter, on CPU tensors, in a process that compiles others.

Triton's own switch, TRITON_INTERPRET, must be set before triton is imported and then nothing can be
compiled. Here it stays unset: `interpreted()` turns every launch inside it into an interpreted one.
The interpreter itself is mended where it is silently wrong (triton 3.6 to 3.9):

- bfloat16 is held as its bits in uint16: products, sums and comparisons worked on the bits, and
  rounding to it truncated;
- a mask from a comparison of scalars became int32 when broadcast, and was refused (3.9);
- loops up to a run-time scalar failed with numpy 2.4 (3.6).

Sums are added up by halves, as a GPU's threads do, where numpy would go row by row.
"""

import contextlib
import types

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from fastgpt.triton import launch_table

# Two multiprocessors: few programs, which is what interpreting takes time for.
DEVICE = launch_table.Device("sm_80", 2)


def _float32(bits):
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _bfloat16(values):
    values = np.array(values, dtype=np.float32, order="C", ndmin=1)
    rounded = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16)
    return rounded.numpy().view(np.uint16).reshape(values.shape)


def _is_bfloat16(handle):
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    return TensorHandle(_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _retyped(tensor, handle, dtype):
    kind = tensor.type.with_element_ty(dtype) if tensor.type.is_block() else dtype
    return tl.tensor(handle, kind)


def _mend_builder():
    cast, binary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op
    unary, dot = InterpreterBuilder.unary_op, InterpreterBuilder.create_dot

    def cast_impl(self, source, target):
        if target.scalar != tl.bfloat16:
            return cast(self, _widened(source), target)
        if _is_bfloat16(source):
            return source
        return TensorHandle(_bfloat16(source.data.astype(np.float32)), tl.bfloat16)

    def binary_op(self, left, right, op):
        if not (_is_bfloat16(left) or _is_bfloat16(right)):
            return binary(self, left, right, op)
        result = op(_widened(left).data, _widened(right).data)
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(_bfloat16(result), tl.bfloat16)

    def unary_op(self, value, op):
        if not _is_bfloat16(value):
            return unary(self, value, op)
        return TensorHandle(_bfloat16(op(_widened(value).data)), tl.bfloat16)

    def create_dot(self, a, b, accumulator, *rest):
        if a.data.dtype != np.float32 or _is_bfloat16(a):
            return dot(self, _widened(a), _widened(b), accumulator, *rest)
        return TensorHandle(_product(a.data, b.data, accumulator.data), accumulator.dtype.scalar)

    def create_splat(self, kind, value):
        filled = np.full(kind.shape, value.data.reshape(-1)[0], dtype=value.data.dtype)
        return TensorHandle(filled, value.dtype.scalar)

    for mended in (cast_impl, binary_op, unary_op, create_dot, create_splat):
        setattr(InterpreterBuilder, mended.__name__, mended)
    if not hasattr(InterpreterBuilder, "get_bf16"):
        InterpreterBuilder.get_bf16 = lambda self, x: TensorHandle(_bfloat16(x), tl.bfloat16)


def _product(a, b, total):
    """a @ b + total by fused multiply-adds along the inner dimension, as a GPU without tensor cores
    takes them; numpy's own order depends on the shape and on this machine's processor.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[-1]):
        total = (a[..., :, k, None] * b[..., None, k, :] + total).astype(np.float32)
    return total


def _mend_reductions():
    reduce = interpreter.ReduceScanOpInterface.apply

    def apply(self, inputs):
        if not isinstance(inputs, tuple):
            return self.apply((inputs,))[0]
        narrow = [_is_bfloat16(t.handle) for t in inputs]
        if not any(narrow):
            return reduce(self, inputs)
        wide = (
            _retyped(t, _widened(t.handle), tl.float32) if n else t
            for t, n in zip(inputs, narrow, strict=True)
        )
        return tuple(
            _retyped(r, TensorHandle(_bfloat16(r.handle.data), tl.bfloat16), tl.bfloat16)
            if n and r.dtype == tl.float32
            else r
            for r, n in zip(reduce(self, tuple(wide)), narrow, strict=True)
        )

    interpreter.ReduceScanOpInterface.apply = apply
    numpy_sum = interpreter.ReduceOps.sum

    def sum_by_halves(self, values):
        data = values.handle.data
        if self.axis is None or not np.issubdtype(data.dtype, np.floating):
            return numpy_sum(self, values)
        data = np.moveaxis(data, self.axis, 0)
        while len(data) > 1:  # a block's sizes are powers of two
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        data = np.expand_dims(data[0], self.axis) if self.keep_dims else data[0]
        return self.to_tensor(data, values.dtype)

    interpreter.ReduceOps.sum = sum_by_halves


def _patch_once():
    """At a launch the language is patched under both names that kernels and triton's own device
    functions call it by, so that these need not do it at every call, a third of all time.
    """
    patch, names = interpreter._patch_lang, {"tl": tl, "core": tl.core}
    interpreter._patch_lang = lambda fn: patch(types.SimpleNamespace(__globals__=names))


def _mend_loops():
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_tensor


# Whether an interpreted kernel is running: a device function called inside one is interpreted too.
_running = False
_interpreted_functions = {}
_call = JITFunction.__call__


def _call_device_function(self, *args, **kwargs):
    if not _running:
        return _call(self, *args, **kwargs)
    if self.fn not in _interpreted_functions:
        _interpreted_functions[self.fn] = InterpretedFunction(self.fn)
    return _interpreted_functions[self.fn].rewrite()(*args, **kwargs)


def _run(kernel, *args, grid, warmup, **kwargs):
    global _running
    _running = True
    try:
        with np.errstate(all="ignore"):
            return InterpretedFunction(kernel.fn).run(*args, grid=grid, warmup=False, **kwargs)
    finally:
        _running = False


_mend_builder()
_mend_reductions()
_mend_loops()
_patch_once()
JITFunction.__call__ = _call_device_function


@contextlib.contextmanager
def interpreted(device=DEVICE):
    """Inside it every `kernel[grid](...)` runs interpreted, on CPU tensors and that device's
    settings.
    """
    run, of = JITFunction.run, launch_table.device_of
    JITFunction.run, launch_table.device_of = _run, lambda x: device
    try:
        yield
    finally:
        JITFunction.run, launch_table.device_of = run, of

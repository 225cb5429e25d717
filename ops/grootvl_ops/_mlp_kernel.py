"""A Triton kernel for the backward pass of an MLP: two products, and what a GELU makes of them, in one.

In Triton and not in CUDA C++: it then has the asynchronous products of compute capability 9.0, for which the compiled
library would have to be built for that capability alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton for this platform, or one without descriptors
    _HAS_TRITON = False
else:
    _HAS_TRITON = True

__all__ = ["hidden_gradients", "runs"]

_ROWS, _COLUMNS, _DEPTH = 128, 64, 64  # of a tile, and of what is loaded at once


def runs(x: Tensor, weight1: Tensor) -> bool:
    """Whether `hidden_gradients` takes operands of the shapes and type of these, on their device."""
    return (
        _HAS_TRITON
        and x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.size(0) > 0
        and x.size(1) % 8 == weight1.size(0) % 8 == 0  # rows begin at multiples of 16 bytes
        and _has_descriptors(x.device.index)
    )


@cache
def _has_descriptors(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


if _HAS_TRITON:

    @triton.jit
    def _kernel(
        grad, x, weight1, bias1, weight2, hidden, dbefore, parts,
        channels: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
    ):  # fmt: skip
        """A tile of `hidden` and `dbefore`, and the sums of the latter over its rows.

        grad and x (pixels, channels), weight1 (width, channels), bias1 (width), weight2 (channels, width), hidden and
        dbefore (pixels, width), parts (tiles down, width); all but bias1 and parts are descriptors of matrices.
        """
        tiles_across: tl.constexpr = (width + columns - 1) // columns
        down = tl.program_id(0) // tiles_across
        row, column = down * rows, tl.program_id(0) % tiles_across * columns
        before = tl.zeros((rows, columns), tl.float32)
        for k in tl.range(0, channels, depth, num_stages=3):
            before = tl.dot(x.load([row, k]), weight1.load([column, k]).T, before)
        dhidden = tl.zeros((rows, columns), tl.float32)
        for k in tl.range(0, channels, depth, num_stages=3):
            dhidden = tl.dot(grad.load([row, k]), weight2.load([k, column]), dhidden)
        at = column + tl.arange(0, columns)
        inside = at < width
        before += tl.load(bias1 + at, inside, 0.0).to(tl.float32)[None, :]
        # GELU by its approximation with tanh: v sigmoid(2 u) with u = sqrt(2 / pi) (v + 0.044715 v^3).
        square = before * before
        gate = 1 / (1 + tl.exp2(-1.4426950408889634 * before * (1.5957691216057308 + 0.07135481627260025 * square)))
        gelu = before * gate
        slope = gate + (gelu - gelu * gate) * (1.5957691216057308 + 0.21406444881780074 * square)
        result = dhidden * slope
        hidden.store([row, column], gelu.to(hidden.dtype))
        dbefore.store([row, column], result.to(dbefore.dtype))
        # Rows beyond the last pixel add zeros, since what is loaded of `grad` there is zero.
        tl.store(parts + down.to(tl.int64) * width + at, tl.sum(result, 0), inside)


def hidden_gradients(
    grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.gelu_mlp_fused_backward`, where it `runs`. Bitwise the same in every run."""
    grad, x, weight1, bias1, weight2 = (_aligned(operand) for operand in (grad, x, weight1, bias1, weight2))
    (pixels, channels), width = x.shape, weight1.size(0)
    hidden, dbefore = (x.new_empty((pixels, width)) for _ in range(2))
    down, across = -(-pixels // _ROWS), -(-width // _COLUMNS)
    parts = x.new_empty((down, width), dtype=torch.float32)
    operands = [
        TensorDescriptor.from_tensor(matrix, [rows, columns])
        for matrix, rows, columns in ((grad, _ROWS, _DEPTH), (x, _ROWS, _DEPTH), (weight1, _COLUMNS, _DEPTH))
    ]
    results = [TensorDescriptor.from_tensor(matrix, [_ROWS, _COLUMNS]) for matrix in (hidden, dbefore)]
    launch: Any = _kernel[(down * across,)]
    launch(
        *operands, bias1, TensorDescriptor.from_tensor(weight2, [_DEPTH, _COLUMNS]), *results, parts,
        channels, width, _ROWS, _COLUMNS, _DEPTH, num_warps=4,
    )  # fmt: skip
    return hidden, dbefore, torch.ops.grootvl_ops.bias_backward(parts)


def _aligned(operand: Tensor) -> Tensor:
    """Contiguous, at a multiple of 16 bytes, as descriptors need it."""
    operand = operand.contiguous()
    return operand if operand.data_ptr() % 16 == 0 else operand.clone()

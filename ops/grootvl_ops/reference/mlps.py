"""What the backward pass of an MLP computes between its products, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scans import accumulation_dtype


def gelu_mlp_backward(dhidden: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For what a GELU takes and the gradient of what it gives, (rows, hidden) each: what it gives, and the gradient of
    what it takes, by the approximation with tanh, and the sum of the latter over the rows."""
    dtype = accumulation_dtype(before.dtype)
    values = before.to(dtype)
    dbefore = torch.ops.aten.gelu_backward(dhidden.to(dtype), values, approximate="tanh")
    return F.gelu(values, approximate="tanh").to(before.dtype), dbefore.to(before.dtype), dbefore.sum(0)


def gelu_mlp_fused_backward(
    grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`gelu_mlp_backward` of the products that it takes, for y = weight2 GELU(weight1 x + bias1) of (rows, C) and the
    gradient of y: weight1 (hidden, C), bias1 (hidden), weight2 (C, hidden)."""
    dtype = accumulation_dtype(x.dtype)
    grad, values, weight1, bias1, weight2 = (operand.to(dtype) for operand in (grad, x, weight1, bias1, weight2))
    hidden, dbefore, dbias1 = gelu_mlp_backward(grad @ weight2, F.linear(values, weight1, bias1))
    return hidden.to(x.dtype), dbefore.to(x.dtype), dbias1

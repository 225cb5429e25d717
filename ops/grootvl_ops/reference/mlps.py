"""An MLP, and what its backward pass computes, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scans import accumulation_dtype


def gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, fused: bool = False) -> Tensor:
    """weight2 GELU(weight1 x + bias1) + bias2 of (..., C), in x's dtype, by the approximation with tanh.

    weight1 (hidden, C), bias1 (hidden), weight2 (C, hidden), bias2 (C). `fused` says how gradients are computed.
    """
    weight1, bias1, weight2, bias2 = (parameter.to(x.dtype) for parameter in (weight1, bias1, weight2, bias2))
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):  # from the epilogue of the product
        hidden = torch._addmm_activation(bias1, x.reshape(-1, x.shape[-1]), weight1.t(), use_gelu=True)
    else:
        hidden = F.gelu(F.linear(x, weight1, bias1), approximate="tanh")
    return F.linear(hidden, weight2, bias2).view(x.shape)


def cast_weights(weights: list[Tensor], rows: list[int], columns: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Matrices, or vectors as one row each, as ones of `dtype` with so many rows and columns: further ones are zeros,
    and what is more than so many is left out."""
    sizes = [(n, m)[2 - weight.dim() :] for weight, n, m in zip(weights, rows, columns, strict=True)]
    results = [weight.new_empty(size, dtype=dtype) for weight, size in zip(weights, sizes, strict=True)]
    cast_weights_into(results, weights, beside=False)
    return results


def cast_weights_into(results: list[Tensor], weights: list[Tensor], beside: bool) -> None:
    """The same into tensors that are there. `beside` is for GPUs: whether other kernels run meanwhile."""
    for result, weight in zip(results, weights, strict=True):
        common = tuple(map(slice, map(min, result.shape, weight.shape)))
        result.zero_()[common] = weight[common]


def bias_backward(grad: Tensor) -> Tensor:
    """The gradient of a bias, which was added to each row, from that of the rows: (rows, columns) to (columns), in
    float32 (float64 for float64)."""
    return grad.sum(0, dtype=accumulation_dtype(grad.dtype))


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

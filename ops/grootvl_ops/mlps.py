"""The MLP of a residual block."""

import torch
from torch import Tensor

from . import _registration, _transforms, reference  # noqa: F401  the first registers the operations
from ._checks import check_parameter, dtype_of_products

__all__ = ["gelu_mlp"]


def gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Two linear layers around a GELU, (..., C) to (..., C), which keeps no hidden values for the backward pass.

    GELU is the approximation with tanh. On CUDA in half precision, the first product applies it. The backward pass
    multiplies once more, and one kernel computes from the result, and from the gradient of the hidden values, all that
    the other products read. In compiled graphs, a Triton kernel does so together with both products, on GPUs of compute
    capability 9.0 and later, for channels and hidden values that are multiples of eight.

    Args:
        x: (..., C), floating point.
        weight1: (hidden, C), bias1: (hidden), of the first layer, as of `torch.nn.Linear`.
        weight2: (C, hidden), bias2: (C), of the second.

    Returns:
        (..., C) of x's dtype, or under autocast of autocast's; products are in this dtype. Differentiable once.

    Raises:
        ValueError: sizes or devices that do not fit.
        TypeError: dtypes that are not floating point.
    """
    if x.dim() < 1 or weight1.dim() != 2:
        raise ValueError(f"x must be (..., C) and weight1 (hidden, C), got {list(x.shape)} and {list(weight1.shape)}")
    channels, hidden = x.size(-1), weight1.size(0)
    for name, parameter, shape in (
        ("weight1", weight1, [hidden, channels]),
        ("bias1", bias1, [hidden]),
        ("weight2", weight2, [channels, hidden]),
        ("bias2", bias2, [channels]),
    ):
        check_parameter(name, parameter, x, shape)
    x = x.to(dtype_of_products(x))
    if _transforms.active():
        return reference.gelu_mlp(x, weight1, bias1, weight2, bias2)
    fused = x.is_cuda and torch.compiler.is_compiling()
    return torch.ops.grootvl_ops.gelu_mlp(x, weight1, bias1, weight2, bias2, fused)

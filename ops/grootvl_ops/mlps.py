"""The MLP of a residual block."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _loading, _registration, _transforms  # noqa: F401  the second registers the operations
from ._checks import check_parameter

__all__ = ["gelu_mlp"]

# Here, since compilers do not follow the question.
_HAS_CUDA_KERNELS = _loading.has_kernels("cuda")


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
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if _transforms.active():
        rows = F.linear(x.to(dtype), weight1.to(dtype), bias1.to(dtype))
        return F.linear(F.gelu(rows, approximate="tanh"), weight2.to(dtype), bias2.to(dtype))
    rows = x.to(dtype).flatten(0, -2) if x.dim() > 1 else x.to(dtype).unsqueeze(0)
    return _GeluMlp.apply(rows, weight1, bias1, weight2, bias2).view(x.shape)


class _GeluMlp(torch.autograd.Function):
    """`gelu_mlp` of (pixels, C), in whose dtype the products are. Parameters may have another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        ctx.dtypes = [parameter.dtype for parameter in (weight1, bias1, weight2, bias2)]
        weight1, bias1, weight2 = weight1.to(x.dtype), bias1.to(x.dtype), weight2.to(x.dtype)
        ctx.save_for_backward(x, weight1, bias1, weight2)
        if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
            hidden = torch._addmm_activation(bias1, x, weight1.t(), use_gelu=True)
        else:
            hidden = F.gelu(F.linear(x, weight1, bias1), approximate="tanh")
        return F.linear(hidden, weight2, bias2.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2 = ctx.saved_tensors
        if x.is_cuda and torch.compiler.is_compiling():
            operation, operands = torch.ops.grootvl_ops.gelu_mlp_fused_backward, (grad, x, weight1, bias1, weight2)
        else:
            operation, operands = torch.ops.grootvl_ops.gelu_mlp_backward, (grad @ weight2, F.linear(x, weight1, bias1))
        hidden, dbefore, dbias1 = operation(*operands)
        of_x, of_weight1, _, of_weight2, of_bias2 = ctx.needs_input_grad
        parameters = (
            dbefore.t() @ x if of_weight1 else None,
            dbias1,
            grad.t() @ hidden if of_weight2 else None,
            grad.sum(0, dtype=dbias1.dtype) if of_bias2 else None,
        )
        return dbefore @ weight1 if of_x else None, *(
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(parameters, ctx.dtypes, strict=True)
        )

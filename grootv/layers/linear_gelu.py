"""A linear layer and the GELU after it, in inference."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bypass import in_inference, is_plain, only_runs

__all__ = ["linear_gelu", "linear_runs_gelu"]

_HALF = (torch.float16, torch.bfloat16)


def _product_dtype(x: Tensor) -> torch.dtype:
    """In which a linear layer multiplies x."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def linear_runs_gelu(linear: nn.Module, act: nn.Module, x: Tensor) -> bool:
    """Whether `linear_gelu` may compute act(linear(x)).

    In inference, in a half precision on CUDA or on a CPU, where calls of the modules would do nothing but what their
    kind does.
    """
    return (
        not isinstance(x, torch.fx.Proxy)
        and (x.is_cpu or (x.is_cuda and _product_dtype(x) in _HALF))
        and in_inference()
        and is_plain(linear, nn.Linear, x.device)
        and linear.bias is not None
        and only_runs(act, nn.GELU)
    )


def linear_gelu(linear: Any, act: Any, x: Tensor) -> Tensor:
    """act(linear(x)) for a linear layer with bias and a GELU.

    On CUDA from the epilogue of the product: the map passes through memory once less. cuBLASLt has the approximation by
    tanh. It differs from exact GELU by less than the rounding of half precision. On a CPU the product becomes its GELU
    in place: the map needs half the memory.
    """
    if x.is_cpu:
        return torch.ops.aten.gelu_(F.linear(x, linear.weight, linear.bias), approximate=act.approximate)
    x, weight, bias = (operand.to(_product_dtype(x)) for operand in (x, linear.weight, linear.bias))
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).view(*x.shape[:-1], len(weight))

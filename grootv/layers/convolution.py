"""Convolutions, where other operations compute them faster, and their activation in compiled graphs."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bypass import in_inference, is_plain, only_runs
from .linear import linear

__all__ = ["convolution_of_patches", "fuses_convolution", "multiplies_patches", "silu_of_sequence", "takes_sequence"]


def fuses_convolution(conv: Any, act: nn.Module, device: torch.device) -> bool:
    """Whether `grootvl_ops.depthwise_conv_silu` may take the weight of `conv` in place of calls of `conv` and `act`."""
    if not (is_plain(conv, nn.Conv2d, device) and only_runs(act, nn.SiLU)):
        return False
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == conv.dilation
        and conv.dilation[0] == conv.dilation[1]
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.bias is None
        and conv.padding_mode == "zeros"
    )


def takes_sequence(act: nn.Module) -> bool:
    """Whether `silu_of_sequence` may compute `act` of the result of a convolution: in compiled graphs."""
    return torch.compiler.is_compiling() and only_runs(act, nn.SiLU)


def silu_of_sequence(x: Tensor) -> Tensor:
    """SiLU of (B, C, H, W), as (B, H W, C).

    Inductor takes what has four dimensions near convolutions for (B, C, H, W), and would copy a channels-last map that
    several operations read to an order in which rows come last.
    """
    return F.silu(x.permute(0, 2, 3, 1).flatten(1, 2))


def multiplies_patches(conv: Any, x: Tensor) -> bool:
    """Whether `convolution_of_patches` may compute conv(x) of a map x, (B, C, H, W).

    In inference in float32 on a CPU, for results of no more pixels than channels. There, a convolution brings its
    weights into another order in each call, which for so few pixels takes longer than the products.
    """
    return (
        not isinstance(x, torch.fx.Proxy)
        and x.is_cpu
        and in_inference()
        and not torch.compiler.is_compiling()
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and is_plain(conv, nn.Conv2d, x.device)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and x.size(0) * math.prod(_result_sizes(conv, x)) <= conv.out_channels
    )


def convolution_of_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) as one product of the patches of x with the weights: (B, C, H, W) to channels-last (B, H', W', C')."""
    patches = F.unfold(x, conv.kernel_size, conv.dilation, cast(Any, conv.padding), conv.stride).transpose(1, 2)
    return linear(patches, conv.weight.flatten(1), conv.bias).unflatten(1, _result_sizes(conv, x))


def _result_sizes(conv: Any, x: Tensor) -> list[int]:
    """Height and width of conv(x)."""
    sides = zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
    return [(side + 2 * pad - dilation * (size - 1) - 1) // stride + 1 for side, pad, dilation, size, stride in sides]

"""When one operation may compute the convolution and the activation before a scan."""

import torch
from torch import nn

from .bypass import is_plain, only_runs

__all__ = ["fuses_convolution"]


def fuses_convolution(conv: nn.Module, act: nn.Module, device: torch.device) -> bool:
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

"""Convolutions of channels-last maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _loading, _registration, _transforms  # noqa: F401  the second registers the operations
from ._checks import check_parameter

__all__ = ["depthwise_conv_silu"]

# Types of devices; here, since compilers do not follow the question.
_WITH_KERNELS = [device_type for device_type in ("cpu", "cuda") if _loading.has_kernels(device_type)]


def depthwise_conv_silu(x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """SiLU of a depthwise 3x3 convolution with zeros around the map: (B, H, W, D) to (B, H, W, D).

    Where no gradients are recorded, one kernel computes both, if there is one for the device. On CUDA it does so where
    they are, too, and one more computes the gradients. Elsewhere PyTorch's operations run, without autocast.

    Args:
        x: (B, H, W, D), floating point; it may be a part of the channels of a larger map.
        weight: (D, 1, 3, 3), as of `torch.nn.Conv2d` with D groups.
        dilation: The distance between the pixels that one pixel reads, in both directions.

    Returns:
        (B, H, W, D) of x's dtype, whether or not under autocast. The kernels compute it in float32 (float64 for
        float64) and are bitwise the same in every run. Differentiable once on CUDA.

    Raises:
        ValueError: sizes or devices that do not fit, or a dilation less than 1.
        TypeError: dtypes that do not fit.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (B, H, W, D), got {list(x.shape)}")
    check_parameter("weight", weight, x, [x.size(3), 1, 3, 3])
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    keep = torch.is_grad_enabled()
    if x.device.type in _WITH_KERNELS and not _transforms.active() and (x.is_cuda or not keep):
        # Of three dimensions: Inductor would copy maps of four, since it takes them for (B, C, H, W).
        sequence = x.flatten(1, 2)
        return torch.ops.grootvl_ops.depthwise_conv_silu(sequence, weight, x.size(1), dilation, keep)[0].view(x.shape)
    with torch.autocast(x.device.type, enabled=False):
        maps = x.permute(0, 3, 1, 2)
        out = F.conv2d(maps, weight.to(x.dtype), padding=dilation, dilation=dilation, groups=x.size(3))
        return F.silu(out).permute(0, 2, 3, 1)

"""Convolutions and their gradients, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scans import accumulation_dtype


def depthwise_conv(x: Tensor, weight: Tensor, height: int, dilation: int) -> Tensor:
    """The depthwise 3x3 convolution of a map of that height, row after row (B, L, D), with zeros around it."""
    dtype = accumulation_dtype(x.dtype)
    maps = x.to(dtype).unflatten(1, (height, -1))
    return _convolve(maps, weight.to(dtype), dilation).flatten(1, 2).to(x.dtype).contiguous()


def depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `depthwise_conv` for x and weight."""
    dtype = accumulation_dtype(x.dtype)
    values, grad = (maps.to(dtype).unflatten(1, (height, -1)) for maps in (x, grad))
    dx = _convolve(grad, weight.to(dtype).flip(2, 3), dilation)
    padded = F.pad(values, (0, 0, dilation, dilation, dilation, dilation))
    width = values.shape[2]
    dweight = torch.stack(
        [
            (grad * padded[:, row : row + height, column : column + width]).sum((0, 1, 2))
            for row in (0, dilation, 2 * dilation)
            for column in (0, dilation, 2 * dilation)
        ],
        -1,
    )
    return dx.flatten(1, 2).to(x.dtype).contiguous(), dweight.reshape(weight.shape)


def depthwise_conv_silu(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """SiLU of the depthwise 3x3 convolution of (B, H, W, D)."""
    dtype = accumulation_dtype(x.dtype)
    return F.silu(_convolve(x.to(dtype), weight.to(dtype), dilation)).to(x.dtype).contiguous()


def depthwise_conv_silu_backward(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Gradients of `depthwise_conv_silu` for x and weight."""
    dtype = accumulation_dtype(x.dtype)
    values, parameters = x.to(dtype), weight.to(dtype)
    before = _convolve(values, parameters, dilation)
    dbefore = torch.ops.aten.silu_backward(grad.to(dtype), before)
    sequences = dbefore.flatten(1, 2), values.flatten(1, 2)
    dx, dweight = depthwise_conv_backward(*sequences, parameters, x.shape[1], dilation)
    return dx.view(x.shape).to(x.dtype), dweight


def _convolve(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """(B, H, W, D) to (B, H, W, D)."""
    maps = x.permute(0, 3, 1, 2)
    return F.conv2d(maps, weight, padding=dilation, dilation=dilation, groups=len(weight)).permute(0, 2, 3, 1)

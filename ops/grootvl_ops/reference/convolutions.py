"""Convolutions and their gradients, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scans import accumulation_dtype


def depthwise_conv_silu(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """SiLU of the depthwise 3x3 convolution of (B, H, W, D), with zeros around the map, of as many pixels."""
    dtype = accumulation_dtype(x.dtype)
    return F.silu(_convolve(x.to(dtype), weight.to(dtype), dilation)).to(x.dtype).contiguous()


def depthwise_conv_silu_backward(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Gradients of `depthwise_conv_silu` for x and weight."""
    dtype = accumulation_dtype(x.dtype)
    values, parameters = x.to(dtype), weight.to(dtype)
    before = _convolve(values, parameters, dilation)
    gate = before.sigmoid()
    dbefore = grad.to(dtype) * gate * (1 + before * (1 - gate))
    dx = _convolve(dbefore, parameters.flip(2, 3), dilation)
    padded = F.pad(values, (0, 0, dilation, dilation, dilation, dilation))
    height, width = x.shape[1:3]
    dweight = torch.stack(
        [
            (dbefore * padded[:, row : row + height, column : column + width]).sum((0, 1, 2))
            for row in (0, dilation, 2 * dilation)
            for column in (0, dilation, 2 * dilation)
        ],
        -1,
    )
    return dx.to(x.dtype).contiguous(), dweight.reshape(weight.shape)


def _convolve(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """(B, H, W, D) to (B, H, W, D)."""
    maps = x.permute(0, 3, 1, 2)
    return F.conv2d(maps, weight, padding=dilation, dilation=dilation, groups=len(weight)).permute(0, 2, 3, 1)

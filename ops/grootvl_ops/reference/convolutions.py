"""Convolutions and their gradients, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scans import accumulation_dtype


def depthwise_conv_silu(
    x: Tensor, weight: Tensor, height: int, dilation: int, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """SiLU of the depthwise 3x3 convolution, with zeros around the map, of a map of that height, whose pixels are in a
    row: (B, L, D); and what SiLU takes, if it is to be kept for the backward pass."""
    dtype = accumulation_dtype(x.dtype)
    maps = x.to(dtype).unflatten(1, (height, -1))
    before = _convolve(maps, weight.to(dtype), dilation).flatten(1, 2)
    return F.silu(before).to(x.dtype).contiguous(), before.to(x.dtype).contiguous() if keep else x.new_empty(0)


def depthwise_conv_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Gradients for x and weight, from that of what SiLU takes."""
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


def depthwise_conv_silu_backward_into(
    dx: Tensor, grad: Tensor, more: Tensor | None, before: Tensor, x: Tensor, weight: Tensor, height: int, dilation: int
) -> Tensor:
    """The gradient of the weight, from the one of the result, grad + more, and what SiLU took. Writes the one of x into
    dx."""
    grad = grad if more is None else grad + more
    dbefore = torch.ops.aten.silu_backward(grad, before)
    result, dweight = torch.ops.grootvl_ops.depthwise_conv_silu_backward(dbefore, x, weight, height, dilation)
    dx.copy_(result)
    return dweight


def _convolve(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """(B, H, W, D) to (B, H, W, D)."""
    maps = x.permute(0, 3, 1, 2)
    return F.conv2d(maps, weight, padding=dilation, dilation=dilation, groups=len(weight)).permute(0, 2, 3, 1)

"""Normalisations and their gradients, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scans import accumulation_dtype


def gated_norm(
    h: Tensor,
    x: Tensor,
    z: Tensor,
    C: Tensor,
    D_skip: Tensor,
    h_weight: Tensor,
    h_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """LN(C LN(h) + D_skip x) SiLU(z) over the last dimension (paper, Algorithm 1), and the statistics of both norms:
    (B, L, 4), mean and reciprocal deviation of h and of what the outer norm takes."""
    dtype = accumulation_dtype(h.dtype)
    h_normed, h_mean, h_scale = torch.native_layer_norm(
        h.to(dtype), h.shape[-1:], h_weight.to(dtype), h_bias.to(dtype), eps
    )
    y = C.to(dtype).unsqueeze(-1) * h_normed + D_skip.to(dtype) * x.to(dtype)
    normed, y_mean, y_scale = torch.native_layer_norm(y, y.shape[-1:], out_weight.to(dtype), out_bias.to(dtype), eps)
    return (normed * F.silu(z.to(dtype))).to(h.dtype), torch.cat([h_mean, h_scale, y_mean, y_scale], dim=-1)


def gated_norm_backward(
    grad: Tensor,
    h: Tensor,
    x: Tensor,
    z: Tensor,
    C: Tensor,
    D_skip: Tensor,
    h_weight: Tensor,
    h_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gated_norm` for h, x, z, C, and (5, D) for D_skip, h_weight, h_bias, out_weight and out_bias."""
    dtype = accumulation_dtype(h.dtype)
    h_mean, h_scale, y_mean, y_scale = statistics.split(1, dim=-1)
    values, gate, scale = x.to(dtype), z.to(dtype), C.to(dtype).unsqueeze(-1)
    h_normed = (h.to(dtype) - h_mean) * h_scale
    inner = h_normed * h_weight.to(dtype) + h_bias.to(dtype)
    y_normed = (scale * inner + D_skip.to(dtype) * values - y_mean) * y_scale
    outer = y_normed * out_weight.to(dtype) + out_bias.to(dtype)
    g, sigmoid = grad.to(dtype), gate.sigmoid()
    douter = g * gate * sigmoid
    dy = _through_norm(douter * out_weight.to(dtype), y_normed, y_scale)
    dinner = scale * dy
    return (
        _through_norm(dinner * h_weight.to(dtype), h_normed, h_scale).to(h.dtype).contiguous(),
        (dy * D_skip.to(dtype)).to(x.dtype).contiguous(),
        (g * outer * sigmoid * (1 + gate * (1 - sigmoid))).to(z.dtype).contiguous(),
        (dy * inner).sum(-1).to(C.dtype),
        torch.stack([dy * values, dinner * h_normed, dinner, douter * y_normed, douter]).sum((1, 2)),
    )


def gated_norm_backward_into(dz: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with the gradient of z written into dz."""
    dh, dx, result, dC, dparameters = torch.ops.grootvl_ops.gated_norm_backward(*operands)
    dz.copy_(result)
    return dh, dx, dC, dparameters


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of x, with a result of `dtype` (None: that of x), and its statistics: (..., 2),
    mean and reciprocal deviation."""
    accumulation = accumulation_dtype(x.dtype)
    normed, mean, scale = torch.native_layer_norm(
        x.to(accumulation), x.shape[-1:], weight.to(accumulation), bias.to(accumulation), eps
    )
    return normed.to(dtype or x.dtype), torch.cat([mean, scale], dim=-1)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `layer_norm` for x, and (2, C) for weight and bias."""
    dtype = accumulation_dtype(x.dtype)
    mean, scale = statistics.split(1, dim=-1)
    normed, g = (x.to(dtype) - mean) * scale, grad.to(dtype)
    dx = _through_norm(g * weight.to(dtype), normed, scale).to(x.dtype).contiguous()
    return dx, torch.stack([g * normed, g]).flatten(1, -2).sum(1)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + factors branch, of x's dtype, its LayerNorm, and the statistics, as of `layer_norm`. The norm is that of the
    sum before it is rounded."""
    accumulation = accumulation_dtype(x.dtype)
    added = branch.to(accumulation)
    if factors is not None:
        added = _of_images(factors, x) * added
    total = x.to(accumulation) + added
    normed, statistics = layer_norm(total, weight, bias, eps, dtype or x.dtype)
    return total.to(x.dtype), normed, statistics


def add_layer_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    statistics: Tensor,
    factors: Tensor | None,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `add_layer_norm` for x, for the branch (of no elements if it is that of x), and (2, C) for weight
    and bias, from those of the norm and of the sum (None: zero)."""
    accumulation = accumulation_dtype(total.dtype)
    dx, dparameters = layer_norm_backward(grad, total.to(accumulation), weight, statistics)
    if grad_sum is not None:
        dx = grad_sum.to(accumulation) + dx
    if factors is not None:
        dbranch = (_of_images(factors, total) * dx).to(branch_dtype).contiguous()
    elif branch_dtype != total.dtype:
        dbranch = dx.to(branch_dtype).contiguous()
    else:
        dbranch = total.new_empty(0)
    return dx.to(total.dtype).contiguous(), dbranch, dparameters


def _of_images(factors: Tensor, like: Tensor) -> Tensor:
    return factors.to(accumulation_dtype(like.dtype)).view(-1, *[1] * (like.dim() - 1))


def _through_norm(dnormed: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """The gradient before a normalisation from the one after it, the result, and the reciprocal deviation."""
    return scale * (dnormed - dnormed.mean(-1, True) - normed * (dnormed * normed).mean(-1, True))

"""Normalisations over the channels of channels-last maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _registration, _transforms  # noqa: F401  the first registers the operations
from ._checks import check_operand, check_parameter
from .reference import accumulation_dtype

__all__ = ["add_layer_norm", "gated_norm", "layer_norm"]


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of a map and a branch, and the LayerNorm of this sum: what follows each branch of a residual block.

    On CUDA one kernel computes both in one pass over the maps. For its limit see `gated_norm`.

    Args:
        x: (..., C), floating point.
        branch: of x's shape. Of another dtype, x and branch are promoted as in x + branch.
        weight, bias: (C), of the norm.
        eps: is added to the variance.
        dtype: of the normalised map; None for that of the sum. On CUDA it may differ between float32 and a half
            precision.
        factors: (B) for x (B, ..., C), what the branch of each image is multiplied by, such as by stochastic depth.
            They take no gradient.

    Returns:
        x + factors branch, and its LayerNorm, (..., C) each, computed in float32 (float64 for float64), whether or not
        under autocast. Bitwise the same in every run. Differentiable once.

    Raises:
        ValueError: sizes or devices that do not fit, or factors that require a gradient.
        TypeError: dtypes that do not fit.
    """
    if x.dim() < 1:
        raise ValueError(f"x must be (..., C), got {list(x.shape)}")
    check_parameter("branch", branch, x, list(x.shape))
    check_parameter("weight", weight, x, [x.size(-1)])
    check_parameter("bias", bias, x, [x.size(-1)])
    if factors is not None:
        if x.dim() < 2:
            raise ValueError(f"x must be (B, ..., C) to have factors, got {list(x.shape)}")
        check_parameter("factors", factors, x, [x.size(0)])
        if factors.requires_grad:
            raise ValueError("factors take no gradient, got some that require one: detach them")
    x = x.to(torch.promote_types(x.dtype, branch.dtype))
    if not torch.jit.is_scripting():  # noqa: SIM102 (as in gated_norm)
        if _transforms.active():
            return _transforms.add_layer_norm(x, branch, weight, bias, eps, dtype, factors)[:2]
    out_dtype = x.dtype if dtype is None else dtype
    one_kernel = not x.is_cuda or branch.dtype == x.dtype or branch.dtype == out_dtype or out_dtype == torch.float32
    if not (one_kernel and _in_one_pass(x)):
        if factors is not None:
            branch = factors.view([-1] + [1] * (x.dim() - 1)) * branch
        total = x + branch
        return total, layer_norm(total, weight, bias, eps, dtype)
    if not torch.jit.is_scripting():  # noqa: SIM102 (as in gated_norm)
        if torch.compiler.is_compiling() and x.dim() > 3:
            flat, flat_branch = _as_sequence(x), _as_sequence(branch)
            total, normed, _ = torch.ops.grootvl_ops.add_layer_norm(
                flat, flat_branch, weight, bias, eps, dtype, factors
            )
            return total.view(x.shape), normed.view(x.shape)
    total, normed, _ = torch.ops.grootvl_ops.add_layer_norm(x, branch, weight, bias, eps, dtype, factors)
    return total, normed


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
    eps: float = 1e-5,
) -> Tensor:
    """What follows the scan (paper, Algorithm 1): LN(C LN(h) + D_skip x) SiLU(z).

    On CUDA one kernel computes it in one pass over the maps: up to 1024 channels, or up to 4096 (2048 in float64) if
    their number is a multiple of 8. Other maps take PyTorch's operations.

    Args:
        h, x, z: (B, L, D), floating point, of one dtype: the scan's result, what went into it, and the gate.
        C: (B, L), of h's dtype: each pixel's weight of its output.
        D_skip: (D).
        h_weight, h_bias: (D), of the norm of h.
        out_weight, out_bias: (D), of the outer norm.
        eps: of both norms.

    Returns:
        (B, L, D) of h's dtype, computed in float32 (float64 for float64). Bitwise the same in every run.
        Differentiable once.

    Raises:
        ValueError: sizes or devices that do not fit.
        TypeError: dtypes that do not fit.
    """
    if h.dim() != 3:
        raise ValueError(f"h must be (B, L, D), got {list(h.shape)}")
    batch, length, channels = h.shape
    check_operand("x", x, h, [batch, length, channels])
    check_operand("z", z, h, [batch, length, channels])
    check_operand("C", C, h, [batch, length])
    check_parameter("D_skip", D_skip, h, [channels])
    check_parameter("h_weight", h_weight, h, [channels])
    check_parameter("h_bias", h_bias, h, [channels])
    check_parameter("out_weight", out_weight, h, [channels])
    check_parameter("out_bias", out_bias, h, [channels])
    if not torch.jit.is_scripting():  # noqa: SIM102 (scripting leaves out only what stands alone under this condition)
        if _transforms.active():
            return _transforms.gated_norm(h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias, eps)[0]
    if not _in_one_pass(h):
        dtype = accumulation_dtype(h.dtype)
        inner = F.layer_norm(h.to(dtype), [channels], h_weight.to(dtype), h_bias.to(dtype), eps)
        y = C.to(dtype).unsqueeze(-1) * inner + D_skip.to(dtype) * x.to(dtype)
        outer = F.layer_norm(y, [channels], out_weight.to(dtype), out_bias.to(dtype), eps)
        return (outer * F.silu(z.to(dtype))).to(h.dtype)
    out, _ = torch.ops.grootvl_ops.gated_norm(h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias, eps)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the last dimension, with a result of another precision if wanted.

    On CUDA one kernel computes it in one pass over the map, several times as fast as PyTorch's for a few hundred
    channels. For its limit see `gated_norm`.

    Args:
        x: (..., C), floating point.
        weight, bias: (C).
        eps: is added to the variance.
        dtype: of the result; None for that of x. On CUDA it may differ between float32 and a half precision.

    Returns:
        (..., C), computed in float32 (float64 for float64), whether or not under autocast. Bitwise the same in every
        run. Differentiable once.

    Raises:
        ValueError: sizes or devices that do not fit.
        TypeError: dtypes that do not fit.
    """
    if x.dim() < 1:
        raise ValueError(f"x must be (..., C), got {list(x.shape)}")
    check_parameter("weight", weight, x, [x.size(-1)])
    check_parameter("bias", bias, x, [x.size(-1)])
    if not torch.jit.is_scripting():  # noqa: SIM102 (as in gated_norm)
        if _transforms.active():
            return _transforms.layer_norm(x, weight, bias, eps, dtype)[0]
    if not _in_one_pass(x):
        accumulation = accumulation_dtype(x.dtype)
        out = F.layer_norm(x.to(accumulation), [x.size(-1)], weight.to(accumulation), bias.to(accumulation), eps)
        return out.to(x.dtype if dtype is None else dtype)
    if not torch.jit.is_scripting():  # noqa: SIM102 (as in gated_norm)
        if torch.compiler.is_compiling() and x.dim() > 3:
            out, _ = torch.ops.grootvl_ops.layer_norm(_as_sequence(x), weight, bias, eps, dtype)
            return out.view(x.shape)
    out, _ = torch.ops.grootvl_ops.layer_norm(x, weight, bias, eps, dtype)
    return out


def _as_sequence(map: Tensor) -> Tensor:
    """(B, ..., C) as (B, L, C), for compiled graphs.

    Near convolutions, Inductor takes every tensor of four dimensions for (B, C, H, W). It would copy channels-last maps
    that are kept for the backward pass to an order in which rows come last, and back.
    """
    return map.flatten(1, -2)


def _in_one_pass(map: Tensor, channels: int | None = None) -> bool:
    """Whether the kernel for the device of a map takes so many channels: on CUDA a block holds all of a pixel."""
    if channels is None:
        channels = map.size(-1)
    most = 2048 if map.dtype == torch.float64 else 4096
    return not map.is_cuda or channels <= 1024 or (channels % 8 == 0 and channels <= most)

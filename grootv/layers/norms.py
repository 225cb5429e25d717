"""Normalisation of the channels of channels-last maps."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

import grootvl_ops

from .bypass import autocasts, is_plain, only_runs
from .tracing import TraceLeaf

__all__ = [
    "LayerNorm",
    "PromotedLayerNorm",
    "add_and_norm",
    "is_drop_path",
    "is_scaled",
    "kept_share",
    "norm_for_product",
    "path_factors",
]


class LayerNorm(TraceLeaf, nn.LayerNorm):
    """LayerNorm over the channels of (..., C) by `grootvl_ops.layer_norm`.

    The result has the dtype of the input. Under autocast it is float32, or of autocast's dtype if `autocast_output`.

    Args:
        dim: C.
        eps: is added to the variance.
        autocast_output: whether the result is of autocast's dtype. Right where only matrix products and convolutions
            read it: they would convert it to that dtype, and read twice the memory to do so.
    """

    def __init__(self, dim: int, eps: float = 1e-6, autocast_output: bool = False, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.autocast_output = autocast_output

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension."""
        if torch.jit.is_scripting():  # TorchScript cannot ask for autocast's dtype; PyTorch's operation knows it
            weight, bias = self.weight, self.bias
            if x.dtype == torch.float32:  # also of a model in half precision, see `SS2D`
                weight, bias = weight.float(), bias.float()
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return grootvl_ops.layer_norm(x, self.weight, self.bias, self.eps, self.result_dtype(x.device.type, x.dtype))

    @torch.jit.unused
    def result_dtype(self, device_type: str, dtype: torch.dtype) -> torch.dtype:
        """Of the result for a map of `dtype` on such a device."""
        if not autocasts(device_type, dtype):
            return dtype
        return torch.get_autocast_dtype(device_type) if self.autocast_output else torch.float32


class PromotedLayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, whatever the dtype of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def norm_for_product(norm_layer: Callable[..., nn.Module], dim: int, **kwargs) -> nn.Module:
    """`norm_layer(dim, **kwargs)` where only matrix products and convolutions read the result (see `LayerNorm`)."""
    norm = norm_layer(dim, **kwargs)
    if isinstance(norm, LayerNorm):
        norm.autocast_output = True
    return norm


def add_and_norm(norm: nn.Module, drop_path: nn.Module, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """x + drop_path(branch), and norm of this sum, for a map x and a branch of a residual block, (B, ..., C).

    One operation computes both where norm and drop_path are a `LayerNorm` and timm's `DropPath`, or none, and a call of
    them would do nothing else. Otherwise they are called, with the same result.
    """
    if (
        isinstance(x, torch.fx.Proxy)
        or not is_drop_path(drop_path)
        or not (isinstance(norm, LayerNorm) and is_plain(norm, LayerNorm, x.device))
    ):
        x = x + drop_path(branch)
        return x, norm(x)
    dtype = norm.result_dtype(x.device.type, torch.promote_types(x.dtype, branch.dtype))
    factors = path_factors(drop_path, branch)
    return grootvl_ops.add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype, factors)


def is_drop_path(module: nn.Module) -> bool:
    """Whether a call of `module` would do nothing but timm's stochastic depth, or nothing at all."""
    return only_runs(module, DropPath) or only_runs(module, nn.Identity)


def path_factors(drop_path: nn.Module, branch: Tensor) -> Tensor | None:
    """(B), what a `drop_path` for which `is_drop_path` holds multiplies a branch (B, ...) by; None where it drops none.

    With the random numbers that a call of the module would draw, in fewer launches.
    """
    keep = kept_share(drop_path)
    if keep is None:
        return None
    factors = branch.new_empty(len(branch)).bernoulli_(keep)
    return factors.div_(keep) if is_scaled(drop_path) else factors


def kept_share(drop_path: Any) -> float | None:
    """Of the images, how many such a `drop_path` keeps on average; None where it drops none."""
    drops = isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob
    return 1 - drop_path.drop_prob if drops else None


def is_scaled(drop_path: Any) -> bool:
    """Whether such a `drop_path` that drops images divides the others by their share."""
    return drop_path.scale_by_keep and drop_path.drop_prob < 1

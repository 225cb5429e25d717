"""Normalisation of the channels of channels-last maps."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

import grootvl_ops

from .bypass import autocasts, is_plain, only_runs
from .tracing import TraceLeaf

__all__ = ["LayerNorm", "PromotedLayerNorm", "add_and_norm", "norm_for_product"]


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
    drops_paths = only_runs(drop_path, DropPath) or only_runs(drop_path, nn.Identity)
    if (
        isinstance(x, torch.fx.Proxy)
        or not drops_paths
        or not (isinstance(norm, LayerNorm) and is_plain(norm, LayerNorm, x.device))
    ):
        x = x + drop_path(branch)
        return x, norm(x)
    factors: Tensor | None = None
    if drop_path.training and isinstance(drop_path, DropPath):  # what it multiplies images by, it makes of ones
        factors = drop_path(branch.new_ones(len(branch), *[1] * (branch.dim() - 1))).flatten()
    dtype = norm.result_dtype(x.device.type, torch.promote_types(x.dtype, branch.dtype))
    return grootvl_ops.add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype, factors)

"""Normalisation of the channels of channels-last maps."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grootvl_ops

from .tracing import TraceLeaf

__all__ = ["LayerNorm", "PromotedLayerNorm", "norm_for_product"]


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
        return grootvl_ops.layer_norm(x, self.weight, self.bias, self.eps, self._result_dtype(x))

    @torch.jit.unused
    def _result_dtype(self, x: Tensor) -> torch.dtype:
        device = x.device.type
        if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):
            return x.dtype
        return torch.get_autocast_dtype(device) if self.autocast_output else torch.float32


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

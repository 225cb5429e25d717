"""LayerNorm over channels-last maps, and which layers run on fused CUDA kernels."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

import grootvl_ops


def can_fuse(channels: int) -> bool:
    """Whether there are fused CUDA kernels for maps of so many channels, in every precision."""
    return grootvl_ops.backend("cuda") == "compiled" and channels <= (2048 if channels % 8 == 0 else 1024)


@register_notrace_module  # it asks for the device of its input, which cannot be followed symbolically
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (..., C), on CUDA by the fused kernel of `grootvl_ops`.

    Under autocast the result is float32, as PyTorch's, or with `feeds_product` of autocast's precision, to which the
    matrix product or convolution that reads it would convert it. `fused` set to False takes PyTorch's there too.

    Args:
        dim: C.
        eps: is added to the variance.
        feeds_product: whether the result is only read by layers that convert it under autocast.
    """

    def __init__(self, dim: int, eps: float = 1e-6, feeds_product: bool = False, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.feeds_product = feeds_product
        self.fused = can_fuse(dim)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript cannot ask for autocast's precision)
            if self.fused and x.is_cuda:
                return grootvl_ops.layer_norm(x, self.weight, self.bias, self.eps, self._result_dtype(x))
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    @torch.jit.unused
    def _result_dtype(self, x: Tensor) -> torch.dtype:
        if x.dtype == torch.float64 or not torch.is_autocast_enabled("cuda"):
            return x.dtype
        if self.feeds_product and x.dtype == torch.float32:
            return torch.get_autocast_dtype("cuda")
        return torch.float32

"""Linear layers where another operation computes them, or what follows them, faster."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grootvl_ops

from .bypass import autocasts, in_eager_mode, in_inference, in_training, is_plain, only_runs

__all__ = [
    "as_product_reads",
    "call_linear",
    "has_only_weight",
    "is_gelu_mlp",
    "joins_products",
    "linear",
    "linear_gelu",
    "linear_of_whole_words",
    "linear_runs_gelu",
    "multiplies_whole_words",
    "product_dtype",
    "runs_gelu_mlp",
    "whole_words",
]

_HALF = (torch.float16, torch.bfloat16)
# Here, since compilers do not follow the question.
_HAS_CUDA_KERNELS = grootvl_ops.backend("cuda") == "compiled"
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_dense(tensor: Tensor) -> bool:
    """Whether it is a contiguous float32 tensor on a CPU, of no kind of its own."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
    )


def runs_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` computes x weight^T + bias by oneDNN.

    In inference in float32 on a CPU, for products that are large enough: of few rows oneDNN brings the weights into
    another order in more time than it gains, and a small product takes less time than its call. Not for weights that
    the layer could not apply, whose sizes and strides oneDNN does not check.
    """
    return (
        _HAS_ONEDNN
        and in_eager_mode()
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype == torch.float32
        and in_inference()
        and weight.dim() == 2
        and x.numel() >= 48 * weight.size(1)
        and x.numel() * weight.size(0) >= 1 << 21
        and x.size(-1) == weight.size(1)
        and _is_dense(weight)
        and (bias is None or (_is_dense(bias) and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in inference on a CPU by oneDNN: (..., K) and (N, K) to (..., N).

    Otherwise PyTorch multiplies float32 on a CPU by the BLAS that it was built with, and copies the bias first.
    """
    if runs_onednn(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def call_linear(layer: Any, x: Tensor) -> Tensor:
    """layer(x), as `linear` if a call of the layer would do nothing else."""
    if type(x) is Tensor and x.is_cpu and in_inference() and is_plain(layer, nn.Linear, x.device):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def product_dtype(x: Tensor) -> torch.dtype:
    """In which a linear layer multiplies x."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if autocasts(device_type, x.dtype) else x.dtype


def as_product_reads(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the precision in which a product with x reads it under autocast.

    For a weight of which several products read a part each: autocast would convert every part, and its gradient.
    """
    if weight.dtype == torch.float32 and autocasts(x.device.type, x.dtype):
        return weight.to(torch.get_autocast_dtype(x.device.type))
    return weight


def linear_runs_gelu(layer: nn.Module, act: nn.Module, x: Tensor) -> bool:
    """Whether `linear_gelu` may compute act(layer(x)).

    In inference, in a half precision on CUDA or on a CPU, where calls of the modules would do nothing but what their
    kind does.
    """
    return (
        not isinstance(x, torch.fx.Proxy)
        and (x.is_cpu or (x.is_cuda and product_dtype(x) in _HALF))
        and in_inference()
        and is_plain(layer, nn.Linear, x.device)
        and layer.bias is not None
        and only_runs(act, nn.GELU)
    )


def linear_gelu(layer: Any, act: Any, x: Tensor) -> Tensor:
    """act(layer(x)) for a linear layer with bias and a GELU.

    On CUDA from the epilogue of the product: the map passes through memory once less. cuBLASLt has the approximation by
    tanh. It differs from exact GELU by less than the rounding of half precision. On a CPU oneDNN applies the GELU to
    each block of the product, or the product becomes its GELU in place: the map needs half the memory.
    """
    if x.is_cpu:
        if runs_onednn(x, layer.weight, layer.bias):
            return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], act.approximate)
        return torch.ops.aten.gelu_(F.linear(x, layer.weight, layer.bias), approximate=act.approximate)
    x, weight, bias = (operand.to(product_dtype(x)) for operand in (x, layer.weight, layer.bias))
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).view(*x.shape[:-1], len(weight))


def runs_gelu_mlp(first: nn.Module, act: nn.Module, second: nn.Module, x: Tensor) -> bool:
    """Whether `grootvl_ops.gelu_mlp` may compute second(act(first(x))), with the weights of two linear layers.

    In training, and in inference in eager mode, in a half precision on CUDA, where calls of the modules would do
    nothing but what their kind does. What it takes for a GELU differs from the exact one by less than the rounding, see
    `linear_gelu`.
    """
    if isinstance(x, torch.fx.Proxy) or not x.is_cuda or product_dtype(x) not in _HALF:
        return False
    return (
        (in_training() or (in_inference() and in_eager_mode()))
        and _HAS_CUDA_KERNELS
        and is_gelu_mlp(first, act, second, x.device)
        and _can_multiply(first, x.device, x.dtype)
    )


def is_gelu_mlp(first: Any, act: nn.Module, second: Any, device: torch.device) -> bool:
    """Whether calls of the modules would do nothing but what two linear layers with biases and a GELU do, of which the
    second gives as many channels as the first takes."""
    return (
        is_plain(first, nn.Linear, device)
        and is_plain(second, nn.Linear, device)
        and only_runs(act, nn.GELU)
        and first._parameters["bias"] is not None
        and second._parameters["bias"] is not None
        and first.in_features == second.out_features
    )


def _can_multiply(layer: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a linear layer could multiply maps of `dtype`: its weight has this type, or autocast converts both."""
    return layer.weight.dtype == dtype or autocasts(device.type, dtype)


def _may_replace_calls(x: Tensor) -> bool:
    """Whether an operation of several (`grootvl_ops.mixers`, `grootvl_ops.blocks`) may compute what modules do with x:
    in eager mode on CUDA, in training and inference."""
    return not isinstance(x, torch.fx.Proxy) and x.is_cuda and (in_training() or in_inference()) and in_eager_mode()


def has_only_weight(layer: Any, x: Tensor) -> bool:
    """Whether an operation of several (`grootvl_ops.mixers`) may multiply x by the weight of `layer`.

    In eager mode on CUDA, in training and inference, for a linear layer without bias whose call would do nothing else.
    """
    return (
        _may_replace_calls(x)
        and is_plain(layer, nn.Linear, x.device)
        and _can_multiply(layer, x.device, x.dtype)
        and layer.bias is None
    )


def joins_products(x: Tensor) -> bool:
    """Whether one operation of many (`grootvl_ops.blocks`) may multiply x, and all that is computed of it, by weights.

    In eager mode on CUDA, in training and inference, in half precision.
    """
    return _may_replace_calls(x) and x.dtype in _HALF and product_dtype(x) == x.dtype and _HAS_CUDA_KERNELS


def whole_words(count: int) -> int:
    """`count` rounded up to a multiple of eight: of values in half precision, as many as fill words of 16 bytes."""
    return (count + 7) // 8 * 8


def multiplies_whole_words(layer: nn.Module, x: Tensor) -> bool:
    """Whether `linear_of_whole_words` may compute layer(x), of a layer without bias.

    In compiled graphs, which make the longer weight as they convert it to the half precision.
    """
    return (
        torch.compiler.is_compiling()
        and x.is_cuda
        and product_dtype(x) in _HALF
        and is_plain(layer, nn.Linear, x.device)
        and layer.bias is None
    )


def linear_of_whole_words(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T of (..., K) and (N, K), followed by zeros up to `whole_words(N)` outputs.

    In half precision, cuBLAS has its fast kernels for matrices whose rows begin at multiples of 16 bytes. The gradient
    of the result, which both products of the backward pass read, has such rows as well.
    """
    return F.linear(x, F.pad(weight, (0, 0, 0, whole_words(len(weight)) - len(weight))))

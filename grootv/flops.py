"""FLOPs of the operations of `grootvl_ops`, for counters.

As in papers, a multiplication with its addition is one FLOP. Elementwise operations are not counted, except norms (five
FLOPs a value). The formulas take shapes, as those of `torch.utils.flop_counter` do.

`import grootv` makes them known to PyTorch's own counter, `FlopCounterMode`, which counts a multiplication with its
addition twice, and so gets twice these numbers. Other counters:

* fvcore: `FlopCountAnalysis(model, images).set_op_handle(**grootv.flops.fvcore_handles())`
* ptflops: `get_model_complexity_info(..., custom_modules_hooks=grootv.flops.ptflops_hooks())`
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .layers import LayerNorm

__all__ = [
    "depthwise_convolution_flops",
    "edge_weights_flops",
    "fvcore_handles",
    "merged_scan_flops",
    "neighbour_cosines_flops",
    "norm_flops",
    "ptflops_hooks",
    "scan_flops",
    "selective_scan_flops",
    "step_projection_flops",
    "stepped_scan_flops",
    "two_norms_flops",
]


def scan_flops(x_shape: list[int], *args: object, **kwargs: object) -> int:
    """Of the scan of (B, L, D): one for a sweep up or down; in both directions a^2, (1 - a^2) u and + a h more."""
    one_sweep = "up" in args or "down" in args  # "both" is the default, which PyTorch leaves out
    return prod(x_shape) * (1 if one_sweep else 4)


def selective_scan_flops(
    x_shape: list[int],
    dt_shape: list[int],
    dt_weight_shape: list[int] | None,
    dt_bias_shape: list[int] | None,
    A_log_shape: list[int],
    B_shape: list[int],
    C_shape: list[int] | None,
    *args: object,
    **kwargs: object,
) -> int:
    """Of a scan for each state, and of the sum over the states if C weights them."""
    states = A_log_shape[1] if len(A_log_shape) == 2 else 1
    return states * (scan_flops(x_shape, *args) + (prod(x_shape) if C_shape is not None else 0))


def stepped_scan_flops(
    x_shape: list[int],
    dt_shape: list[int],
    decay_dt_shape: list[int],
    A_log_shape: list[int],
    B_shape: list[int],
    C_shape: list[int],
    *args: object,
    **kwargs: object,
) -> int:
    """Of a selective scan of as many states, whose decays have their own steps."""
    return selective_scan_flops(x_shape, dt_shape, None, None, A_log_shape, B_shape, C_shape, *args)


def merged_scan_flops(x_shape: list[int], dt_shape: list[int], *args: object, **kwargs: object) -> int:
    """Of K scans of one sweep. The sum of what they give is not counted, as it is not in published counts."""
    return dt_shape[2] * prod(x_shape)


def step_projection_flops(
    x_shape: list[int], dt_shape: list[int], dt_weight_shape: list[int] | None, *args: object, **kwargs: object
) -> int:
    """Of the product that makes the step size of each channel from one of low rank."""
    return x_shape[-1] * prod(dt_shape) if dt_weight_shape is not None else 0


def edge_weights_flops(features_shape: list[int], *args: object, **kwargs: object) -> int:
    """Of the edge weights of (B, H, W, C) maps: a product of C channels for each edge, one for each pixel's norm."""
    batch, height, width, channels = features_shape
    edges = (height - 1) * width + height * (width - 1)
    return batch * channels * (edges + height * width)


def neighbour_cosines_flops(x_shape: list[int], neighbours: int, *args: object, **kwargs: object) -> int:
    """Of the cosines of each vector with those before it: a product for each, and one for the vector's norm."""
    return prod(x_shape) * (neighbours + 1)


def depthwise_convolution_flops(input_shape: list[int], *args: object, **kwargs: object) -> int:
    """Of a depthwise 3x3 convolution: nine for each value."""
    return 9 * prod(input_shape)


def norm_flops(input_shape: list[int], *args: object, **kwargs: object) -> int:
    """Of a norm: five for each value."""
    return 5 * prod(input_shape)


def two_norms_flops(input_shape: list[int], *args: object, **kwargs: object) -> int:
    """Of the two norms after a scan."""
    return 2 * norm_flops(input_shape)


def _selective_scan_in_all(*args: Any, **kwargs: Any) -> int:
    return selective_scan_flops(*args, **kwargs) + step_projection_flops(*args, **kwargs)


def _merged_scan_in_all(*args: Any, **kwargs: Any) -> int:
    return merged_scan_flops(*args, **kwargs) + step_projection_flops(*args, **kwargs)


_FORMULAS: dict[str, Callable[..., int]] = {
    "edge_weights": edge_weights_flops,
    "neighbour_cosines": neighbour_cosines_flops,
    "tree_scan": scan_flops,
    "selective_scan": _selective_scan_in_all,
    "stepped_scan": stepped_scan_flops,
    "merged_scan": _merged_scan_in_all,
    "depthwise_conv_silu": depthwise_convolution_flops,
    "gated_norm": two_norms_flops,
    "layer_norm": norm_flops,
    "add_layer_norm": norm_flops,
}


def _register(name: str, formula: Callable[..., int]) -> None:
    @register_flop_formula(getattr(torch.ops.grootvl_ops, name))
    def multiplications_and_additions(*args: Any, **kwargs: Any) -> int:
        return 2 * formula(*args, **kwargs)


for _name, _formula in _FORMULAS.items():
    _register(_name, _formula)

if torch.ops.aten._addmm_activation not in flop_registry:  # the first product of an MLP in half precision on CUDA

    @register_flop_formula(torch.ops.aten._addmm_activation)
    def _product_flops(bias_shape: list[int], x_shape: list[int], weight_shape: list[int], *args: Any, **_: Any) -> int:
        return 2 * prod(x_shape) * weight_shape[1]


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """What fvcore's `FlopCountAnalysis.set_op_handle` takes, by keyword: its formulas get values of a traced graph."""

    def shape_or_value(value: Any) -> Any:
        return value.type().sizes() if value.isCompleteTensor() else value.toIValue()

    def handle(formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
        return lambda inputs, outputs: formula(*map(shape_or_value, inputs))

    return {f"grootvl_ops::{name}": handle(formula) for name, formula in _FORMULAS.items()}


def ptflops_hooks() -> dict[Any, Callable[..., Any]]:
    """What ptflops takes as `custom_modules_hooks`.

    Its backend "aten" gives tensors to the formulas of all operations. Its backend "pytorch" sees modules only, and of
    these it lacks `LayerNorm`; the operations inside a mixer, one percent or less, it leaves out.
    """

    def hook(formula: Callable[..., int]) -> Callable[[tuple, tuple], int]:
        return lambda inputs, outputs: formula(*(x.shape if isinstance(x, torch.Tensor) else x for x in inputs))

    def count_norm(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        module.__flops__ += norm_flops(list(output.shape))

    of_operations = {getattr(torch.ops.grootvl_ops, name): hook(formula) for name, formula in _FORMULAS.items()}
    return {**of_operations, LayerNorm: count_norm}

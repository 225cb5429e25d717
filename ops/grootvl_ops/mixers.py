"""The mixer of a selective state space model, as one operation before the choice of its tree and one after it.

They compute what `torch.nn.functional.linear` and the other operations of this package do. But each is one call, and
one node of autograd's graph, so that the host launches it in less time. Under torch.compile, call the other operations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _loading, _transforms
from ._checks import check_parameter, dtype_of_products
from ._registration import _library
from .convolutions import depthwise_conv_silu
from .norms import _in_one_pass, gated_norm
from .scans import _tree_for, selective_scan
from .trees import Tree

__all__ = ["mixer_input", "mixer_output"]


def mixer_input(x: Tensor, in_proj: Tensor, conv_weight: Tensor, dilation: int = 1) -> tuple[Tensor, Tensor]:
    """What a mixer scans, and its gate: x in_proj^T, of whose halves the first passes `depthwise_conv_silu`.

    Args:
        x: (B, H, W, C), floating point.
        in_proj: (2 D, C), as of a `torch.nn.Linear` without bias.
        conv_weight: (D, 1, 3, 3), as of `torch.nn.Conv2d` with D groups.
        dilation: Of the convolution.

    Returns:
        The features after the convolution, and the gate z before its activation, both with the pixels in a row,
        (B, H W, D), of x's dtype, or under autocast of autocast's. z is a part of a larger map. Differentiable once.

    Raises:
        ValueError: sizes or devices that do not fit, or a dilation less than 1.
        TypeError: dtypes that are not floating point.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (B, H, W, C), got {list(x.shape)}")
    check_parameter("conv_weight", conv_weight, x, [conv_weight.size(0), 1, 3, 3])
    check_parameter("in_proj", in_proj, x, [2 * conv_weight.size(0), x.size(3)])
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    operation = composed_input if _transforms.active() else torch.ops.grootvl_ops.mixer_input
    return operation(x.to(dtype_of_products(x)), in_proj, conv_weight, dilation)


def mixer_output(
    x: Tensor,
    z: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    h_weight: Tensor,
    h_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    out_proj: Tensor,
    tree: Tree,
    direction: str = "both",
    eps: float = 1e-5,
) -> Tensor:
    """From features and gate to the output of a mixer with one state a channel and one scan (paper, section 3.2):

        dt, B, C = x x_proj^T
        h = selective_scan(x, dt, dt_weight, dt_bias, A_log, B, tree, direction)
        output = gated_norm(h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias, eps) out_proj^T

    Args:
        x: (B, L, D), floating point: what is scanned.
        z: (B, L, D), of x's dtype: the gate before its activation; it may be a part of a larger map.
        x_proj: (R + 2, D), of which the first R rows give the step size.
        dt_weight: (D, R), dt_bias: (D), A_log: (D): see `selective_scan`.
        D_skip, h_weight, h_bias, out_weight, out_bias: (D), eps: see `gated_norm`.
        out_proj: (C, D).
        tree: over the L pixels, of batch size B or one.
        direction: see `tree_scan`.

    Returns:
        (B, L, C) of x's dtype; also under autocast products are in this dtype. Differentiable once for all but the
        tree.

    Raises:
        ValueError: sizes or devices that do not fit, or an unknown direction.
        TypeError: dtypes that do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be (B, L, D), got {list(x.shape)}")
    one_node = _in_one_pass(x) and not _transforms.active()
    operation = torch.ops.grootvl_ops.mixer_output if one_node else composed_output  # which check the other sizes
    return operation(
        x, z, x_proj, dt_weight, dt_bias, A_log, D_skip, h_weight, h_bias, out_weight, out_bias, out_proj,
        *_tree_for(x, tree), eps, direction,
    )  # fmt: skip


def composed_input(x: Tensor, in_proj: Tensor, conv_weight: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """The operation `mixer_input` by operations that each have their own gradients."""
    with torch.autocast(x.device.type, enabled=False):
        # Two products: the gradients of the halves of one would be joined by copies.
        features, z = (F.linear(x, weight) for weight in in_proj.to(x.dtype).chunk(2))
        return depthwise_conv_silu(features, conv_weight, dilation).flatten(1, 2), z.flatten(1, 2)


def composed_output(
    x, z, x_proj, dt_weight, dt_bias, A_log, D_skip, h_weight, h_bias, out_weight, out_bias, out_proj,
    parent, order, subtree_size, eps, direction,
) -> Tensor:  # fmt: skip
    """The operation `mixer_output` by operations that each have their own gradients."""
    if dt_weight.dim() != 2 or out_proj.dim() != 2:
        shapes = [list(weight.shape) for weight in (dt_weight, out_proj)]
        raise ValueError("dt_weight must be (D, R) and out_proj (C, D), got {} and {}".format(*shapes))
    check_parameter("x_proj", x_proj, x, [dt_weight.size(1) + 2, x.size(2)])
    check_parameter("out_proj", out_proj, x, [out_proj.size(0), x.size(2)])
    with torch.autocast(x.device.type, enabled=False):
        dt, B, C = F.linear(x, x_proj.to(x.dtype)).split([dt_weight.size(1), 1, 1], dim=-1)
        tree = Tree(parent, order, subtree_size)
        h = selective_scan(x, dt, dt_weight, dt_bias, A_log, B.squeeze(-1), tree, direction)
        y = gated_norm(h, x, z, C.squeeze(-1), D_skip, h_weight, h_bias, out_weight, out_bias, eps)
        return F.linear(y, out_proj.to(x.dtype))


if _loading.problems["autograd"] is not None:  # which has them with gradients of their own
    _library.impl("mixer_input", composed_input, "CompositeImplicitAutograd")
    _library.impl("mixer_output", composed_output, "CompositeImplicitAutograd")

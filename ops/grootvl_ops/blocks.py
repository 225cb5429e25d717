"""A row of residual blocks, each a tree mixer and an MLP, as one operation.

It computes what `mixer_input`, `build_tree`, `mixer_output`, `gelu_mlp` and `add_layer_norm` do. But it is one call for
all blocks, one node of autograd's graph for each, and it converts the weights of all of them at once, so that the host
launches it in less time. Under torch.compile, call the other operations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _loading, _transforms, trees
from ._registration import _library
from .mixers import mixer_input, mixer_output
from .mlps import gelu_mlp
from .norms import _in_one_pass, add_layer_norm
from .trees import Tree

__all__ = ["BlockParameters", "tree_blocks"]


class BlockParameters(NamedTuple):
    """The parameters of one block of `tree_blocks`, of C channels, D inner channels, and a step size of rank R."""

    in_proj: Tensor
    """(2 D, C)"""
    conv_weight: Tensor
    """(D, 1, 3, 3)"""
    x_proj: Tensor
    """(R + 2, D)"""
    dt_weight: Tensor
    """(D, R)"""
    dt_bias: Tensor
    """(D), as are all up to out_bias"""
    A_log: Tensor
    D_skip: Tensor
    h_weight: Tensor
    h_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    out_proj: Tensor
    """(C, D)"""
    norm_weight: Tensor
    """(C), as norm_bias: of the norm before the MLP"""
    norm_bias: Tensor
    weight1: Tensor
    """(hidden, C), of the MLP, as bias1 (hidden), weight2 (C, hidden) and bias2 (C)"""
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    next_weight: Tensor
    """(C), as next_bias: of the norm that follows the block"""
    next_bias: Tensor


def tree_blocks(
    x: Tensor,
    normed: Tensor,
    blocks: Sequence[BlockParameters],
    factors: Tensor | None = None,
    *,
    dilation: int = 1,
    metric: str = "cosine",
    direction: str = "both",
    root: int = 0,
    one_tree: bool = False,
    mixer_eps: float = 1e-5,
    norm_eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual blocks of a mixer along the minimum spanning tree of its own features, and an MLP (paper, section 3.2).

    Each block computes, from the map x and its norm,

        features, z = mixer_input(normed, in_proj, conv_weight, dilation)
        tree = build_tree(features, metric, root)
        x, normed = add_layer_norm(x, mixer_output(features, z, ..., tree, direction, mixer_eps), norm_weight, ...)
        x, normed = add_layer_norm(x, gelu_mlp(normed, weight1, bias1, weight2, bias2), next_weight, ...)

    Args:
        x: (B, H, W, C), floating point.
        normed: (B, H, W, C), what the first mixer reads of x. Its dtype is the one of all products.
        blocks: The parameters of each block.
        factors: (2 blocks, B), what the branches of each image are multiplied by: in each block the mixer's, and the
            MLP's. They take no gradient.
        dilation: Of the convolutions.
        metric, root: Of the trees, see `build_tree`.
        direction: Of the scans, see `tree_scan`.
        one_tree: Whether all blocks scan along the tree of the first.
        mixer_eps, norm_eps: Are added to the variance in the mixers' norms, and in the norms after the branches.
        dtype: Of the last norm; None for that of `normed`. All others have that of `normed`.

    Returns:
        The map after the last block, and its norm, (B, H, W, C) each. Differentiable once.

    Raises:
        ValueError: sizes or devices that do not fit, or an unknown metric or direction.
        TypeError: dtypes that do not fit.
    """
    if x.dim() != 4 or x.shape != normed.shape:
        raise ValueError(f"x and normed must be (B, H, W, C), got {list(x.shape)} and {list(normed.shape)}")
    if factors is not None and factors.requires_grad:
        raise ValueError("factors take no gradient, got some that require one: detach them")
    if metric not in trees.METRICS:
        raise ValueError(f"metric must be one of {trees.METRICS}, got {metric!r}")
    trees.check_root(root, x.size(1) * x.size(2))
    x = x.to(torch.promote_types(x.dtype, normed.dtype))
    dtype = normed.dtype if dtype is None else dtype
    one_node = (
        not _transforms.active()
        and dtype in (normed.dtype, torch.float32)
        and all(_in_one_pass(normed, channels) for channels in {x.size(3), *(len(block.A_log) for block in blocks)})
    )
    operation = torch.ops.grootvl_ops.tree_blocks if one_node else composed_blocks
    parameters = [parameter for block in blocks for parameter in block]
    return operation(
        x, normed, parameters, factors, dilation, metric, direction, root, one_tree, mixer_eps, norm_eps, dtype
    )


def composed_blocks(
    x, normed, parameters, factors, dilation, metric, direction, root, one_tree, mixer_eps, norm_eps, dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation `tree_blocks` by operations that each have their own gradients."""
    count = len(BlockParameters._fields)
    if len(parameters) % count:
        raise ValueError(f"parameters must be {count} of each block, got {len(parameters)}")
    blocks = [BlockParameters(*parameters[i : i + count]) for i in range(0, len(parameters), count)]
    if factors is not None and list(factors.shape) != [2 * len(blocks), len(x)]:
        raise ValueError(f"factors must be {[2 * len(blocks), len(x)]}, got {list(factors.shape)}")
    tree: Tree | None = None
    type_of_products = normed.dtype
    with torch.autocast(x.device.type, enabled=False):
        for i, block in enumerate(blocks):
            features, z = mixer_input(normed, block.in_proj, block.conv_weight, dilation)
            if tree is None or not one_tree:
                tree = trees.build_tree(features.view(*x.shape[:3], -1), metric, root)
            mixed = mixer_output(features, z, *block[2:12], tree, direction, mixer_eps)
            norms = (block.norm_weight, block.norm_bias), (block.next_weight, block.next_bias)
            of_mixer, of_mlp = (None, None) if factors is None else factors[2 * i : 2 * i + 2]
            x, normed = add_layer_norm(x, mixed.view(x.shape), *norms[0], norm_eps, type_of_products, of_mixer)
            of_next = type_of_products if i + 1 < len(blocks) else dtype
            mlp = gelu_mlp(normed, block.weight1, block.bias1, block.weight2, block.bias2)
            x, normed = add_layer_norm(x, mlp, *norms[1], norm_eps, of_next, of_mlp)
    return x, normed


if _loading.problems["autograd"] is not None:  # which has it with gradients of its own
    _library.impl("tree_blocks", composed_blocks, "CompositeImplicitAutograd")

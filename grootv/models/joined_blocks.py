"""All blocks of a stage as one operation, `grootvl_ops.tree_blocks`: when it may compute them, and its operands."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import grootvl_ops
from grootv.layers import LayerNorm
from grootv.layers.bypass import is_plain
from grootv.layers.linear import joins_products
from grootv.layers.norms import path_factors
from grootv.layers.scans import root_pixel
from grootvl_ops import BlockParameters

__all__ = ["run_joined"]


def run_joined(
    blocks: Sequence[Any], norms: Sequence[nn.Module], x: Tensor, normed: Tensor, one_tree: bool
) -> Tensor | None:
    """What the norm after the last block gives, or None where the blocks have to be computed one by one.

    In eager mode on CUDA in half precision, for blocks of a `TreeSSM` with one state a channel and an MLP with GELU,
    where calls of all their modules would do nothing but what their kind does.

    Args:
        blocks: `Block`s whose calls would do nothing else.
        norms: The norm before each block, and the one after the last.
        x: (B, H, W, C), the map before the first block.
        normed: What norms[0] gives for it.
        one_tree: Whether all blocks scan along the tree of the first.
    """
    if not (blocks and joins_products(normed) and all(is_plain(norm, LayerNorm, x.device) for norm in norms)):
        return None
    first: Any = blocks[0].mixer
    parameters = []
    for block, next_norm in zip(blocks, norms[1:], strict=True):
        if not (block.has_only_weights(x.device, normed.dtype) and _is_like(block.mixer, first)):
            return None
        parameters.append(_parameters(block, next_norm))
    of_norms: list[Any] = [*(block.norm2 for block in blocks), *norms[1:]]
    *before_products, last = of_norms
    dtypes = {norm.result_dtype(x.device.type, x.dtype) for norm in before_products} | {normed.dtype}
    if len(dtypes) > 1 or any(norm.eps != last.eps for norm in before_products):
        return None
    return grootvl_ops.tree_blocks(
        x,
        normed,
        parameters,
        _path_factors(blocks, normed),
        dilation=first.conv.dilation[0],
        metric=first.metric,
        direction=first.direction,
        root=root_pixel(x, first.tree_root),
        one_tree=one_tree,
        mixer_eps=first.h_norm.eps,
        norm_eps=last.eps,
        dtype=last.result_dtype(x.device.type, x.dtype),
    )[1]


def _is_like(mixer: Any, first: Any) -> bool:
    """Whether one operation may compute both mixers, apart from their weights."""
    return (
        mixer.metric == first.metric
        and (mixer.direction, mixer.tree_root) == (first.direction, first.tree_root)
        and mixer.conv.dilation == first.conv.dilation
        and mixer.h_norm.eps == first.h_norm.eps
    )


_LAYERS = ("in_proj", "conv", "x_proj", "dt_proj", "h_norm", "out_norm", "out_proj")  # of a mixer


def _parameters(block: Any, next_norm: Any) -> BlockParameters:
    # Not by attributes, which nn.Module finds by a search that takes longer than all the rest.
    mixer, mlp = block.mixer, block.mlp._modules
    in_proj, conv, x_proj, step, h_norm, out_norm, out_proj = (mixer._modules[name]._parameters for name in _LAYERS)
    norm, fc1, fc2, following = (m._parameters for m in (block.norm2, mlp["fc1"], mlp["fc2"], next_norm))
    return BlockParameters(
        in_proj["weight"], conv["weight"], x_proj["weight"], step["weight"], step["bias"], mixer.A_log, mixer.D_skip,
        h_norm["weight"], h_norm["bias"], out_norm["weight"], out_norm["bias"], out_proj["weight"],
        norm["weight"], norm["bias"], fc1["weight"], fc1["bias"], fc2["weight"], fc2["bias"],
        following["weight"], following["bias"],
    )  # fmt: skip


def _path_factors(blocks: Sequence[Any], branch: Tensor) -> Tensor | None:
    """(2 blocks, B), what stochastic depth multiplies branches by; None where it drops none."""
    paths = [path for block in blocks for path in (block.drop_path1, block.drop_path2)]
    factors = [path_factors(path, branch) for path in paths]
    if all(of_branch is None for of_branch in factors):
        return None
    ones = branch.new_ones(len(branch))
    return torch.stack([ones if of_branch is None else of_branch for of_branch in factors])

"""All blocks of a stage as one operation, `grootvl_ops.tree_blocks`: when it may compute them, and its operands."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import grootvl_ops
from grootv.layers import LayerNorm, TreeSSM
from grootv.layers.bypass import autocasts, is_plain, only_runs
from grootv.layers.convolution import fuses_convolution
from grootv.layers.linear import is_gelu_mlp, joins_products
from grootv.layers.mlp import Mlp
from grootv.layers.norms import is_drop_path, is_scaled, kept_share
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
        if not (_has_only_weights(block, x.device, normed.dtype) and _is_like(block._modules["mixer"], first)):
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


# Modules and parameters below are taken from dictionaries: nn.Module finds an attribute by a search that takes longer
# than all the rest.


def _has_only_weights(block: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether calls of all modules of a block would do nothing but what their kind does with their weights, and as one
    operation needs them: a mixer of one state along trees, and an MLP with GELU."""
    modules = block._modules
    mixer, mlp = modules["mixer"], modules["mlp"]
    if not (only_runs(mixer, TreeSSM) and "scans" not in mixer.__dict__ and only_runs(mlp, Mlp)):
        return False
    layers, of_mlp = mixer._modules, mlp._modules
    fc1, fc2 = of_mlp["fc1"], of_mlp["fc2"]
    products = [layers[name] for name in ("in_proj", "x_proj", "out_proj")]
    return (
        {"A_log", "D_skip"} <= mixer._parameters.keys()
        and mixer.has_one_state_and_weights()
        and fuses_convolution(layers["conv"], layers["act"], device)
        and all(is_plain(layer, nn.Linear, device) and layer.bias is None for layer in products)
        and is_gelu_mlp(fc1, of_mlp["act"], fc2, device)
        and (
            autocasts(device.type, dtype)
            or all(layer._parameters["weight"].dtype == dtype for layer in (*products, layers["dt_proj"], fc1, fc2))
        )
        and is_plain(modules["norm2"], LayerNorm, device)
        and is_drop_path(modules["drop_path1"])
        and is_drop_path(modules["drop_path2"])
    )


def _is_like(mixer: Any, first: Any) -> bool:
    """Whether one operation may compute both mixers, apart from their weights."""
    return (
        mixer.metric == first.metric
        and (mixer.direction, mixer.tree_root) == (first.direction, first.tree_root)
        and mixer._modules["conv"].dilation == first._modules["conv"].dilation
        and mixer._modules["h_norm"].eps == first._modules["h_norm"].eps
    )


def _parameters(block: Any, next_norm: Any) -> BlockParameters:
    mixer, mlp = block._modules["mixer"], block._modules["mlp"]._modules
    layers, own = mixer._modules, mixer._parameters
    norm, fc1, fc2, step = (
        module._parameters for module in (block._modules["norm2"], mlp["fc1"], mlp["fc2"], layers["dt_proj"])
    )
    h_norm, out_norm, following = (module._parameters for module in (layers["h_norm"], layers["out_norm"], next_norm))
    return BlockParameters(
        layers["in_proj"]._parameters["weight"], layers["conv"]._parameters["weight"],
        layers["x_proj"]._parameters["weight"], step["weight"], step["bias"], own["A_log"], own["D_skip"],
        h_norm["weight"], h_norm["bias"], out_norm["weight"], out_norm["bias"],
        layers["out_proj"]._parameters["weight"], norm["weight"], norm["bias"],
        fc1["weight"], fc1["bias"], fc2["weight"], fc2["bias"], following["weight"], following["bias"],
    )  # fmt: skip


def _path_factors(blocks: Sequence[Any], branch: Tensor) -> Tensor | None:
    """(2 blocks, B), what stochastic depth multiplies branches by; None where it drops none.

    Few launches draw for all blocks, so the numbers are others than calls of the modules would draw.
    """
    paths = [block._modules[name] for block in blocks for name in ("drop_path1", "drop_path2")]
    shares = [kept_share(path) for path in paths]
    if all(keep is None for keep in shares):
        return None
    dtype = torch.promote_types(branch.dtype, torch.float32)
    factors = torch.rand(len(paths), len(branch), dtype=dtype, device=branch.device)
    of_paths = factors.unbind()
    keeps = [1.0 if keep is None else keep for keep in shares]
    torch._foreach_sub_(of_paths, keeps)
    factors.lt_(0)  # 1 where a number below 1 is less than the share
    divisors = [keep if keep < 1 and is_scaled(path) else 1.0 for path, keep in zip(paths, keeps, strict=True)]
    torch._foreach_div_(of_paths, divisors)
    return factors

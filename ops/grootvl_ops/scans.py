"""Scans along trees: the plain one, and the selective one of a state space model."""

import os

import torch
from torch import Tensor

from . import _registration, _transforms  # noqa: F401  the first registers the operations
from ._checks import check_operand, check_parameter
from ._loading import built
from .reference import DIRECTIONS
from .trees import Tree, check_tree

__all__ = ["DIRECTIONS", "merged_scan", "selective_scan", "tree_scan"]

# In the checked build by default, elsewhere if asked for.
_CHECK_TREES = os.environ.get("GROOTVL_CHECK_TREES", "1" if built().get("checked") else "0") not in ("", "0")


def tree_scan(x: Tensor, decay: Tensor, tree: Tree, direction: str = "both") -> Tensor:
    """Aggregate features along a tree: h_i = sum_j (product of the decays on the path from j to i) x_j.

    The decay of a vertex belongs to the edge to its parent and is applied in both directions; a root's is not used.
    With p the parent of i, and c its children, the directions are

    * "both": the sum runs over all vertices of the tree: every vertex is a root (paper, Algorithm 1). Two sweeps;
    * "up": it runs over the subtree below i: h_i = x_i + sum_c a_c h_c, from the leaves to the root;
    * "down": it runs over the path from the root to i: h_i = x_i + a_i h_p, from the root to the leaves. Along a path
      (`path_tree`) this is the scan of a sequence, as in Mamba.

    Args:
        x: (B, L, D), floating point: what is aggregated.
        decay: (B, L, D), of the same dtype, usually in (0, 1).
        tree: over L vertices, of batch size B or one.
        direction: "both", "up" or "down".

    Returns:
        (B, L, D) of x's dtype. Accumulated in float32 (float64 for float64). Bitwise the same in every run.
        Differentiable once for x and decay. Under autocast it runs in float32.

    Raises:
        ValueError: sizes or devices that do not fit, or an unknown direction.
        TypeError: dtypes that do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be (B, L, D), got {list(x.shape)}")
    if decay.shape != x.shape:
        raise ValueError(f"decay must have the shape of x, {list(x.shape)}, got {list(decay.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    # TorchScript cannot ask about one type of device; there the kernels check, after autocast has made the dtypes one.
    if not torch.jit.is_scripting():  # noqa: SIM102 (scripting leaves out only what stands alone under this condition)
        if decay.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x and decay must have one dtype, got {x.dtype} and {decay.dtype}")
    if decay.device != x.device:
        raise ValueError(f"x and decay must be on one device, got {x.device} and {decay.device}")
    _check_direction(direction)
    tree = _tree_for(x, tree)
    if not torch.jit.is_scripting():  # noqa: SIM102 (as above)
        if _transforms.active():
            return _transforms.tree_scan(x, decay, tree, direction)
    return torch.ops.grootvl_ops.tree_scan(x, decay, tree.parent, tree.order, tree.subtree_size, direction)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    B: Tensor,
    tree: Tree,
    direction: str = "both",
    C: Tensor | None = None,
    decay_dt: Tensor | None = None,
) -> Tensor:
    """A selective state space model along a tree (paper, section 3.2 and Algorithm 1), with N states a channel:

        delta = softplus(dt_weight dt + dt_bias)
        h_n = tree_scan(delta B_n x, exp(-exp(A_log_n) delta)),  n = 1 ... N
        y = sum_n C_n h_n                                        where C is given

    On CUDA the discretisation is part of the scan: neither decays nor scaled inputs are written to memory, and the
    backward pass computes them once more from what the forward pass was given. Where C is given, no (B, L, D, N) tensor
    is in memory, except in the backward pass of "up" and "down" on CUDA: one of four states, or of all states if it has
    up to 2^29 values.

    Args:
        x: (B, L, D), floating point: what is aggregated.
        dt: (B, L, R), of x's dtype: each pixel's step size, of low rank; or (B, L, D) if `dt_weight` is None.
        dt_weight: (D, R), from rank to channels; None if dt has a value for each channel already.
        dt_bias: (D), or None for none.
        A_log: (D) for one state, or (D, N): logarithm of the rate of decay.
        B: (B, L) if A_log is (D), else (B, L, N), of x's dtype: each pixel's weights of its input.
        tree: over the L pixels, of batch size B or one.
        direction: see `tree_scan`.
        C: of B's shape and dtype: each pixel's weights of its states; None for the states themselves.
        decay_dt: (B, L, D), of x's dtype: the steps of the decays before softplus, where they are not those of the
            inputs: h_n = tree_scan(softplus(dt) B_n x, exp(-exp(A_log_n) softplus(decay_dt))). Only with C, with one
            sweep, "up" or "down", with A_log (D, N), and with dt_weight and dt_bias None.

    Returns:
        y, (B, L, D), or without C the states h: (B, L, D) if A_log is (D), else (B, L, D, N). Of x's dtype. Computed in
        float32 (float64 for float64), but for the product of dt and dt_weight, which on CUDA is rounded to x's dtype.
        Bitwise the same in every run. Differentiable once for all but the tree.

    Raises:
        ValueError: sizes or devices that do not fit, or an unknown direction.
        TypeError: dtypes that do not fit.
    """
    if x.dim() != 3 or dt.dim() != 3:
        raise ValueError(f"x must be (B, L, D) and dt (B, L, R), got {list(x.shape)} and {list(dt.shape)}")
    batch, length, channels = x.shape
    if A_log.dim() != 1 and (A_log.dim() != 2 or A_log.size(1) < 1):
        raise ValueError(f"A_log must be (D) or (D, N) with at least one state, got {list(A_log.shape)}")
    check_parameter("A_log", A_log, x, [channels] + list(A_log.shape[1:]))
    pixels = [batch, length] + list(A_log.shape[1:])
    check_operand("dt", dt, x, [batch, length, channels if dt_weight is None else dt.size(2)])
    check_operand("B", B, x, pixels)
    if C is not None:
        check_operand("C", C, x, pixels)
    if dt_weight is not None:
        check_parameter("dt_weight", dt_weight, x, [channels, dt.size(2)])
    if dt_bias is not None:
        check_parameter("dt_bias", dt_bias, x, [channels])
    _check_direction(direction)
    tree = _tree_for(x, tree)
    if decay_dt is not None:
        check_operand("decay_dt", decay_dt, x, [batch, length, channels])
        if C is None or A_log.dim() != 2 or dt_weight is not None or dt_bias is not None or direction == "both":
            raise ValueError(
                "decay_dt needs C, A_log (D, N), the direction 'up' or 'down', and no dt_weight or dt_bias"
            )
        if not torch.jit.is_scripting():  # noqa: SIM102 (as in tree_scan)
            if _transforms.active():
                return _transforms.stepped_scan(x, dt, decay_dt, A_log, B, C, *tree, direction)
        return torch.ops.grootvl_ops.stepped_scan(
            x, dt, decay_dt, A_log, B, C, tree.parent, tree.order, tree.subtree_size, direction
        )
    if not torch.jit.is_scripting():  # noqa: SIM102 (as in tree_scan)
        if _transforms.active():
            return _transforms.selective_scan(x, dt, dt_weight, dt_bias, A_log, B, C, *tree, direction)
    return torch.ops.grootvl_ops.selective_scan(
        x, dt, dt_weight, dt_bias, A_log, B, C, tree.parent, tree.order, tree.subtree_size, direction
    )


def merged_scan(
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    tree: Tree,
    direction: str = "down",
    D_skip: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The sum of K selective scans of one x along K trees, each with its own parameters (VMamba, arXiv 2401.10166,
    section 4.2, where the trees are the four paths of a cross scan):

        delta_k = softplus(dt_weight_k dt_k + dt_bias_k)
        h_k = tree_scan(delta_k B_k x, exp(-exp(A_log_k) delta_k)) along tree k
        y = sum_k C_k h_k + D_skip x

    On CUDA all scans are launched together, forward and backward. Where gradients are asked for, K maps like x are kept
    for the backward pass, which then needs one sweep for each scan.

    Args:
        x: (B, L, D), floating point: what every scan aggregates.
        dt: (B, L, K, R), of x's dtype: each pixel's step sizes, of low rank.
        dt_weight: (K, D, R): from rank to channels.
        dt_bias: (K, D), or None for none.
        A_log: (K, D): logarithms of the rates of decay.
        B, C: (B, L, K), of x's dtype: each pixel's weights of its inputs and of its states.
        tree: K trees over the L pixels, which all images share: fields (K, L).
        direction: "down" or "up", of all scans; see `tree_scan`.
        D_skip: (D), or None for none: what of x passes the scans by.
        dtype: of the result: x's, or the one in which sums are computed; None for x's. The sum of several scans may not
            fit into half precision.

    Returns:
        y, (B, L, D). Each h is rounded to x's dtype; products and sums are computed in float32 (float64 for float64),
        but for that of dt and dt_weight, which on CUDA is rounded to x's dtype. Bitwise the same in every run.
        Differentiable once for all but the tree; the gradient of y is rounded to x's dtype.

    Raises:
        ValueError: sizes or devices that do not fit, or an unknown direction.
        TypeError: dtypes that do not fit.
    """
    if x.dim() != 3 or dt.dim() != 4:
        raise ValueError(f"x must be (B, L, D) and dt (B, L, K, R), got {list(x.shape)} and {list(dt.shape)}")
    batch, length, channels = x.shape
    groups, rank = dt.size(2), dt.size(3)
    if groups < 1:
        raise ValueError(f"dt must have at least one group, got {list(dt.shape)}")
    check_operand("dt", dt, x, [batch, length, groups, rank])
    check_operand("B", B, x, [batch, length, groups])
    check_operand("C", C, x, [batch, length, groups])
    check_parameter("dt_weight", dt_weight, x, [groups, channels, rank])
    if dt_bias is not None:
        check_parameter("dt_bias", dt_bias, x, [groups, channels])
    check_parameter("A_log", A_log, x, [groups, channels])
    if D_skip is not None:
        check_parameter("D_skip", D_skip, x, [channels])
    if direction not in ("up", "down"):
        raise ValueError(f"direction must be 'up' or 'down', got '{direction}'")
    if dtype is not None and dtype != x.dtype and (x.dtype == torch.float64 or dtype != torch.float32):
        raise TypeError(f"dtype must be {x.dtype}, that of x, or the one of its sums, got {dtype}")
    tree = _checked_tree(x, tree, [groups, length], False)
    if not torch.jit.is_scripting():  # noqa: SIM102 (as in tree_scan)
        if _transforms.active():
            return _transforms.merged_scan(x, dt, dt_weight, dt_bias, A_log, B, C, D_skip, *tree, direction, dtype)[0]
    keep = False
    # A traced call is traced once more without gradients, and the two must be the same.
    if torch.is_grad_enabled() or torch.jit.is_tracing():
        for operand in (x, dt, dt_weight, dt_bias, A_log, B, C, D_skip):
            if operand is not None and operand.requires_grad:
                keep = True
    return torch.ops.grootvl_ops.merged_scan(
        x,
        dt,
        dt_weight,
        dt_bias,
        A_log,
        B,
        C,
        D_skip,
        tree.parent,
        tree.order,
        tree.subtree_size,
        direction,
        dtype,
        keep,
    )[0]


def _check_direction(direction: str) -> None:
    if direction not in ("both", "up", "down"):
        raise ValueError(f"direction must be 'both', 'up' or 'down', got '{direction}'")


def _tree_for(x: Tensor, tree: Tree) -> Tree:
    """The tree for each image of x, after a check that it fits."""
    shape = list(x.shape[:2])
    tree = _checked_tree(x, tree, shape, True)
    if tree.parent.size(0) == shape[0] and tree.order.size(0) == shape[0] and tree.subtree_size.size(0) == shape[0]:
        return tree
    return Tree(tree.parent.expand(shape), tree.order.expand(shape), tree.subtree_size.expand(shape))


def _checked_tree(x: Tensor, tree: Tree, shape: list[int], or_one: bool) -> Tree:
    """The tree, whose fields must have a shape, or be those of one tree instead of several if `or_one`."""
    device = x.device
    for field in (tree.parent, tree.order, tree.subtree_size):
        is_one = or_one and field.dim() == 2 and field.size(0) == 1 and field.size(1) == shape[1]
        if list(field.shape) != shape and not is_one:
            allowed = "(1, L) or (B, L)" if or_one else "(K, L)"
            raise ValueError(
                f"the tree's fields must be {allowed} = {shape} for x {list(x.shape)}, got {list(field.shape)}"
            )
        if field.dtype != torch.int32:
            raise TypeError(f"the tree's fields must be int32, got {field.dtype}")
        if field.device != device:
            raise ValueError(f"x and the tree must be on one device, got {device} and {field.device}")
    if not torch.jit.is_scripting():  # noqa: SIM102 (as in tree_scan)
        if not torch.compiler.is_compiling():
            if _CHECK_TREES:
                check_tree(tree)
            if tree.parent.is_inference() and not torch.is_inference_mode_enabled():  # autograd keeps no such tensors
                tree = Tree(tree.parent.clone(), tree.order.clone(), tree.subtree_size.clone())
    return tree

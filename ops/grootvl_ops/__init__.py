"""Minimum spanning trees of feature maps, and scans along them: compiled operations for PyTorch.

    tree = grootvl_ops.build_tree(features)            # (B, H, W, C) -> Tree over L = H * W vertices
    h = grootvl_ops.tree_scan(x, decay, tree)          # (B, L, D), (B, L, D) -> (B, L, D)

The operations come from GrootVL / MambaTree (arXiv 2406.02395). They run on compiled kernels for CPU and CUDA where the
package was installed with a compiler, and on `grootvl_ops.reference` elsewhere; `backend()` tells which.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library
from .reference import METRICS, grid_edges

__all__ = [
    "METRICS",
    "Tree",
    "backend",
    "build_tree",
    "build_tree_from_edges",
    "build_tree_from_grid",
    "edge_weights",
    "gated_norm",
    "grid_edges",
    "layer_norm",
    "selective_scan",
    "tree_scan",
]

try:
    __version__ = version("grootvl-ops")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"


class Tree(NamedTuple):
    """B rooted trees over L vertices each, every field (B, L) int32.

    Made by `build_tree`, `build_tree_from_grid` and `build_tree_from_edges`. The scan relies on the properties named
    here and does not check them.
    """

    parent: Tensor
    """The parent of each vertex; a root is its own parent."""
    order: Tensor
    """The vertices in depth-first preorder: each before its children, every subtree in one piece, and the children of a
    vertex by growing size of their subtrees (equal sizes: by vertex number). Backwards it is a postorder in which the
    largest subtree comes first, the order in which a scan from the leaves has the least to remember."""
    subtree_size: Tensor
    """The number of vertices in the subtree of each vertex, itself included."""


def edge_weights(features: Tensor, metric: str = "cosine") -> Tensor:
    """Weights of the edges between neighbouring pixels, by which `build_tree` chooses its edges (paper, section 3.2).

    Args:
        features: (B, H, W, C), floating point. Need not be contiguous.
        metric: "cosine": exp(-cos(f_i, f_j)); "euclidean" and "manhattan": the distance of f_i and f_j.

    Returns:
        (B, E) with E = (H - 1) W + H (W - 1), in the order of `grid_edges`: all vertical edges, then all horizontal.
        float64 for float64 features, else float32. Not differentiable: no gradient passes through the choice of a tree.

    Raises:
        ValueError: wrong rank, no pixels or channels, or an unknown metric.
        TypeError: features that are not floating point.
    """
    if features.dim() != 4:
        raise ValueError(f"features must be (B, H, W, C), got {list(features.shape)}")
    if features.size(1) < 1 or features.size(2) < 1 or features.size(3) < 1:
        raise ValueError(f"features need at least one pixel and one channel, got {list(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}")
    if metric not in ("cosine", "euclidean", "manhattan"):
        raise ValueError(f"metric must be 'cosine', 'euclidean' or 'manhattan', got '{metric}'")
    return torch.ops.grootvl_ops.edge_weights(features.detach(), metric)


def build_tree(features: Tensor, metric: str = "cosine", root: int = 0) -> Tree:
    """Minimum spanning tree of the 4-neighbour grid over a feature map (paper, section 3.2), rooted and ordered.

    Args:
        features: (B, H, W, C), floating point. NaN counts as the largest weight an edge can have.
        metric: see `edge_weights`.
        root: row-major number of the root pixel, 0 to H * W - 1.

    Returns:
        `Tree` over L = H * W vertices. Edges of equal weight: the lower number of `grid_edges` wins.

    Raises:
        ValueError, TypeError: as `edge_weights`, or a root outside the map.
    """
    weights = edge_weights(features, metric)
    return build_tree_from_grid(weights, features.size(1), features.size(2), root)


def build_tree_from_grid(weights: Tensor, height: int, width: int, root: int = 0) -> Tree:
    """`build_tree` from edge weights of a height x width grid: (B, E) in the order of `grid_edges`.

    Raises:
        ValueError: sizes that do not fit each other, or a root outside the map.
        TypeError: weights that are not floating point.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a map needs at least one pixel, got {height} x {width}")
    num_edges = (height - 1) * width + height * (width - 1)
    if weights.dim() != 2 or weights.size(1) != num_edges:
        raise ValueError(
            f"weights must be (B, {num_edges}) for a {height} x {width} map, got {list(weights.shape)}"
        )
    _check_weights_and_root(weights, height * width, root)
    parent, order, subtree_size = torch.ops.grootvl_ops.grid_tree(_plain(weights), height, width, root)
    return Tree(parent, order, subtree_size)


def build_tree_from_edges(edges: Tensor, weights: Tensor, num_vertices: int, root: int = 0) -> Tree:
    """Minimum spanning tree of any connected graph, rooted and ordered.

    Args:
        edges: (E, 2), one graph for the whole batch, or (B, E, 2); int32 or int64 vertex numbers. Their direction, and
            edges from a vertex to itself, do not matter; of equal weights the lower edge number wins.
        weights: (B, E), floating point. NaN counts as the largest weight.
        num_vertices: L.
        root: the root vertex, 0 to L - 1.

    Returns:
        `Tree` over L vertices.

    Raises:
        ValueError: sizes that do not fit, a root out of range; on the CPU also edges out of range or a graph that is
            not connected. On CUDA, where looking would mean waiting for the GPU, edges out of range are left out, and
            the parts of an unconnected graph become trees of their own, each rooted at its lowest vertex.
        TypeError: edges that are not int32 or int64, weights that are not floating point.
    """
    if edges.dtype != torch.int32 and edges.dtype != torch.int64:
        raise TypeError(f"edges must be int32 or int64, got {edges.dtype}")
    if weights.dim() != 2:
        raise ValueError(f"weights must be (B, E), got {list(weights.shape)}")
    if edges.dim() == 2:
        edges = edges.unsqueeze(0).expand(weights.size(0), edges.size(0), edges.size(1))
    if edges.dim() != 3 or edges.size(0) != weights.size(0) or edges.size(1) != weights.size(1) or edges.size(2) != 2:
        raise ValueError(
            f"edges must be (E, 2) or (B, E, 2) for weights (B, E), got {list(edges.shape)} and {list(weights.shape)}"
        )
    if edges.device != weights.device:
        raise ValueError(f"edges and weights must be on one device, got {edges.device} and {weights.device}")
    if num_vertices < 1:
        raise ValueError(f"num_vertices must be at least 1, got {num_vertices}")
    _check_weights_and_root(weights, num_vertices, root)
    parent, order, subtree_size = torch.ops.grootvl_ops.graph_tree(edges, _plain(weights), num_vertices, root)
    return Tree(parent, order, subtree_size)


def _check_weights_and_root(weights: Tensor, num_vertices: int, root: int) -> None:
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    if root < 0 or root >= num_vertices:
        raise ValueError(f"root must be from 0 to {num_vertices - 1}, got {root}")


def _plain(weights: Tensor) -> Tensor:
    """Detached, and float32 or float64: the comparison of half-precision weights is exact in float32."""
    weights = weights.detach()
    return weights if weights.dtype == torch.float64 else weights.float()


def tree_scan(x: Tensor, decay: Tensor, tree: Tree, up_only: bool = False) -> Tensor:
    """Aggregate features along a tree (paper, Algorithm 1): h_i = sum_j (product of decays from j to i) x_j.

    The decay of a vertex belongs to the edge to its parent and is applied in both directions; a root's is not used. The
    sum runs over all vertices j of the tree, in two sweeps; with `up_only` over the subtree below i, in one.

    Args:
        x: (B, L, D), floating point: what is aggregated.
        decay: (B, L, D), of the same dtype, usually in (0, 1).
        tree: from `build_tree` and its kin.
        up_only: only the sweep from the leaves to the root.

    Returns:
        (B, L, D) of x's dtype. Accumulated in float32 (float64 for float64). Bitwise the same in every run.
        Differentiable once for x and decay. Under autocast it runs in float32.

    Raises:
        ValueError: sizes or devices that do not fit.
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
    _check_tree(tree, x)
    return torch.ops.grootvl_ops.tree_scan(x, decay, tree.parent, tree.order, tree.subtree_size, up_only)


def _check_tree(tree: Tree, x: Tensor) -> None:
    shape = list(x.shape[:2])
    for indices in (tree.parent, tree.order, tree.subtree_size):
        if list(indices.shape) != shape:
            raise ValueError(
                f"the tree's fields must be (B, L) = {shape} for x {list(x.shape)}, got {list(indices.shape)}"
            )
        if indices.dtype != torch.int32:
            raise TypeError(f"the tree's fields must be int32, got {indices.dtype}")
        if indices.device != x.device:
            raise ValueError(f"x and the tree must be on one device, got {x.device} and {indices.device}")


def selective_scan(
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    B: Tensor,
    tree: Tree,
    up_only: bool = False,
) -> Tensor:
    """A selective state space model with a state of size one along a tree (paper, section 3.2 and Algorithm 1):

        delta = softplus(dt_weight dt + dt_bias),  h = tree_scan(delta B x, exp(-exp(A_log) delta)).

    On CUDA the discretisation is part of the scan: neither decays nor scaled inputs are written to memory, and the
    backward pass computes them once more from what the forward pass was given.

    Args:
        x: (B, L, D), floating point: what is aggregated.
        dt: (B, L, R), of x's dtype: each pixel's step size, of low rank.
        dt_weight: (D, R), from rank to channels.
        dt_bias: (D).
        A_log: (D), logarithm of the rate of decay.
        B: (B, L), of x's dtype: each pixel's weight of its input.
        tree: over the L pixels.
        up_only: see `tree_scan`.

    Returns:
        (B, L, D) of x's dtype. Computed in float32 (float64 for float64), but for the product of dt and dt_weight,
        which on CUDA is rounded to x's dtype. Bitwise the same in every run. Differentiable once for all but the tree.

    Raises:
        ValueError: sizes or devices that do not fit.
        TypeError: dtypes that do not fit.
    """
    if x.dim() != 3 or dt.dim() != 3:
        raise ValueError(f"x must be (B, L, D) and dt (B, L, R), got {list(x.shape)} and {list(dt.shape)}")
    batch, length, channels = x.shape
    _check_operand("dt", dt, x, [batch, length, dt.size(2)])
    _check_operand("B", B, x, [batch, length])
    _check_parameter("dt_weight", dt_weight, x, [channels, dt.size(2)])
    _check_parameter("dt_bias", dt_bias, x, [channels])
    _check_parameter("A_log", A_log, x, [channels])
    _check_tree(tree, x)
    return torch.ops.grootvl_ops.selective_scan(
        x, dt, dt_weight, dt_bias, A_log, B, tree.parent, tree.order, tree.subtree_size, up_only
    )


def gated_norm(
    h: Tensor,
    x: Tensor,
    z: Tensor,
    C: Tensor,
    D_skip: Tensor,
    h_weight: Tensor,
    h_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """What follows the scan (paper, Algorithm 1): LN(C LN(h) + D_skip x) SiLU(z), in one pass over the maps on CUDA.

    Args:
        h, x, z: (B, L, D), floating point, of one dtype: the scan's result, what went into it, and the gate.
        C: (B, L), of h's dtype: each pixel's weight of its output.
        D_skip: (D).
        h_weight, h_bias: (D), of the norm of h.
        out_weight, out_bias: (D), of the outer norm.
        eps: of both norms.

    Returns:
        (B, L, D) of h's dtype, computed in float32 (float64 for float64). Bitwise the same in every run.
        Differentiable once.

    Raises:
        ValueError: sizes or devices that do not fit, or more channels than the kernel takes: on CUDA 1024, or times as
            many as 16 bytes hold if that divides the number of channels.
        TypeError: dtypes that do not fit.
    """
    if h.dim() != 3:
        raise ValueError(f"h must be (B, L, D), got {list(h.shape)}")
    batch, length, channels = h.shape
    _check_operand("x", x, h, [batch, length, channels])
    _check_operand("z", z, h, [batch, length, channels])
    _check_operand("C", C, h, [batch, length])
    _check_parameter("D_skip", D_skip, h, [channels])
    _check_parameter("h_weight", h_weight, h, [channels])
    _check_parameter("h_bias", h_bias, h, [channels])
    _check_parameter("out_weight", out_weight, h, [channels])
    _check_parameter("out_bias", out_bias, h, [channels])
    out, _ = torch.ops.grootvl_ops.gated_norm(
        h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias, eps
    )
    return out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm over the last dimension. On CUDA one pass over the map, also where the result is to be of another
    precision than x, and several times as fast as PyTorch's for a few hundred channels.

    Args:
        x: (..., C), floating point.
        weight, bias: (C).
        eps: is added to the variance.
        dtype: of the result; None for that of x. On CUDA it may differ between float32 and a half precision.

    Returns:
        (..., C), computed in float32 (float64 for float64), whether or not under autocast. Bitwise the same in every
        run. Differentiable once.

    Raises:
        ValueError: sizes or devices that do not fit, or more channels than the kernel takes (see `gated_norm`).
        TypeError: dtypes that do not fit.
    """
    if x.dim() < 1:
        raise ValueError(f"x must be (..., C), got {list(x.shape)}")
    _check_parameter("weight", weight, x, [x.size(-1)])
    _check_parameter("bias", bias, x, [x.size(-1)])
    out, _ = torch.ops.grootvl_ops.layer_norm(x, weight, bias, eps, dtype)
    return out


def _check_parameter(name: str, parameter: Tensor, like: Tensor, shape: list[int]) -> None:
    if list(parameter.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {list(parameter.shape)}")
    if not parameter.is_floating_point() or not like.is_floating_point():
        raise TypeError(f"{name} and what it works on must be floating point, got {parameter.dtype} and {like.dtype}")
    if parameter.device != like.device:
        raise ValueError(f"{name} must be on the same device as its input, got {parameter.device} and {like.device}")


def _check_operand(name: str, operand: Tensor, like: Tensor, shape: list[int]) -> None:
    _check_parameter(name, operand, like, shape)
    if operand.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of its fellow inputs, {like.dtype}, got {operand.dtype}")


def backend(device: str | torch.device = "cpu") -> str:
    """What serves tensors on `device`: "compiled" (kernels of the compiled library) or "reference" (plain PyTorch)."""
    return "compiled" if _library.has_kernels(torch.device(device).type) else "reference"

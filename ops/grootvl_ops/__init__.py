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
    "grid_edges",
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
    for indices in (tree.parent, tree.order, tree.subtree_size):
        if indices.dim() != 2 or indices.size(0) != x.size(0) or indices.size(1) != x.size(1):
            raise ValueError(
                f"the tree's fields must be (B, L) = {[x.size(0), x.size(1)]} for x {list(x.shape)}, "
                f"got {list(indices.shape)}"
            )
        if indices.dtype != torch.int32:
            raise TypeError(f"the tree's fields must be int32, got {indices.dtype}")
        if indices.device != x.device or decay.device != x.device:
            raise ValueError(
                f"x, decay and the tree must be on one device, got {x.device}, {decay.device} and {indices.device}"
            )
    return torch.ops.grootvl_ops.tree_scan(x, decay, tree.parent, tree.order, tree.subtree_size, up_only)


def backend(device: str | torch.device = "cpu") -> str:
    """What serves tensors on `device`: "compiled" (kernels of the compiled library) or "reference" (plain PyTorch)."""
    return "compiled" if _library.has_kernels(torch.device(device).type) else "reference"

"""Rooted trees over the pixels of a map, the vertices of a graph, or along a path."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _registration  # noqa: F401  registers the operations
from .reference import METRICS, grid_edges

__all__ = [
    "METRICS",
    "Tree",
    "build_tree",
    "build_tree_from_edges",
    "build_tree_from_grid",
    "check_tree",
    "edge_weights",
    "grid_edges",
    "neighbour_cosines",
    "path_tree",
]


class Tree(NamedTuple):
    """B rooted trees over L vertices each, every field (B, L) int32.

    Made by `build_tree`, `build_tree_from_grid`, `build_tree_from_edges` and `path_tree`. The scans rely on the
    properties named here and do not check them. They take a tree of batch size one for any batch.
    """

    parent: Tensor
    """The parent of each vertex; a root is its own parent."""
    order: Tensor
    """The vertices in depth-first preorder: each before its children, every subtree in one piece, and the children of a
    vertex by growing size of their subtrees (equal sizes: by vertex number). Backwards it is a postorder in which the
    largest subtree comes first, the order in which a scan from the leaves has the least to remember."""
    subtree_size: Tensor
    """The number of vertices in the subtree of each vertex, itself included."""


torch.serialization.add_safe_globals([Tree])  # so that torch.load takes trees by default


def edge_weights(features: Tensor, metric: str = "cosine") -> Tensor:
    """Weights of the edges between neighbouring pixels, by which `build_tree` chooses its edges (paper, section 3.2).

    Args:
        features: (B, H, W, C), or (B, T, H, W, C) for clips of T frames, floating point. Need not be contiguous.
        metric: "cosine": exp(-cos(f_i, f_j)); "euclidean" and "manhattan": the distance of f_i and f_j.

    Returns:
        (B, E) in the order of `grid_edges`, with E = (H - 1) W + H (W - 1) for maps and
        E = (T - 1) H W + T (H - 1) W + T H (W - 1) for clips. float64 for float64 features, else float32. Not
        differentiable: no gradient passes through the choice of a tree.

    Raises:
        ValueError: wrong rank, no pixels or channels, or an unknown metric.
        TypeError: features that are not floating point.
    """
    if features.dim() != 4 and features.dim() != 5:
        raise ValueError(f"features must be (B, H, W, C) or (B, T, H, W, C), got {list(features.shape)}")
    for axis in range(1, features.dim()):
        if features.size(axis) < 1:
            raise ValueError(f"features need at least one pixel and one channel, got {list(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}")
    if metric not in ("cosine", "euclidean", "manhattan"):
        raise ValueError(f"metric must be 'cosine', 'euclidean' or 'manhattan', got '{metric}'")
    features = features.detach()
    if features.dim() == 4:
        return torch.ops.grootvl_ops.edge_weights(features, metric)
    # A clip is a batch of frames, and, with each frame laid out as one row, a batch of maps whose vertical edges are
    # those in time.
    batch, frames, height, width, _ = features.shape
    spatial = torch.ops.grootvl_ops.edge_weights(features.flatten(0, 1), metric)
    across = torch.ops.grootvl_ops.edge_weights(features.flatten(2, 3), metric)
    num_vertical = (height - 1) * width
    in_time = across[:, : (frames - 1) * height * width]
    vertical = spatial[:, :num_vertical].reshape(batch, frames * num_vertical)
    horizontal = spatial[:, num_vertical:].reshape(batch, frames * height * (width - 1))
    return torch.cat((in_time, vertical, horizontal), dim=1)


def neighbour_cosines(x: Tensor, neighbours: int) -> Tensor:
    """Cosines of the vectors of a sequence with those shortly before them: weights for a graph in which each token is
    joined to its predecessors (paper, section 3.3).

    Args:
        x: (B, L, D), floating point. Need not be contiguous.
        neighbours: how many of the vectors before each one, at least 1.

    Returns:
        (B, L, neighbours): at [b, t, d - 1] cos(x_t, x_(t-d)), with norms of at least 1e-8; 0 for d > t. float64 for
        float64 x, else float32. Not differentiable: no gradient passes through the choice of a tree.

    Raises:
        ValueError: wrong rank, no channels, or `neighbours` below 1.
        TypeError: x that is not floating point.
    """
    if x.dim() != 3 or x.size(2) < 1:
        raise ValueError(f"x must be (B, L, D) with D > 0, got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    return torch.ops.grootvl_ops.neighbour_cosines(x.detach(), neighbours)


def build_tree(features: Tensor, metric: str = "cosine", root: int = 0) -> Tree:
    """Minimum spanning tree of the grid of pixels of a feature map (paper, section 3.2), rooted and ordered.

    A pixel of a map has four neighbours; a pixel of a clip of several frames has six.

    Args:
        features: (B, H, W, C), or (B, T, H, W, C) for clips of T frames, floating point. NaN counts as the largest
            weight an edge can have.
        metric: see `edge_weights`.
        root: row-major number of the root pixel, from 0 to L - 1.

    Returns:
        `Tree` over L = H * W (or T * H * W) vertices. Edges of equal weight: the lower number of `grid_edges` wins.

    Raises:
        ValueError, TypeError: as `edge_weights`, or a root outside the map.
    """
    weights = edge_weights(features, metric)
    frames = features.size(1) if features.dim() == 5 else 1
    return build_tree_from_grid(weights, features.size(-3), features.size(-2), root, frames)


def build_tree_from_grid(weights: Tensor, height: int, width: int, root: int = 0, frames: int = 1) -> Tree:
    """`build_tree` from edge weights of a grid of frames x height x width: (B, E) in the order of `grid_edges`.

    Raises:
        ValueError: sizes that do not fit each other, or a root outside the map.
        TypeError: weights that are not floating point.
    """
    if frames < 1 or height < 1 or width < 1:
        raise ValueError(f"a map needs at least one pixel, got {_size(height, width, frames)}")
    in_plane = (height - 1) * width + height * (width - 1)
    num_edges = (frames - 1) * height * width + frames * in_plane
    if weights.dim() != 2 or weights.size(1) != num_edges:
        size = _size(height, width, frames)
        raise ValueError(f"weights must be (B, {num_edges}) for a {size} map, got {list(weights.shape)}")
    _check_weights_and_root(weights, frames * height * width, root)
    if frames == 1:
        parent, order, subtree_size = torch.ops.grootvl_ops.grid_tree(_comparable(weights), height, width, root)
        return Tree(parent, order, subtree_size)
    return build_tree_from_edges(
        grid_edges(height, width, frames, weights.device), weights, frames * height * width, root
    )


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
    weights = _comparable(weights)
    if torch.jit.is_scripting():
        parent, order, subtree_size = torch.ops.grootvl_ops.graph_tree(edges, weights, num_vertices, root)
    else:
        parent, order, subtree_size = _graph_tree(edges, weights, num_vertices, root)
    return Tree(parent, order, subtree_size)


def _graph_tree(edges: Tensor, weights: Tensor, num_vertices: int, root: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operation. Its kernels look at the edges; PyTorch since 2.15 makes their ValueError a RuntimeError."""
    try:
        return torch.ops.grootvl_ops.graph_tree(edges, weights, num_vertices, root)
    except RuntimeError as error:
        if str(error).startswith(("edges must", "the graph is not connected")):
            raise ValueError(str(error)) from None
        raise


def _size(height: int, width: int, frames: int) -> str:
    return f"{height} x {width}" if frames == 1 else f"{frames} x {height} x {width}"


def _check_weights_and_root(weights: Tensor, num_vertices: int, root: int) -> None:
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    check_root(root, num_vertices)


def check_root(root: int, num_vertices: int) -> None:
    """That the number of a root is one of a vertex."""
    if root < 0 or root >= num_vertices:
        raise ValueError(f"root must be from 0 to {num_vertices - 1}, got {root}")


def _comparable(weights: Tensor) -> Tensor:
    """Detached, and float32 or float64: the comparison of half-precision weights is exact in float32."""
    weights = weights.detach()
    return weights if weights.dtype == torch.float64 else weights.float()


def path_tree(order: Tensor) -> Tree:
    """Trees that are one path each, through the vertices in the given order: the first is the root.

    Scans along a path are the scans of sequences: with `direction="down"` that of Mamba, from the first vertex to the
    last. A path depends on the order alone. Make it once and use it for every map of its size: a tree of batch size one
    is taken for any batch.

    Args:
        order: (L,), or (B, L), int32 or int64: each row a permutation of 0 to L - 1.

    Returns:
        `Tree` over L vertices, of batch size one or B, on the device of `order`.

    Raises:
        ValueError: another rank, or a row that is not a permutation. On CUDA, to look means to wait for the GPU.
        TypeError: an order that is neither int32 nor int64.
    """
    if order.dtype != torch.int32 and order.dtype != torch.int64:
        raise TypeError(f"order must be int32 or int64, got {order.dtype}")
    if order.dim() == 1:
        order = order.unsqueeze(0)
    if order.dim() != 2 or order.size(1) < 1:
        raise ValueError(f"order must be (L,) or (B, L) with at least one vertex, got {list(order.shape)}")
    parent, preorder, subtree_size = torch.ops.grootvl_ops.path_tree(order)
    return Tree(parent, preorder, subtree_size)


@torch.no_grad()
def check_tree(tree: Tree) -> None:
    """Raise unless a tree has every property that `Tree` names. For trees made by hand.

    The scans do not look: on a tree that is none they give numbers without a meaning. On the CPU they refuse vertices
    out of range, cycles, and an order in which a child comes before its parent. With GROOTVL_CHECK_TREES=1 in the
    environment they call this function, on every device. On CUDA it waits for the GPU.

    Args:
        tree: Several roots are allowed: the fields then describe a forest, one tree after the other.

    Raises:
        ValueError: names the first image and vertex at which a property fails.
        TypeError: fields that are not int32.
    """
    shape = list(tree.parent.shape)
    for name, field in zip(Tree._fields, tree):  # noqa: B905 (TorchScript knows no strict)
        if field.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {field.dtype}")
        if field.dim() != 2 or list(field.shape) != shape:
            raise ValueError(f"the tree's fields must all be (B, L), got {shape} and {name} {list(field.shape)}")
        if field.device != tree.parent.device:
            raise ValueError(f"the tree's fields must be on one device, got {tree.parent.device} and {field.device}")
    length = shape[1]
    parent, order, size = tree.parent.long(), tree.order.long(), tree.subtree_size.long()
    vertices = torch.arange(length, device=parent.device).expand(shape)

    def require(holds: Tensor, what: str) -> None:
        if not bool(holds.all()):
            image, vertex = (~holds).nonzero()[0].tolist()
            raise ValueError(f"not a tree: {what}; first at vertex {vertex} of image {image}")

    require((parent >= 0) & (parent < length), f"parents must be from 0 to {length - 1}")
    found = torch.zeros_like(order).scatter_add_(1, order.clamp(0, length - 1), torch.ones_like(order))
    outside = (order < 0) | (order >= length)
    require(~outside.any(1, keepdim=True) & (found == 1), "order must hold each vertex once")
    position = torch.empty_like(order).scatter_(1, order, vertices)
    is_root = parent == vertices
    require(is_root | (position.gather(1, parent) < position), "parents must come before their children in order")
    below = torch.ones_like(size).scatter_add_(1, parent, size.masked_fill(is_root, 0))
    require(size == below, "subtree_size must count the vertices of each subtree")

    # Siblings, and roots, which count as siblings in the order in which they come: each begins where the sizes of those
    # before it end.
    family = torch.where(is_root, -1, parent)
    rank = torch.where(is_root, position, size * length + vertices)
    siblings = rank.argsort(dim=1, stable=True)
    siblings = siblings.gather(1, family.gather(1, siblings).argsort(dim=1, stable=True))
    sizes, families = size.gather(1, siblings), family.gather(1, siblings)
    before = sizes.cumsum(1) - sizes
    first = torch.ones_like(is_root)
    first[:, 1:] = families[:, 1:] != families[:, :-1]
    start = torch.where(first, before, 0).cummax(1).values
    within = torch.empty_like(size).scatter_(1, siblings, before - start)
    begin = torch.where(is_root, 0, position.gather(1, parent) + 1)
    require(position == begin + within, "order must be the preorder in which smaller subtrees come first")

"""Edge weights, minimum spanning trees and paths, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scans import accumulation_dtype

METRICS = ("cosine", "euclidean", "manhattan")


def grid_edges(height: int, width: int, frames: int = 1, device: torch.device | None = None) -> Tensor:
    """The edges of a grid as an (E, 2) int64 tensor of row-major vertex numbers.

    A pixel has four neighbours; a pixel of a clip of several frames has six. The edges are numbered axis by axis, each
    axis in the row-major order of the edges' first ends: first all edges in time, then all vertical ones, then all
    horizontal ones. This numbering decides between edges of equal weight.
    """
    vertices = torch.arange(frames * height * width, device=device).view(frames, height, width)
    in_time = torch.stack((vertices[:-1], vertices[1:]), dim=-1).reshape(-1, 2)
    vertical = torch.stack((vertices[:, :-1], vertices[:, 1:]), dim=-1).reshape(-1, 2)
    horizontal = torch.stack((vertices[:, :, :-1], vertices[:, :, 1:]), dim=-1).reshape(-1, 2)
    return torch.cat((in_time, vertical, horizontal))


def edge_weights(features: Tensor, metric: str) -> Tensor:
    """Dissimilarity of neighbouring pixels: (B, E) weights in the order of `grid_edges`.

    Features are (B, H, W, C), or (B, T, H, W, C). Computed in float32 (float64 for float64 features). Cosine:
    exp(-cos(f_i, f_j)) (paper, section 3.2), with norms of at least 1e-8. Euclidean and Manhattan: the distance of the
    two feature vectors.
    """
    features = features.to(accumulation_dtype(features.dtype))

    def weigh(f: Tensor, g: Tensor) -> Tensor:
        if metric == "cosine":
            norms = f.square().sum(-1).sqrt().clamp(min=1e-8) * g.square().sum(-1).sqrt().clamp(min=1e-8)
            return torch.exp(-(f * g).sum(-1) / norms)
        if metric == "euclidean":
            return (f - g).square().sum(-1).sqrt()
        return (f - g).abs().sum(-1)

    weights = []
    for axis in range(1, features.dim() - 1):
        edges = features.shape[axis] - 1
        weights.append(weigh(features.narrow(axis, 0, edges), features.narrow(axis, 1, edges)).flatten(1))
    return torch.cat(weights, dim=1)


def neighbour_cosines(x: Tensor, neighbours: int) -> Tensor:
    """Cosines of the vectors of a sequence with those before them: (B, L, neighbours) of x (B, L, D), in float32 (or
    float64), with norms of at least 1e-8. At [b, t, d - 1] is cos(x_t, x_(t-d)), and 0 for d > t."""
    x = x.to(accumulation_dtype(x.dtype))
    length = x.shape[1]
    norm = x.square().sum(-1).sqrt().clamp(min=1e-8)
    cosines = [norm.new_zeros((*norm.shape, 0))]
    for distance in range(1, min(neighbours + 1, length)):
        product = (x[:, distance:] * x[:, :-distance]).sum(-1)
        cosine = product / (norm[:, distance:] * norm[:, :-distance])
        cosines.append(F.pad(cosine, (distance, 0)).unsqueeze(-1))
    return F.pad(torch.cat(cosines, dim=-1), (0, neighbours + 1 - len(cosines)))


def kruskal(edges: list[list[int]], weights: Tensor, num_vertices: int) -> list[list[int]]:
    """The neighbours of each vertex in the minimum spanning tree of one graph (weights: (E,)).

    Lighter edges first; of equal weights the one with the lower number; NaN counts as heavier than any number.
    """
    if len(edges) < num_vertices - 1:  # before memory for that many vertices is asked for
        raise ValueError(
            f"the graph is not connected: a tree over {num_vertices} vertices needs {num_vertices - 1} edges, "
            f"but only {len(edges)} are given"
        )
    component = list(range(num_vertices))

    def find(vertex: int) -> int:
        while component[vertex] != vertex:
            component[vertex] = component[component[vertex]]
            vertex = component[vertex]
        return vertex

    neighbours: list[list[int]] = [[] for _ in range(num_vertices)]
    joined = 1
    for edge in torch.sort(weights, stable=True).indices.tolist():  # torch.sort puts NaN last
        u, v = edges[edge]
        root_u, root_v = find(u), find(v)
        if root_u != root_v:
            component[root_u] = root_v
            neighbours[u].append(v)
            neighbours[v].append(u)
            joined += 1
    if joined < num_vertices:
        raise ValueError(
            f"the graph is not connected: a tree over {num_vertices} vertices needs {num_vertices - 1} edges, "
            f"but only {joined - 1} of those given join different parts"
        )
    return neighbours


def root_tree(neighbours: list[list[int]], root: int) -> tuple[list[int], list[int], list[int]]:
    """Parent, order and subtree size (see `grootvl_ops.Tree`) of a tree that is given by each vertex's neighbours."""
    num_vertices = len(neighbours)
    parent = [-1] * num_vertices
    parent[root] = root
    breadth_first = [root]
    for vertex in breadth_first:  # grows while it is walked
        for child in neighbours[vertex]:
            if child != parent[vertex]:
                parent[child] = vertex
                breadth_first.append(child)

    size = [1] * num_vertices
    for vertex in reversed(breadth_first[1:]):
        size[parent[vertex]] += size[vertex]

    order = []
    stack = [root]
    while stack:
        vertex = stack.pop()
        order.append(vertex)
        children = [child for child in neighbours[vertex] if child != parent[vertex]]
        # The stack hands back its last entry first: the smallest subtree is visited first, the largest last.
        stack.extend(sorted(children, key=lambda child: (size[child], child), reverse=True))
    return parent, order, size


def graph_tree(edges: Tensor, weights: Tensor, num_vertices: int, root: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rooted minimum spanning trees of B graphs, from edges (B, E, 2) and weights (B, E)."""
    if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= num_vertices):
        raise ValueError(
            f"edges must name vertices from 0 to {num_vertices - 1}, got {int(edges.min())} to {int(edges.max())}"
        )
    trees = [
        root_tree(kruskal(graph_edges, graph_weights, num_vertices), root)
        for graph_edges, graph_weights in zip(edges.tolist(), weights.detach().cpu(), strict=True)
    ]
    table = torch.tensor(trees, dtype=torch.int32, device=weights.device).view(-1, 3, num_vertices)
    parent, order, subtree_size = table.permute(1, 0, 2).contiguous()
    return parent.clone(), order.clone(), subtree_size.clone()  # results of an operation must not share memory


def grid_tree(weights: Tensor, height: int, width: int, root: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rooted minimum spanning trees of 4-neighbour grids with (B, E) weights in the order of `grid_edges`."""
    edges = grid_edges(height, width).expand(weights.shape[0], -1, -1)
    return graph_tree(edges, weights, height * width, root)


def path_tree(order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parent, order and subtree size of B trees that are one path each: order (B, L), from the root on."""
    length = order.shape[1]
    vertices = torch.arange(length, device=order.device, dtype=order.dtype)
    if not torch.equal(order.sort(dim=1).values, vertices.expand_as(order)):
        raise ValueError(f"each row of order must be a permutation of 0 to {length - 1}")
    above = torch.cat((order[:, :1], order[:, :-1]), dim=1)
    sizes = (length - vertices).expand_as(order)
    vertex = order.long()  # what scatter takes for an index
    parent = torch.empty_like(order, dtype=torch.int32).scatter_(1, vertex, above.int())
    subtree_size = torch.empty_like(order, dtype=torch.int32).scatter_(1, vertex, sizes.int())
    return parent, order.to(torch.int32, copy=True), subtree_size

"""What the tests compare with, written from the definitions and on other libraries than the code under test."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor

from grootvl_ops import Tree


def pixel_pairs(height: int, width: int) -> list[tuple[int, int]]:
    """The edges of a 4-neighbour grid: all vertical ones row by row, then all horizontal ones row by row."""
    vertical = [(y * width + x, (y + 1) * width + x) for y in range(height - 1) for x in range(width)]
    horizontal = [(y * width + x, y * width + x + 1) for y in range(height) for x in range(width - 1)]
    return vertical + horizontal


def edge_weights(features: Tensor, metric: str) -> Tensor:
    """Edge weights in float64 through torch.nn.functional, for (B, H, W, C) features."""
    pairs = torch.tensor(pixel_pairs(*features.shape[1:3]), dtype=torch.long).view(-1, 2)
    pixels = features.detach().cpu().double().flatten(1, 2)
    f, g = pixels[:, pairs[:, 0]], pixels[:, pairs[:, 1]]
    if metric == "cosine":
        return torch.exp(-F.cosine_similarity(f, g, dim=-1, eps=1e-8))
    return torch.linalg.vector_norm(f - g, ord={"euclidean": 2, "manhattan": 1}[metric], dim=-1)


def neighbour_cosines(x: Tensor, neighbours: int) -> Tensor:
    """In float64 through torch.nn.functional, one pair after the other."""
    vectors = x.detach().cpu().double()
    cosines = torch.zeros(*x.shape[:2], neighbours, dtype=torch.float64)
    for later in range(x.shape[1]):
        for distance in range(1, min(neighbours, later) + 1):
            pair = vectors[:, later], vectors[:, later - distance]
            cosines[:, later, distance - 1] = F.cosine_similarity(*pair, dim=-1, eps=1e-8)
    return cosines


def spanning_edges(edges: np.ndarray, weights: np.ndarray, num_vertices: int) -> np.ndarray:
    """The edges (L - 1, 2), sorted, of the minimum spanning tree of one graph; NaN is the largest weight.

    Each weight is replaced by its place among all weights, equal ones by edge number. That leaves no ties, so the tree
    is unique, and any algorithm finds the one that the rule for ties asks for.
    """
    rank = np.empty(len(weights), dtype=np.int64)
    rank[np.argsort(weights, kind="stable")] = np.arange(1, len(weights) + 1)
    low, high = np.sort(edges, axis=1).astype(np.int32).T  # the only indices that SciPy 1.15 takes
    kept = low != high
    low, high, rank = low[kept], high[kept], rank[kept]
    lightest = np.lexsort((rank, high, low))  # of parallel edges only the first can be in the tree
    low, high, rank = low[lightest], high[lightest], rank[lightest]
    first = np.ones(len(low), dtype=bool)
    first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    graph = coo_array((rank[first], (low[first], high[first])), shape=(num_vertices, num_vertices))
    tree = minimum_spanning_tree(graph.tocsr()).tocoo()
    ends = np.sort(np.stack((tree.row, tree.col), axis=1), axis=1)
    return ends[np.lexsort(ends.T[::-1])]


def rooted(edges: np.ndarray, num_vertices: int, root: int) -> tuple[list[int], list[int], list[int]]:
    """Parent, order and subtree size of the tree with these edges, as `grootvl_ops.Tree` documents them."""
    ends = edges.reshape(-1, 2).astype(np.int32).T
    graph = coo_array((np.ones(len(edges)), ends), shape=(num_vertices, num_vertices)).tocsr()
    visited, predecessor = breadth_first_order(graph, root, directed=False)
    assert len(visited) == num_vertices, "not a spanning tree"
    predecessor[root] = root
    return parent_to_tree(predecessor.tolist(), visited.tolist())


def parent_to_tree(parent: list[int], top_down: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The same from the parents and any order in which parents stand before children. Several roots are allowed."""
    num_vertices = len(parent)
    size = [1] * num_vertices
    for vertex in reversed(top_down):
        if parent[vertex] != vertex:
            size[parent[vertex]] += size[vertex]
    position, free = [0] * num_vertices, [0] * num_vertices
    placed = 0
    for vertex in sorted(vertex for vertex in top_down if parent[vertex] == vertex):
        position[vertex], free[vertex] = placed, placed + 1
        placed += size[vertex]
    # Parents keep their place in the sort, so each vertex is placed after its parent and after its smaller siblings.
    depth = [0] * num_vertices
    for vertex in top_down:
        if parent[vertex] != vertex:
            depth[vertex] = depth[parent[vertex]] + 1
    for vertex in np.lexsort((np.arange(num_vertices), size, depth)).tolist():
        above = parent[vertex]
        if above != vertex:
            position[vertex], free[vertex] = free[above], free[above] + 1
            free[above] += size[vertex]
    order = [0] * num_vertices
    for vertex, place in enumerate(position):
        order[place] = vertex
    return parent, order, size


def check_tree(tree: Tree, edges: np.ndarray | list, weights: Tensor, root: int = 0) -> None:
    """Asserts that `tree` is the minimum spanning tree of B graphs, edges (E, 2) or (B, E, 2), weights (B, E)."""
    edges, weights = np.asarray(edges, dtype=np.int64), weights.detach().cpu().double().numpy()
    edges = edges.reshape((len(weights), -1, 2) if edges.ndim == 3 else (-1, 2))
    num_vertices = tree.parent.shape[1]
    for field in tree:
        assert field.dtype == torch.int32
        assert field.shape == (len(weights), num_vertices)
        assert field.is_contiguous()
    assert len({field.untyped_storage().data_ptr() for field in tree}) == 3
    parents, orders, sizes = (field.cpu().numpy() for field in tree)
    for b in range(len(weights)):
        graph_edges = edges[b] if edges.ndim == 3 else edges
        expected = spanning_edges(graph_edges, weights[b], num_vertices)
        assert len(expected) == num_vertices - 1
        parent, order, size = rooted(expected, num_vertices, root)
        np.testing.assert_array_equal(parents[b], parent, err_msg="parent")
        np.testing.assert_array_equal(sizes[b], size, err_msg="subtree_size")
        np.testing.assert_array_equal(orders[b], order, err_msg="order")


def ancestors(parent: Tensor) -> Tensor:
    """(L, L) bool: whether i lies in the subtree of c, at [i, c]."""
    parents = parent.tolist()
    table = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for vertex in range(len(parents)):
        above = vertex
        while not table[vertex, above]:
            table[vertex, above] = True
            above = parents[above]
    return table


def dense_scan(x: Tensor, decay: Tensor, tree: Tree, direction: str = "both") -> Tensor:
    """h_i = sum_j (product of the decays on the path from j to i) x_j, in float64 and from the definition.

    The edge of vertex c to its parent is on the path between i and j if exactly one of them is in the subtree of c.
    The sum runs over all j of the tree ("both"), over the j below i ("up") or over the j above it ("down").
    Differentiable. Memory grows with L^3 D.
    """
    results = []
    for x_b, decay_b, parent in zip(x.double(), decay.double(), tree.parent, strict=True):
        below = ancestors(parent).to(x.device)
        is_root = parent == torch.arange(len(parent), device=x.device)
        on_path = (below[:, None] != below[None]) & ~is_root  # (i, j, c)
        products = torch.where(on_path[..., None], decay_b, decay_b.new_ones(())).prod(dim=2)  # (i, j, D)
        in_one_tree = (below[:, None] & below[None] & is_root).any(-1)
        counted = {"both": in_one_tree, "up": below.T, "down": below}[direction]
        results.append(torch.where(counted[..., None], products, 0).mul(x_b).sum(1))
    return torch.stack(results) if results else x.double()


def dense_gradients(
    x: Tensor, decay: Tensor, tree: Tree, grad: Tensor, direction: str = "both"
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `dense_scan` and, by autograd through it, the gradients for x and decay, in float64."""
    x, decay = x.detach().double().requires_grad_(), decay.detach().double().requires_grad_()
    h = dense_scan(x, decay, tree, direction)
    return (h.detach(), *torch.autograd.grad(h, (x, decay), grad.double()))


def message_gradients(
    x: Tensor, decay: Tensor, tree: Tree, grad: Tensor, direction: str = "both"
) -> tuple[Tensor, Tensor, Tensor]:
    """Result and gradients as `dense_gradients` gives them, in time that grows with L: by messages along the edges.

    Each edge carries two sums, of what lies below it (`below`) and of all else, seen from its upper end (`beyond`).
    The result at a vertex is what both bring, and an edge's decay weighs every pair of vertices on its two sides.
    """
    results = [torch.empty(x.shape, dtype=torch.float64) for _ in range(3)]
    for b in range(len(x)):
        x_b, decay_b, grad_b = (operand[b].detach().cpu().double().numpy() for operand in (x, decay, grad))
        parent, order = tree.parent[b].tolist(), tree.order[b].tolist()

        def messages(values: np.ndarray, a=decay_b, parent=parent, order=order) -> tuple[np.ndarray, np.ndarray]:
            below, beyond = values.copy(), np.zeros_like(values)
            for vertex in reversed(order):
                if parent[vertex] != vertex:
                    below[parent[vertex]] += a[vertex] * below[vertex]
            for vertex in order:
                above = parent[vertex]
                if above != vertex:
                    beyond[vertex] = below[above] - a[vertex] * below[vertex]
                    if parent[above] != above:
                        beyond[vertex] += a[above] * beyond[above]
            return below, beyond

        has_edge = (np.array(parent) != np.arange(len(parent)))[:, None]
        a = np.where(has_edge, decay_b, 0)
        below, beyond = messages(x_b)

        def passed_down(values: np.ndarray, a=decay_b, parent=parent, order=order) -> np.ndarray:
            sums = values.copy()
            for vertex in order:
                if parent[vertex] != vertex:
                    sums[vertex] += a[vertex] * sums[parent[vertex]]
            return sums

        if direction == "up":
            h, dx = below, passed_down(grad_b)
            da = below * dx[parent]
        elif direction == "down":
            h, (dx, _) = passed_down(x_b), messages(grad_b)
            da = dx * h[parent]
        else:
            grad_below, grad_beyond = messages(grad_b)
            h, dx = below + a * beyond, grad_below + a * grad_beyond
            da = grad_below * beyond + below * grad_beyond
        for result, value in zip(results, (h, dx, np.where(has_edge, da, 0)), strict=True):
            result[b] = torch.from_numpy(value)
    return tuple(result.to(x.device) for result in results)

"""The tree operations in plain PyTorch: short, obvious, for any device.

This file is the definition that the compiled kernels are tested against, and what runs where there are no compiled
kernels. Symbols are those of the GrootVL paper (arXiv 2406.02395): an input ``x`` (the paper's discretised input, xi),
a decay ``a`` for each vertex, which belongs to the edge between that vertex and its parent, and the tree itself.

Shapes: batch B, vertices L (L = H * W on a map, row-major), edges E, channels D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ("cosine", "euclidean", "manhattan")


def grid_edges(height: int, width: int) -> Tensor:
    """The edges of a 4-neighbour grid as an (E, 2) int64 tensor of row-major vertex numbers.

    All vertical edges come first (row-major by their upper pixel), then all horizontal ones (row-major). This numbering
    decides between edges of equal weight.
    """
    vertices = torch.arange(height * width).view(height, width)
    vertical = torch.stack((vertices[:-1], vertices[1:]), dim=-1).reshape(-1, 2)
    horizontal = torch.stack((vertices[:, :-1], vertices[:, 1:]), dim=-1).reshape(-1, 2)
    return torch.cat((vertical, horizontal))


def edge_weights(features: Tensor, metric: str) -> Tensor:
    """Dissimilarity of neighbouring pixels of (B, H, W, C) features: (B, E) weights in the order of `grid_edges`.

    Computed in float32 (float64 for float64 features). Cosine: exp(-cos(f_i, f_j)) (paper, section 3.2), with norms of
    at least 1e-8. Euclidean and Manhattan: the distance of the two feature vectors.
    """
    features = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32)

    def weigh(f: Tensor, g: Tensor) -> Tensor:
        if metric == "cosine":
            norms = f.square().sum(-1).sqrt().clamp(min=1e-8) * g.square().sum(-1).sqrt().clamp(min=1e-8)
            return torch.exp(-(f * g).sum(-1) / norms)
        if metric == "euclidean":
            return (f - g).square().sum(-1).sqrt()
        return (f - g).abs().sum(-1)

    vertical = weigh(features[:, :-1], features[:, 1:])
    horizontal = weigh(features[:, :, :-1], features[:, :, 1:])
    return torch.cat((vertical.flatten(1), horizontal.flatten(1)), dim=1)


def kruskal(edges: list[list[int]], weights: Tensor, num_vertices: int) -> list[list[int]]:
    """The neighbours of each vertex in the minimum spanning tree of one graph (weights: (E,)).

    Lighter edges first; of equal weights the one with the lower number; NaN counts as heavier than any number.
    """
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
    """Rooted minimum spanning trees of B graphs from edges (B, E, 2) and weights (B, E), as `build_tree_from_edges`."""
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


def levels(parent: Tensor, order: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The (batch index, vertex) pairs of each depth of the trees, from the roots down."""
    parents, orders = parent.tolist(), order.tolist()
    by_depth: list[list[tuple[int, int]]] = []
    for batch, (tree_parent, tree_order) in enumerate(zip(parents, orders, strict=True)):
        depth = [0] * len(tree_parent)
        for vertex in tree_order:
            if tree_parent[vertex] != vertex:
                depth[vertex] = depth[tree_parent[vertex]] + 1
            while depth[vertex] >= len(by_depth):
                by_depth.append([])
            by_depth[depth[vertex]].append((batch, vertex))
    return [tuple(torch.tensor(level, device=parent.device).unbind(1)) for level in by_depth]


def up_sweep(x: Tensor, decay: Tensor, parent: Tensor, order: Tensor) -> Tensor:
    """u_i = x_i + sum over the children c of i of a_c u_c (leaves to root)."""
    u = x.clone(memory_format=torch.contiguous_format)
    for batch, vertex in reversed(levels(parent, order)[1:]):
        above, values = parent[batch, vertex].long(), decay[batch, vertex] * u[batch, vertex]
        # Siblings share a row. index_put_ on CUDA and index_add_ on CPUs add them in a fixed order, but not vice versa.
        if u.is_cuda:
            u.index_put_((batch, above), values, accumulate=True)
        else:
            u.flatten(0, 1).index_add_(0, batch * u.shape[1] + above, values)
    return u


def down_sweep(u: Tensor, decay: Tensor, parent: Tensor, order: Tensor) -> Tensor:
    """h_root = u_root; h_i = (1 - a_i^2) u_i + a_i h_parent(i) (root to leaves)."""
    h = u.clone()
    for batch, vertex in levels(parent, order)[1:]:
        a = decay[batch, vertex]
        value = (1 - a.square()) * u[batch, vertex] + a * h[batch, parent[batch, vertex].long()]
        h.index_put_((batch, vertex), value)
    return h


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tree_scan(
    x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, subtree_size: Tensor, up_only: bool = False
) -> Tensor:
    """Aggregate x over the tree (paper, Algorithm 1): h_i = sum_j (product of the decays on the path from j to i) x_j.

    x, decay, result: (B, L, D). The sum runs over all vertices j, or with `up_only` over the subtree below i.
    """
    dtype = accumulation_dtype(x.dtype)
    a = decay.to(dtype)
    u = up_sweep(x.to(dtype), a, parent, order)
    return (u if up_only else down_sweep(u, a, parent, order)).to(x.dtype)


def tree_scan_backward(
    grad: Tensor, x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, subtree_size: Tensor, up_only: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of `tree_scan` for x and decay, (B, L, D) each.

    The scan over all roots is symmetric in its end points, so the gradient for x is the same scan of `grad`. With G_u
    and G_h its sweeps and p the parent of i, the edge's gradient is
    da_i = G_u,i (h_p - a_i u_i) + u_i (G_h,p - a_i G_u,i), and 0 at a root, which has no edge.
    With `up_only` the gradient flows from the root down: g_i = grad_i + a_i g_p and da_i = u_i g_p.
    """
    dtype = accumulation_dtype(x.dtype)
    a, g = decay.to(dtype), grad.to(dtype)
    u = up_sweep(x.to(dtype), a, parent, order)
    above = parent.long().unsqueeze(-1).expand_as(a)
    if up_only:
        dx = g.clone()
        for batch, vertex in levels(parent, order)[1:]:
            value = g[batch, vertex] + a[batch, vertex] * dx[batch, parent[batch, vertex].long()]
            dx.index_put_((batch, vertex), value)
        da = u * dx.gather(1, above)
    else:
        h = down_sweep(u, a, parent, order)
        g_up = up_sweep(g, a, parent, order)
        dx = down_sweep(g_up, a, parent, order)
        da = g_up * (h.gather(1, above) - a * u) + u * (dx.gather(1, above) - a * g_up)
    is_root = parent == torch.arange(parent.shape[1], device=parent.device)
    da = da.masked_fill(is_root.unsqueeze(-1), 0)
    return dx.to(x.dtype), da.to(decay.dtype)


def _discretise(
    dt: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The step size before and after softplus, the rate -exp(A_log), and the decay exp(rate delta)."""
    raw_delta = F.linear(dt.to(dtype), dt_weight.to(dtype), dt_bias.to(dtype))
    delta, rate = F.softplus(raw_delta), -A_log.to(dtype).exp()
    return raw_delta, delta, rate, torch.exp(rate * delta)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    B: Tensor,
    parent: Tensor,
    order: Tensor,
    subtree_size: Tensor,
    up_only: bool = False,
    scan: Callable[..., Tensor] = tree_scan,
) -> Tensor:
    """`tree_scan` of delta B x with the decays exp(-exp(A_log) delta), delta = softplus(dt_weight dt + dt_bias)
    (paper, section 3.2). `scan` computes the tree scan."""
    dtype = accumulation_dtype(x.dtype)
    _, delta, _, decay = _discretise(dt, dt_weight, dt_bias, A_log, dtype)
    inputs = delta * B.to(dtype).unsqueeze(-1) * x.to(dtype)
    return scan(inputs, decay, parent, order, subtree_size, up_only).to(x.dtype)


def selective_scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    B: Tensor,
    parent: Tensor,
    order: Tensor,
    subtree_size: Tensor,
    up_only: bool = False,
    scan_backward: Callable[..., tuple[Tensor, Tensor]] = tree_scan_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `selective_scan` for x, dt, dt_weight, (2, D) for dt_bias and A_log, and for B."""
    dtype = accumulation_dtype(x.dtype)
    values, steps, weight = x.to(dtype), dt.to(dtype), dt_weight.to(dtype)
    raw_delta, delta, rate, decay = _discretise(dt, dt_weight, dt_bias, A_log, dtype)
    scale = B.to(dtype).unsqueeze(-1)
    dinputs, ddecay = scan_backward(
        grad.to(dtype), delta * scale * values, decay, parent, order, subtree_size, up_only
    )
    by_rate = ddecay * decay * rate
    slope = raw_delta.sigmoid().masked_fill(raw_delta > 20, 1)  # where softplus takes itself for the identity
    draw_delta = (dinputs * scale * values + by_rate) * slope
    return (
        (dinputs * delta * scale).to(x.dtype),
        (draw_delta @ weight).to(dt.dtype),
        (draw_delta.flatten(0, 1).mT @ steps.flatten(0, 1)).to(dt_weight.dtype),
        torch.stack([draw_delta, by_rate * delta]).sum((1, 2)),
        (dinputs * delta * values).sum(-1).to(B.dtype),
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
    eps: float,
) -> tuple[Tensor, Tensor]:
    """LN(C LN(h) + D_skip x) SiLU(z) over the last dimension (paper, Algorithm 1), and the statistics of both norms:
    (B, L, 4), mean and reciprocal deviation of h and of what the outer norm takes."""
    dtype = accumulation_dtype(h.dtype)
    h_normed, h_mean, h_scale = torch.native_layer_norm(
        h.to(dtype), h.shape[-1:], h_weight.to(dtype), h_bias.to(dtype), eps
    )
    y = C.to(dtype).unsqueeze(-1) * h_normed + D_skip.to(dtype) * x.to(dtype)
    normed, y_mean, y_scale = torch.native_layer_norm(y, y.shape[-1:], out_weight.to(dtype), out_bias.to(dtype), eps)
    return (normed * F.silu(z.to(dtype))).to(h.dtype), torch.cat([h_mean, h_scale, y_mean, y_scale], dim=-1)


def gated_norm_backward(
    grad: Tensor,
    h: Tensor,
    x: Tensor,
    z: Tensor,
    C: Tensor,
    D_skip: Tensor,
    h_weight: Tensor,
    h_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gated_norm` for h, x, z, C, and (5, D) for D_skip, h_weight, h_bias, out_weight and out_bias."""
    dtype = accumulation_dtype(h.dtype)
    h_mean, h_scale, y_mean, y_scale = statistics.split(1, dim=-1)
    values, gate, scale = x.to(dtype), z.to(dtype), C.to(dtype).unsqueeze(-1)
    h_normed = (h.to(dtype) - h_mean) * h_scale
    inner = h_normed * h_weight.to(dtype) + h_bias.to(dtype)
    y_normed = (scale * inner + D_skip.to(dtype) * values - y_mean) * y_scale
    outer = y_normed * out_weight.to(dtype) + out_bias.to(dtype)
    g, sigmoid = grad.to(dtype), gate.sigmoid()
    douter = g * gate * sigmoid
    dy = _through_norm(douter * out_weight.to(dtype), y_normed, y_scale)
    dinner = scale * dy
    return (
        _through_norm(dinner * h_weight.to(dtype), h_normed, h_scale).to(h.dtype),
        (dy * D_skip.to(dtype)).to(x.dtype),
        (g * outer * sigmoid * (1 + gate * (1 - sigmoid))).to(z.dtype),
        (dy * inner).sum(-1).to(C.dtype),
        torch.stack([dy * values, dinner * h_normed, dinner, douter * y_normed, douter]).sum((1, 2)),
    )


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of x, with a result of `dtype` (None: that of x), and its statistics: (..., 2),
    mean and reciprocal deviation."""
    accumulation = accumulation_dtype(x.dtype)
    normed, mean, scale = torch.native_layer_norm(
        x.to(accumulation), x.shape[-1:], weight.to(accumulation), bias.to(accumulation), eps
    )
    return normed.to(dtype or x.dtype), torch.cat([mean, scale], dim=-1)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `layer_norm` for x, and (2, C) for weight and bias."""
    dtype = accumulation_dtype(x.dtype)
    mean, scale = statistics.split(1, dim=-1)
    normed, g = (x.to(dtype) - mean) * scale, grad.to(dtype)
    dx = _through_norm(g * weight.to(dtype), normed, scale).to(x.dtype)
    return dx, torch.stack([g * normed, g]).flatten(1, -2).sum(1)


def _through_norm(dnormed: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """The gradient before a normalisation from the one after it, the result, and the reciprocal deviation."""
    return scale * (dnormed - dnormed.mean(-1, True) - normed * (dnormed * normed).mean(-1, True))

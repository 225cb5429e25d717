"""GrootL's mixing of one sequence in plain PyTorch, as the definition that `grootl.trees` and `grootl.scans` are tested
against (paper, section 3.3 and Algorithm 2). Slow, and with all (L, D, N) states in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["parents", "prefix_scan"]


def parents(x: Tensor, prompt_length: int, neighbours: int = 3) -> list[int]:
    """The parent of each token in the minimum spanning tree that is rooted at the last token, its own parent.

    Args:
        x: (L, D, N), the scan's inputs.
        prompt_length: the first tokens are the prompt; each of them is joined to its `neighbours` predecessors, each of
            the others to its predecessor.
    """
    length = x.shape[0]
    vectors = x.detach().flatten(1)
    edges = [
        (later, later - distance)
        for later in range(length - 1, 0, -1)
        for distance in range(1, (neighbours if later < prompt_length else 1) + 1)
        if later - distance >= 0
    ]
    weights = [torch.exp(-F.cosine_similarity(vectors[i], vectors[j], dim=0)).item() for i, j in edges]

    component = list(range(length))
    joined: list[list[int]] = [[] for _ in range(length)]
    for number in sorted(range(len(edges)), key=lambda number: weights[number]):  # keeps the order of equal weights
        i, j = edges[number]
        if component[i] != component[j]:
            old, new = component[i], component[j]
            component = [new if part == old else part for part in component]
            joined[i].append(j)
            joined[j].append(i)

    parent = [-1] * length
    parent[length - 1] = length - 1
    visited = [length - 1]
    for vertex in visited:  # grows while it is walked
        for other in joined[vertex]:
            if parent[other] < 0:
                parent[other] = vertex
                visited.append(other)
    return parent


def prefix_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    prompt_length: int,
    neighbours: int = 3,
    tree_scale: float = 0.3,
    edge_decay: str = "next",
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t = C_t . (h_t + tree_scale s_t) for one sequence.

    Args:
        u, delta: (L, D), inputs and step sizes.
        A: (D, N), negative.
        B, C: (L, N).
        prompt_length, neighbours: see `parents`.
        tree_scale, edge_decay: see `GrootLConfig`.

    Returns:
        y, (L, D); h and s of the last token, (D, N) each.
    """
    length = u.shape[0]
    decay = torch.exp(delta.unsqueeze(-1) * A)
    x = (delta * u).unsqueeze(-1) * B.unsqueeze(1)

    chain = [x[0]]
    for t in range(1, length):
        chain.append(decay[t] * chain[-1] + x[t])

    parent = parents(x, prompt_length, neighbours)
    children: list[list[int]] = [[] for _ in range(length)]
    for vertex, above in enumerate(parent):
        if above != vertex:
            children[above].append(vertex)

    def subtree_sum(t: int) -> Tensor:
        total = x[t]
        for child in children[t]:
            edge = decay[child] if edge_decay == "own" else decay[child + 1]
            total = total + edge * subtree_sum(child)
        return total

    tree = [subtree_sum(t) for t in range(length)]
    h, s = torch.stack(chain), torch.stack(tree)
    return torch.einsum("ldn,ln->ld", h + tree_scale * s, C), h[-1], s[-1]

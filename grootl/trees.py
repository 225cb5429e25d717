"""The graph over the tokens of a prompt, its edge weights, and the trees that GrootL scans (paper, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from grootvl_ops import Tree, build_tree_from_edges, neighbour_cosines

__all__ = ["chain_tree", "edge_weights", "prompt_edges", "prompt_tree"]


def chain_tree(length: int, device: torch.device) -> Tree:
    """The chain 0, 1, ... length - 1 as a tree of batch size one, rooted at 0: `grootvl_ops.path_tree` without its
    check of the order, for which CUDA would have to wait."""
    vertices = torch.arange(length, dtype=torch.int32, device=device).unsqueeze(0)
    return Tree((vertices - 1).clamp(min=0), vertices, length - vertices)


def prompt_edges(start: Tensor, end: Tensor, length: int, neighbours: int) -> Tensor:
    """The edges of B graphs over `length` tokens each.

    Tokens from `start` to `end` - 1 are the prompt: each is joined to its `neighbours` predecessors in the prompt. All
    other tokens, which are padding and the continuation, are joined to their direct predecessor. Edges are listed from
    the last token backwards, of one token the shortest first; this order decides between edges of equal weight.

    Args:
        start, end: (B,), integers.
        length: L.
        neighbours: at least 1.

    Returns:
        (B, L * neighbours, 2) int32. Where the graph has fewer edges, the list has edges from a token to itself, which
        no tree contains.
    """
    later = torch.arange(length - 1, -1, -1, dtype=torch.int32, device=start.device).unsqueeze(-1)
    distance = torch.arange(1, neighbours + 1, dtype=torch.int32, device=start.device)
    earlier = later - distance
    in_prompt = (earlier >= start.view(-1, 1, 1)) & (later < end.view(-1, 1, 1))
    in_chain = (distance == 1) & (later > 0)
    joined = torch.where(in_prompt | in_chain, earlier, later)
    return torch.stack((later.expand_as(joined), joined), dim=-1).flatten(1, 2)


@torch.no_grad()
def edge_weights(delta_u: Tensor, B: Tensor, neighbours: int) -> Tensor:
    """-cos(x_i, x_j) for the scan's inputs x_i = (delta u)_i B_i as one vector of D * N values each.

    The paper's weights are exp(-cos), whose order, and so whose trees, are the same. x is an outer product, so that the
    cosine of two tokens is cos((delta u)_i, (delta u)_j) cos(B_i, B_j).

    Args:
        delta_u: (Batch, L, D), the product of step sizes and inputs.
        B: (Batch, L, N), of the same dtype.
        neighbours: as for `prompt_edges`.

    Returns:
        (Batch, L * neighbours), in the order of `prompt_edges`; 0 where a token has fewer tokens before it.
    """
    cosines = neighbour_cosines(delta_u, neighbours) * neighbour_cosines(B, neighbours)
    return cosines.neg().flip(1).flatten(1)


def prompt_tree(delta_u: Tensor, B: Tensor, edges: Tensor, neighbours: int) -> Tree:
    """Minimum spanning trees of the graphs of a batch, rooted at their last token. No gradient passes.

    Args:
        delta_u, B: see `edge_weights`.
        edges: of `prompt_edges`, for a batch of this size or of one.
        neighbours: as for `prompt_edges`.
    """
    length = B.shape[1]
    weights = edge_weights(delta_u, B, neighbours)
    return build_tree_from_edges(edges.expand(B.shape[0], -1, -1), weights, length, root=length - 1)

"""The graph over the tokens of a prompt, its edge weights, and the trees that GrootL scans (paper, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from grootvl_ops import Tree, build_tree_from_edges

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
        (B, (L - 1) * neighbours, 2) int64. Where the graph has fewer edges, the list has edges from a token to itself,
        which no tree contains.
    """
    later = torch.arange(length - 1, 0, -1, device=start.device).unsqueeze(-1)
    earlier = later - torch.arange(1, neighbours + 1, device=start.device)
    in_prompt = (earlier >= start.view(-1, 1, 1)) & (later < end.view(-1, 1, 1))
    is_chain = earlier == later - 1
    joined = torch.where(in_prompt | is_chain, earlier, later)
    return torch.stack((later.expand_as(joined), joined), dim=-1).flatten(1, 2)


@torch.no_grad()
def edge_weights(delta_u: Tensor, B: Tensor, neighbours: int) -> Tensor:
    """exp(-cos(x_i, x_j)) for the scan's inputs x_i = (delta u)_i B_i as one vector of D * N values each.

    x is an outer product, so that the cosine of two tokens is cos((delta u)_i, (delta u)_j) cos(B_i, B_j).

    Args:
        delta_u: (Batch, L, D), the product of step sizes and inputs.
        B: (Batch, L, N), of the same dtype.
        neighbours: as for `prompt_edges`.

    Returns:
        (Batch, (L - 1) * neighbours), in the order of `prompt_edges`; 0 where it has no edge.
    """
    length = B.shape[1]

    def before(values: Tensor) -> Tensor:
        """(Batch, neighbours, L, ...): from the largest distance to 1, the values of the tokens before; 1 for none."""
        padding = values.new_ones(len(values), neighbours, *values.shape[2:])
        return torch.cat((padding, values[:, :-1]), dim=1).unfold(1, length, 1).movedim(-1, 2)

    def products(vectors: Tensor) -> Tensor:
        return (vectors.unsqueeze(1) * before(vectors)).sum(-1)

    norms = (delta_u.square().sum(-1) * B.square().sum(-1)).sqrt().clamp(min=1e-8)
    cosines = products(delta_u) * products(B) / (norms.unsqueeze(1) * before(norms))
    weights = torch.exp(-cosines).flip(1).triu(1)  # the first tokens have fewer tokens before them
    return weights[..., 1:].flip(2).mT.flatten(1)


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

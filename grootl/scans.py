"""What a mixer of GrootL computes between its projections: the chain, the tree, and the states to continue from.

Everything is float32 (float64 for float64). The symbols: u (Batch, L, D), the inputs; dt (Batch, L, D), the steps
before softplus; A_log (D, N); B and C (Batch, L, N). With delta = softplus(dt), the decay a_t = exp(-exp(A_log)
delta_t) and the input x_t = delta_t B_t u_t have N states for each of D channels. No function here makes a
(Batch, L, D, N) tensor of a long prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grootvl_ops import Tree, selective_scan, tree_scan

from .trees import chain_tree

__all__ = ["MASKED_STEP", "continue_scan", "final_state", "prefix_scan"]

MASKED_STEP = -1e4
"""The step before softplus of a token that a scan passes unchanged: its decay is 1 and its input 0."""

# How many values of (Batch, L, D, N) tensors are in memory at a time, unless those of one state are more.
_VALUES_AT_ONCE = 1 << 24

# A step this small does not decay any state, and the quotient of two steps remains in the range of float32.
_SMALLEST_STEP = -30.0


def prefix_scan(
    u: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, tree: Tree | None, tree_scale: float, edge_decay: str
) -> Tensor:
    """y_t = C_t . (h_t + tree_scale s_t), with h along the chain and s up the tree (paper, Algorithm 2):

        h_t = a_t h_(t-1) + x_t
        s_t = x_t + sum over the children c of t of w_c s_c,  w_c = a_(c+1) ("next") or a_c ("own")

    Args:
        u, dt, A_log, B, C: see the module.
        tree: of `grootl.trees.prompt_tree`; None for the chain alone.
        tree_scale: factor of the tree's part.
        edge_decay: "next" or "own".

    Returns:
        y: (Batch, L, D).
    """
    y = selective_scan(u, dt, None, None, A_log, B, chain_tree(u.shape[1], u.device), "down", C)
    if tree is None:
        return y
    edge_dt = _edge_steps(dt, edge_decay)
    return y.add(_scan_with_decays_of(edge_dt, u, dt, A_log, B, C, tree, "up"), alpha=tree_scale)


def final_state(
    u: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, tree: Tree | None, tree_scale: float, edge_decay: str
) -> Tensor:
    """The state after the last token, from which `continue_scan` goes on. Arguments: see `prefix_scan`.

    After the prompt, chain and tree are chains both. With "next" they have the same decays, so their weighted sum
    H = h + tree_scale s is a state like Mamba's. With "own" they have not, and both are needed.

    Returns:
        (Batch, D, N): H. With a tree and "own": (Batch, D, 2 N), h and a s, the tree's state with the decay it leaves
        the token with.
    """
    delta = F.softplus(dt)
    chain = _decayed_sum(delta.flip(1).cumsum(1).flip(1) - delta, u, delta, A_log, B)
    if tree is None:
        return chain
    edge_dt = _edge_steps(dt, edge_decay)
    vertices = torch.arange(u.shape[1], device=u.device).unsqueeze(-1)
    steps = F.softplus(edge_dt).masked_fill(tree.parent.unsqueeze(-1) == vertices, 0)
    to_root = tree_scan(steps, torch.ones_like(steps), tree, "down")
    branch = _decayed_sum(to_root, u, delta, A_log, B)
    if edge_decay == "next":
        return chain + tree_scale * branch
    return torch.cat((chain, _decay(delta[:, -1], A_log) * branch), dim=-1)


def continue_scan(
    u: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    tree_scale: float,
    edge_decay: str,
) -> tuple[Tensor, Tensor]:
    """The scan of tokens that follow those of `final_state`: all of them continue the chain that hangs off the prompt.

    Args:
        u, dt, A_log, B, C: of the new tokens, see the module.
        state: of `final_state` or of this function. float32.
        tree_scale: 0 if there was no tree.
        edge_decay: "next" or "own".

    Returns:
        y, (Batch, L, D), and the state after the last token.
    """
    if edge_decay == "next" or tree_scale == 0:
        return _continue_chain(u, dt, dt, A_log, B, C, state, 1 + tree_scale)
    chain, branch = state.chunk(2, dim=-1)
    y_chain, chain = _continue_chain(u, dt, dt, A_log, B, C, chain, 1)
    previous = torch.cat((torch.full_like(dt[:, :1], MASKED_STEP), dt[:, :-1]), dim=1)
    y_branch, branch = _continue_chain(u, dt, previous, A_log, B, C, branch, 1)
    branch = _decay(F.softplus(dt[:, -1]), A_log) * branch
    return y_chain + tree_scale * y_branch, torch.cat((chain, branch), dim=-1)


def _edge_steps(dt: Tensor, edge_decay: str) -> Tensor:
    """For each token, the step whose decay belongs to the edge to its parent. That of the root is not used."""
    return dt if edge_decay == "own" else dt.roll(-1, dims=1)


def _decay(delta: Tensor, A_log: Tensor) -> Tensor:
    """(..., D) to (..., D, N)."""
    return torch.exp(-A_log.to(delta.dtype).exp() * delta.unsqueeze(-1))


def _scan_with_decays_of(
    edge_dt: Tensor, u: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, tree: Tree, direction: str
) -> Tensor:
    """C . h of a selective scan whose decays have other steps, `edge_dt`, than its inputs.

    The operation takes one step for both. It scales inputs by delta', so they come with the factor delta / delta'.
    """
    if edge_dt is dt:
        return selective_scan(u, dt, None, None, A_log, B, tree, direction, C)
    edge_dt = edge_dt.clamp(min=_SMALLEST_STEP)
    scaled = u * (F.softplus(dt) / F.softplus(edge_dt))
    return selective_scan(scaled, edge_dt, None, None, A_log, B, tree, direction, C)


def _decayed_sum(steps: Tensor, u: Tensor, delta: Tensor, A_log: Tensor, B: Tensor) -> Tensor:
    """sum over t of exp(-exp(A_log) steps_t) x_t, (Batch, D, N): x_t after decays whose steps sum up to `steps`."""
    delta_u, rate = delta * u, -A_log.to(delta.dtype).exp()
    at_once = max(1, _VALUES_AT_ONCE // max(1, steps.numel()))
    states = [
        # (Batch, n, 1, L) times (Batch, n, L, D), a row of states for each channel.
        B_.mT.unsqueeze(2) @ (torch.exp(steps.unsqueeze(1) * rate_.T.unsqueeze(1)) * delta_u.unsqueeze(1))
        for rate_, B_ in zip(rate.split(at_once, dim=1), B.split(at_once, dim=2), strict=True)
    ]
    return torch.cat(states, dim=1).squeeze(2).mT


def _continue_chain(
    u: Tensor, dt: Tensor, edge_dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, state: Tensor, gain: float
) -> tuple[Tensor, Tensor]:
    """H_t = exp(-exp(A_log) softplus(edge_dt_t)) H_(t-1) + gain x_t from the state H_(-1): C . H, and the last H."""
    delta, edge_delta = F.softplus(dt), F.softplus(edge_dt)
    if u.shape[1] == 1:
        x = (delta * u)[:, 0, :, None] * B[:, 0, None, :]
        state = _decay(edge_delta[:, 0], A_log) * state + gain * x
        return (state * C[:, 0, None, :]).sum(-1).unsqueeze(1), state
    tree = chain_tree(u.shape[1], u.device)
    y = gain * _scan_with_decays_of(edge_dt, u, dt, A_log, B, C, tree, "down")
    since_start, rate = edge_delta.cumsum(1), -A_log.to(delta.dtype).exp()
    for n in range(rate.shape[1]):
        y = y + C[..., n, None] * torch.exp(since_start * rate[:, n]) * state[:, None, :, n]
    until_end = since_start[:, -1:] - since_start
    last = _decay(since_start[:, -1], A_log) * state + gain * _decayed_sum(until_end, u, delta, A_log, B)
    return y, last

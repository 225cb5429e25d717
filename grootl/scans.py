"""What a mixer of GrootL computes between its projections: the chain, the tree, and the states to continue from.

Everything is float32 (float64 for float64). The symbols: u (Batch, L, D), the inputs; dt (Batch, L, D), the steps
before softplus; A_log (D, N); B and C (Batch, L, N). With delta = softplus(dt), the decay a_t = exp(-exp(A_log)
delta_t) and the input x_t = delta_t B_t u_t have N states for each of D channels. No function here makes a
(Batch, L, D, N) tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grootvl_ops import Tree, selective_scan

from .trees import prompt_tree

__all__ = ["MASKED_STEP", "StateReaders", "continue_scan", "continued_length", "prefix_scan", "state_readers"]

MASKED_STEP = -1e4
"""The step before softplus of a token that a scan passes unchanged: its decay is 1 and its input 0."""

# The step before softplus by which a scan multiplies its input by 1.
_UNIT_STEP = math.log(math.e - 1)


class StateReaders(NamedTuple):
    """N tokens behind those of a prompt, at which the outputs of a scan are the prompt's last state: they have no
    input, decay nothing, and the n-th has the n-th unit vector as C."""

    u: Tensor
    """(Batch, N, D) float32"""
    dt: Tensor
    """(Batch, N, D) float32"""
    B_and_C: Tensor
    """(Batch, N, 2 N) float32"""

    def append_to(self, u: Tensor, dt: Tensor, B_and_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, dt and (B | C) of a prompt with these tokens behind it, in float32 (float64 for float64)."""
        return (
            torch.cat((u, self.u), dim=1),
            torch.cat((dt, self.dt), dim=1),
            torch.cat((B_and_C, self.B_and_C), dim=1),
        )


def state_readers(batch: int, channels: int, num_states: int, device: torch.device) -> StateReaders:
    """Those of a scan of D channels with N states. They are the same for all layers, so make them once."""
    u = torch.zeros(1, num_states, channels, device=device)
    unit_vectors = torch.eye(num_states, 2 * num_states, device=device).roll(num_states, dims=1)
    readers = StateReaders(u, torch.full_like(u, MASKED_STEP), unit_vectors.unsqueeze(0))
    return StateReaders(*(value.expand(batch, -1, -1) for value in readers))


def prefix_scan(
    u: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    chain: Tree,
    edges: Tensor | None,
    neighbours: int,
    tree_scale: float,
    edge_decay: str,
    num_readers: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """y_t = C_t . (h_t + tree_scale s_t), with h along the chain and s up the tree (paper, Algorithm 2):

        h_t = a_t h_(t-1) + x_t
        s_t = x_t + sum over the children c of t of w_c s_c,  w_c = a_(c+1) ("next") or a_c ("own")

    Args:
        u, dt, A_log, B, C: see the module.
        chain: `grootl.trees.chain_tree` of the tokens.
        edges: of `grootl.trees.prompt_edges`, from which the tree is chosen; None for the chain alone.
        neighbours: as for `prompt_edges`.
        tree_scale: factor of the tree's part.
        edge_decay: "next" or "own".
        num_readers: N if the last tokens are those of `state_readers`, else 0.

    Returns:
        y: (Batch, L, D), without readers.
        The state after the last token, from which `continue_scan` goes on; None if there are no readers. After the
        prompt, chain and tree are chains both. With "next" they have the same decays, so their weighted sum
        H = h + tree_scale s is a state like Mamba's, (Batch, D, N). With "own" they have not, and both are needed: with
        a tree, (Batch, D, 2 N), h and a s, the tree's state with the decay it leaves the token with.
    """
    y = of_chain = selective_scan(u, dt, None, None, A_log, B, chain, "down", C)
    of_tree = None
    if edges is not None:
        with torch.no_grad():  # no gradient passes through the choice of the tree
            tree = prompt_tree(F.softplus(dt) * u, B, edges, neighbours)
        # The decay of the root, which is the last token, is not used.
        decay_dt = F.pad(dt[:, 1:], (0, 0, 0, 1)) if edge_decay == "next" else None
        of_tree = selective_scan(u, dt, None, None, A_log, B, tree, "up", C, decay_dt)
        y = of_chain.add(of_tree, alpha=tree_scale)
    if num_readers == 0:
        return y, None
    state = y[:, -num_readers:]
    if of_tree is not None and edge_decay == "own":
        state = torch.cat((of_chain[:, -num_readers:], of_tree[:, -num_readers:]), dim=1)
    return y[:, :-num_readers], state.mT


def continued_length(length: int, num_states: int) -> int:
    """The number of tokens of the chain that `continue_scan` takes for `length` tokens."""
    return length + 2 * num_states


def continue_scan(
    u: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    chain: Tree,
    tree_scale: float,
    edge_decay: str,
) -> tuple[Tensor, Tensor]:
    """The scan of tokens that follow those of `prefix_scan`: all of them continue the chain that hangs off the prompt.

    Args:
        u, dt, A_log, B, C: of the new tokens, see the module.
        state: of `prefix_scan` or of this function. float32.
        chain: `grootl.trees.chain_tree` of the length of `continued_length`.
        tree_scale: 0 if there was no tree.
        edge_decay: "next" or "own".

    Returns:
        y, (Batch, L, D), and the state after the last token.
    """
    delta = F.softplus(dt)
    delta_u = delta * u
    if edge_decay == "next" or tree_scale == 0:
        return _continue_chain(delta_u, dt, delta, A_log, B, C, state, chain, 1 + tree_scale)
    state, branch = state.chunk(2, dim=-1)
    y, state = _continue_chain(delta_u, dt, delta, A_log, B, C, state, chain, 1)
    previous = torch.cat((torch.full_like(dt[:, :1], MASKED_STEP), dt[:, :-1]), dim=1)
    y_branch, branch = _continue_chain(delta_u, previous, F.softplus(previous), A_log, B, C, branch, chain, 1)
    branch = _decay(delta[:, -1:], A_log) * branch
    return y.add(y_branch, alpha=tree_scale), torch.cat((state, branch), dim=-1)


def _decay(delta: Tensor, A_log: Tensor) -> Tensor:
    """exp(-exp(A_log) delta), (Batch, D, N), of one token's delta (Batch, 1, D)."""
    return torch.exp(-A_log.exp() * delta.mT)


def _continue_chain(
    delta_u: Tensor,
    edge_dt: Tensor,
    edge_delta: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    chain: Tree,
    gain: float,
) -> tuple[Tensor, Tensor]:
    """H_t = exp(-exp(A_log) edge_delta_t) H_(t-1) + gain x_t from the state H_(-1): C . H, and the last H."""
    if B.shape[1] == 1:
        state = torch.addcmul(_decay(edge_delta, A_log) * state, delta_u.mT, B, value=gain)
        return (state * C).sum(-1).unsqueeze(1), state
    # N tokens before the others, whose inputs are the state, and N behind them that read it.
    batch, num_states = B.shape[0], B.shape[2]
    unit_vectors = torch.eye(num_states, dtype=B.dtype, device=B.device).expand(batch, -1, -1)
    none = torch.zeros_like(unit_vectors)
    inputs = F.pad(torch.cat((state.mT, gain * delta_u), dim=1), (0, 0, 0, num_states))
    y = selective_scan(
        inputs,
        torch.full_like(inputs, _UNIT_STEP),
        None,
        None,
        A_log,
        torch.cat((unit_vectors, B, none), dim=1),
        chain,
        "down",
        torch.cat((none, C, unit_vectors), dim=1),
        decay_dt=F.pad(edge_dt, (0, 0, num_states, num_states), value=MASKED_STEP),
    )
    return y[:, num_states:-num_states], y[:, -num_states:].mT

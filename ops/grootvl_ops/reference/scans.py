"""Scans along trees and their gradients, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ("both", "up", "down")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def levels(parent: Tensor, order: Tensor) -> list[tuple[Tensor, ...]]:
    """The (batch index, vertex) pairs of each depth of the trees, from the roots down."""
    parents, orders = parent.tolist(), order.tolist()
    by_depth: list[list[tuple[int, int]]] = []
    for batch, (tree_parent, tree_order) in enumerate(zip(parents, orders, strict=True)):
        if sorted(tree_order) != list(range(len(tree_parent))):
            raise ValueError(f"the tree's order must hold each vertex from 0 to {len(tree_parent) - 1} once")
        depth = [-1] * len(tree_parent)
        for vertex in tree_order:
            above = tree_parent[vertex]
            if above == vertex:
                depth[vertex] = 0
            elif 0 <= above < len(depth) and depth[above] >= 0:
                depth[vertex] = depth[above] + 1
            else:
                raise ValueError(f"the parent of vertex {vertex} must come before it in the tree's order, got {above}")
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


def down_sweep(x: Tensor, decay: Tensor, parent: Tensor, order: Tensor) -> Tensor:
    """h_root = x_root; h_i = x_i + a_i h_parent(i) (root to leaves)."""
    h = x.clone(memory_format=torch.contiguous_format)
    for batch, vertex in levels(parent, order)[1:]:
        value = x[batch, vertex] + decay[batch, vertex] * h[batch, parent[batch, vertex].long()]
        h.index_put_((batch, vertex), value)
    return h


def rerooting_sweep(u: Tensor, decay: Tensor, parent: Tensor, order: Tensor) -> Tensor:
    """From the sums over subtrees to the sums over all vertices:
    h_root = u_root; h_i = (1 - a_i^2) u_i + a_i h_parent(i) (root to leaves)."""
    h = u.clone()
    for batch, vertex in levels(parent, order)[1:]:
        a = decay[batch, vertex]
        value = (1 - a.square()) * u[batch, vertex] + a * h[batch, parent[batch, vertex].long()]
        h.index_put_((batch, vertex), value)
    return h


def tree_scan(
    x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, subtree_size: Tensor, direction: str = "both"
) -> Tensor:
    """Aggregate x over the tree: h_i = sum_j (product of the decays on the path from j to i) x_j.

    x, decay, result: (B, L, D). The sum runs over all vertices j ("both"; paper, Algorithm 1), over the subtree below i
    ("up"), or over the vertices from the root to i ("down").
    """
    dtype = accumulation_dtype(x.dtype)
    x_, a = x.to(dtype), decay.to(dtype)
    if direction == "down":
        h = down_sweep(x_, a, parent, order)
    else:
        h = up_sweep(x_, a, parent, order)
        if direction == "both":
            h = rerooting_sweep(h, a, parent, order)
    return h.to(x.dtype)


def tree_scan_backward(
    grad: Tensor,
    x: Tensor,
    decay: Tensor,
    parent: Tensor,
    order: Tensor,
    subtree_size: Tensor,
    direction: str = "both",
) -> tuple[Tensor, Tensor]:
    """Gradients of `tree_scan` for x and decay, (B, L, D) each, from the gradient g of its result.

    p is the parent of i. The gradient of an edge is 0 at a root, which has no edge.

    * "both" is symmetric in its end points, so dx is the same scan of g. With G_u and G_h its two sweeps,
      da_i = G_u,i (h_p - a_i u_i) + u_i (G_h,p - a_i G_u,i).
    * "up": gradients run down. dx is the sweep down of g, and da_i = u_i dx_p.
    * "down": gradients run up. dx is the sweep up of g, and da_i = dx_i h_p.
    """
    dtype = accumulation_dtype(x.dtype)
    x_, a, g = x.to(dtype), decay.to(dtype), grad.to(dtype)
    above = parent.long().unsqueeze(-1).expand_as(a)
    if direction == "down":
        h = down_sweep(x_, a, parent, order)
        dx = up_sweep(g, a, parent, order)
        da = dx * h.gather(1, above)
    elif direction == "up":
        u = up_sweep(x_, a, parent, order)
        dx = down_sweep(g, a, parent, order)
        da = u * dx.gather(1, above)
    else:
        u = up_sweep(x_, a, parent, order)
        h = rerooting_sweep(u, a, parent, order)
        g_up = up_sweep(g, a, parent, order)
        dx = rerooting_sweep(g_up, a, parent, order)
        da = g_up * (h.gather(1, above) - a * u) + u * (dx.gather(1, above) - a * g_up)
    is_root = parent == torch.arange(parent.shape[1], device=parent.device)
    da = da.masked_fill(is_root.unsqueeze(-1), 0)
    return dx.to(x.dtype), da.to(decay.dtype)


def _raw_step(dt: Tensor, dt_weight: Tensor | None, dt_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The step size before softplus, (B, L, D)."""
    bias = None if dt_bias is None else dt_bias.to(dtype)
    if dt_weight is not None:
        return F.linear(dt.to(dtype), dt_weight.to(dtype), bias)
    return dt.to(dtype) if bias is None else dt.to(dtype) + bias


def _states(A_log: Tensor, B: Tensor, C: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A_log as (D, N), B and C as (B, L, N), also where N = 1 has no axis."""
    A_log, B = (x if x.dim() == rank else x.unsqueeze(-1) for x, rank in ((A_log, 2), (B, 3)))
    return A_log, B, C if C is None or C.dim() == 3 else C.unsqueeze(-1)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    B: Tensor,
    C: Tensor | None,
    parent: Tensor,
    order: Tensor,
    subtree_size: Tensor,
    direction: str = "both",
    scan: Callable[..., Tensor] = tree_scan,
) -> Tensor:
    """A selective state space model along a tree (paper, section 3.2), for each of its N states the scan

        h_n = tree_scan(delta B_n x, exp(-exp(A_log_n) delta)),   delta = softplus(dt_weight dt + dt_bias).

    With C the result is the sum of C_n h_n over the states, (B, L, D); without C it is h, (B, L, D), or (B, L, D, N)
    where A_log is (D, N). One state is computed after the other, so that only one is in memory. `scan` computes the
    tree scan.
    """
    dtype = accumulation_dtype(x.dtype)
    delta = F.softplus(_raw_step(dt, dt_weight, dt_bias, dtype))
    A, inputs, outputs = _states(A_log, B, C)
    rate, x_ = -A.to(dtype).exp(), x.to(dtype)
    results = []
    for n in range(rate.shape[1]):
        decay = torch.exp(delta * rate[:, n])
        h = scan(delta * (inputs[..., n, None].to(dtype) * x_), decay, parent, order, subtree_size, direction)
        if outputs is None:
            results.append(h.to(x.dtype))
        elif n == 0:
            results.append(outputs[..., n, None].to(dtype) * h)
        else:
            results[0] = results[0] + outputs[..., n, None].to(dtype) * h
    return results[0].to(x.dtype) if C is not None or A_log.dim() == 1 else torch.stack(results, dim=-1)


def selective_scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    B: Tensor,
    C: Tensor | None,
    parent: Tensor,
    order: Tensor,
    subtree_size: Tensor,
    direction: str = "both",
    scan: Callable[..., Tensor] = tree_scan,
    scan_backward: Callable[..., tuple[Tensor, Tensor]] = tree_scan_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `selective_scan` for x, dt and dt_weight; (1 + N, D), for dt_bias and the columns of A_log; for B
    and C. Those for dt_weight and C are empty where there are none."""
    dtype = accumulation_dtype(x.dtype)
    x_, g = x.to(dtype), grad.to(dtype)
    raw_delta = _raw_step(dt, dt_weight, dt_bias, dtype)
    delta = F.softplus(raw_delta)
    A, inputs, outputs = _states(A_log, B, C)
    rate = -A.to(dtype).exp()
    dx, ddelta = torch.zeros_like(x_), torch.zeros_like(x_)
    dA_log, dB, dC = [], [], []
    for n in range(rate.shape[1]):
        decay, scale = torch.exp(delta * rate[:, n]), inputs[..., n, None].to(dtype)
        scanned, tree = delta * (scale * x_), (parent, order, subtree_size, direction)
        if outputs is not None:
            dC.append((g * scan(scanned, decay, *tree)).sum(-1))
            g_state = g * outputs[..., n, None].to(dtype)
        else:
            g_state = g if A_log.dim() == 1 else g[..., n]
        dscanned, ddecay = scan_backward(g_state, scanned, decay, *tree)
        by_rate = ddecay * decay * rate[:, n]
        dx += dscanned * delta * scale
        ddelta += dscanned * scale * x_ + by_rate
        dA_log.append((by_rate * delta).sum((0, 1)))
        dB.append((dscanned * delta * x_).sum(-1))
    draw = ddelta * _softplus_slope(raw_delta)
    if dt_weight is None:
        ddt, dweight = draw, x.new_empty(0)
    else:
        ddt = draw @ dt_weight.to(dtype)
        dweight = (draw.flatten(0, 1).mT @ dt.to(dtype).flatten(0, 1)).to(dt_weight.dtype)
    return (
        dx.to(x.dtype),
        ddt.to(dt.dtype),
        dweight,
        torch.stack([draw.sum((0, 1)), *dA_log]),
        torch.stack(dB, dim=-1).view(B.shape).to(B.dtype),
        x.new_empty(0) if C is None else torch.stack(dC, dim=-1).view(C.shape).to(C.dtype),
    )


# A step this small does not decay any state, and the quotient of two steps remains in the range of float32.
_SMALLEST_STEP = -30.0


def stepped_scan(
    x: Tensor,
    dt: Tensor,
    decay_dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    parent: Tensor,
    order: Tensor,
    subtree_size: Tensor,
    direction: str,
    scan: Callable[..., Tensor] = selective_scan,
) -> Tensor:
    """A selective scan with C whose decays have other steps, `decay_dt`, than its inputs: the sum of C_n h_n over

        h_n = tree_scan(softplus(dt) B_n x, exp(-exp(A_log_n) softplus(decay_dt))).

    `scan` is a selective scan. It multiplies its input by the step of its decays, so x is divided by that before.
    """
    dtype = accumulation_dtype(x.dtype)
    decay_dt = decay_dt.to(dtype).clamp(min=_SMALLEST_STEP)
    scaled = F.softplus(dt.to(dtype)) * x.to(dtype) / F.softplus(decay_dt)
    weights = B.to(dtype), C.to(dtype)
    return scan(scaled, decay_dt, None, None, A_log, *weights, parent, order, subtree_size, direction).to(x.dtype)


def stepped_scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    decay_dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    parent: Tensor,
    order: Tensor,
    subtree_size: Tensor,
    direction: str,
    scan_backward: Callable[..., tuple[Tensor, ...]] = selective_scan_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `stepped_scan` for x, dt, decay_dt, A_log, B and C."""
    dtype = accumulation_dtype(x.dtype)
    x_, raw, raw_decay = x.to(dtype), dt.to(dtype), decay_dt.to(dtype).clamp(min=_SMALLEST_STEP)
    delta, decay_delta = F.softplus(raw), F.softplus(raw_decay)
    scaled = delta * x_ / decay_delta
    tree = (parent, order, subtree_size, direction)
    dscaled, ddecay, _, dparameters, dB, dC = scan_backward(
        grad.to(dtype), scaled, raw_decay, None, None, A_log, B.to(dtype), C.to(dtype), *tree
    )
    dquotient = dscaled / decay_delta
    ddecay = ddecay - dquotient * scaled * _softplus_slope(raw_decay)
    return (
        (dquotient * delta).to(x.dtype),
        (dquotient * x_ * _softplus_slope(raw)).to(dt.dtype),
        ddecay.masked_fill(decay_dt < _SMALLEST_STEP, 0).to(decay_dt.dtype),
        dparameters[1:].T.contiguous(),
        dB.to(B.dtype),
        dC.to(C.dtype),
    )


def _softplus_slope(x: Tensor) -> Tensor:
    """Of PyTorch's softplus, which is the identity above 20."""
    return x.sigmoid().masked_fill(x > 20, 1)


def merged_scan(
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor | None,
    parent: Tensor,
    order: Tensor,
    subtree_size: Tensor,
    direction: str,
    dtype: torch.dtype | None = None,
    keep: bool = False,
    scan: Callable[..., Tensor] = selective_scan,
) -> tuple[Tensor, Tensor]:
    """The sum of C_k h_k over K selective scans of one x, each with its own parameters and tree, and of D_skip x.

    dt: (B, L, K, R); dt_weight: (K, D, R); dt_bias, A_log: (K, D); B, C: (B, L, K); D_skip: (D); the tree's fields:
    (K, L). Also returns what the backward pass needs, (K, B, L, D), if it is to be kept, else an empty tensor. Here it
    is h.
    """
    sums = accumulation_dtype(x.dtype)
    x = x.contiguous()
    y = torch.zeros_like(x, dtype=sums) if D_skip is None else x * D_skip.to(sums)
    kept = []
    for k in range(A_log.shape[0]):
        h = scan(*_group(k, x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size), direction)
        y = torch.addcmul(y, C[..., k, None].to(sums), h.to(sums))
        if keep:
            kept.append(h)
    return y.to(x.dtype if dtype is None else dtype), torch.stack(kept) if keep else x.new_empty(0)


def merged_scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor | None,
    parent: Tensor,
    order: Tensor,
    subtree_size: Tensor,
    kept: Tensor,
    direction: str,
    scan_backward: Callable[..., tuple[Tensor, ...]] = selective_scan_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `merged_scan` for x, dt and dt_weight; (3, K, D), for dt_bias, for A_log and, in each of the K
    rows, for D_skip; for B and C."""
    dtype = accumulation_dtype(x.dtype)
    g = grad.to(dtype).contiguous()
    dx = torch.zeros_like(g) if D_skip is None else g * D_skip.to(dtype)
    ddt, ddt_weight, dparameters, dB, dC = [], [], [], [], []
    for k in range(A_log.shape[0]):
        g_h = (g * C[..., k, None].to(dtype)).to(x.dtype)
        of_group = scan_backward(
            g_h, *_group(k, x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size), direction
        )
        dx += of_group[0].to(dtype)
        for gradients, gradient in zip((ddt, ddt_weight, dparameters, dB), of_group[1:5], strict=True):
            gradients.append(gradient)
        dC.append((g * kept[k].to(dtype)).sum(-1))
    dskip = (g * x.to(dtype)).sum((0, 1)).expand(len(dC), -1)
    return (
        dx.to(x.dtype),
        torch.stack(ddt, 2),
        torch.stack(ddt_weight),
        torch.cat([torch.stack(dparameters, 1), dskip.unsqueeze(0)]),
        torch.stack(dB, -1),
        torch.stack(dC, -1).to(C.dtype),
    )


def _group(
    k: int,
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    B: Tensor,
    *tree: Tensor,
) -> tuple[Tensor | None, ...]:
    """Of the operands of a merged scan those of group k, for `selective_scan` up to the direction."""
    fields = (field[k : k + 1].expand(x.shape[0], -1) for field in tree)
    bias = None if dt_bias is None else dt_bias[k]
    return x, dt[:, :, k], dt_weight[k], bias, A_log[k], B[..., k], None, *fields

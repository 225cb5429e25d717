"""The operations under torch.func's transforms and in forward mode.

The compiled operations know reverse mode only. Where a transform (`torch.func.grad`, `vmap`, `jvp`, ...) or a level of
forward-mode derivatives is active, the public functions take these instead: the tree scan as a
`torch.autograd.Function` that has a tangent, and the other operations as their definitions around it, which PyTorch can
transform by itself. Results are the same; they need more time and memory.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from ._loading import library
from ._registration import without_autocast


def active() -> bool:
    """Whether a transform of torch.func or a level of forward-mode derivatives is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class TreeScan(torch.autograd.Function):
    """`tree_scan` with a tangent, for any nesting of transforms but second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, subtree_size: Tensor, direction: str):
        return torch.ops.grootvl_ops.tree_scan(x, decay, parent, order, subtree_size, direction)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.direction = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors, output)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, ddecay = TreeScanBackward.apply(grad, *ctx.saved_tensors, ctx.direction)
        return dx, ddecay, None, None, None, None

    @staticmethod
    def jvp(ctx, dx: Tensor | None, da: Tensor | None, *_):
        """The tangent of h for the tangents of x and decay.

        The scan is linear in x. A tangent of a decay adds sources: differentiating each sweep, with p the parent of i,

            du_i = dx_i + sum_c (a_c du_c + da_c u_c)                       up
            dh_i = dx_i + a_i dh_p + da_i h_p                               down
            dh_i = (1 - a_i^2) du_i + a_i dh_p + da_i (h_p - 2 a_i u_i)     the second sweep of "both"

        so a tangent is one more scan up, one more scan down, or both, of what the sources add up to.
        """
        x, a, parent, order, subtree_size, h = ctx.saved_tensors
        scan = partial(tree_scan_below, decay=a, parent=parent, order=order, subtree_size=subtree_size)
        dx = torch.zeros_like(x) if dx is None else dx
        if da is None:
            return scan(dx, direction=ctx.direction)
        above = parent.long().unsqueeze(-1).expand_as(x)
        is_root = (parent == torch.arange(parent.shape[-1], device=parent.device)).unsqueeze(-1)
        da = da.masked_fill(is_root, 0)
        if ctx.direction == "down":
            return scan(dx + da * h.gather(-2, above), direction="down")
        u = h if ctx.direction == "up" else scan(x, direction="up")
        du = scan(dx.scatter_add(-2, above, da * u), direction="up")
        if ctx.direction == "up":
            return du
        edge = a.masked_fill(is_root, 0)
        return scan((1 - edge * edge) * du + da * (h.gather(-2, above) - 2 * edge * u), direction="down")


def tree_scan_below(
    x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, subtree_size: Tensor, direction: str
) -> Tensor:
    """A scan that is transformed further where a transform is active around this one."""
    return TreeScan.apply(x, decay, parent, order, subtree_size, direction)


class TreeScanBackward(torch.autograd.Function):
    """The gradients of `tree_scan`: they have no derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor, decay: Tensor, parent, order, subtree_size, direction: str):
        return torch.ops.grootvl_ops.tree_scan_backward(grad, x, decay, parent, order, subtree_size, direction)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raise RuntimeError("grootvl_ops.tree_scan can be differentiated once only: it has no second derivatives")

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None):
        raise RuntimeError("grootvl_ops.tree_scan can be differentiated once only: it has no second derivatives")


def tree_scan(x: Tensor, decay: Tensor, tree: tuple[Tensor, Tensor, Tensor], direction: str) -> Tensor:
    """`grootvl_ops.tree_scan` for any transform."""
    if torch.is_autocast_enabled(x.device.type):
        x, decay = (operand.to(torch.promote_types(operand.dtype, torch.float32)) for operand in (x, decay))
    return TreeScan.apply(x, decay, *tree, direction)


# With the arguments and results of the operations, in the order of their schemas.
_selective_scan = partial(reference.selective_scan, scan=tree_scan_below)
selective_scan = without_autocast(_selective_scan)
stepped_scan = without_autocast(partial(reference.stepped_scan, scan=_selective_scan))
merged_scan = without_autocast(partial(reference.merged_scan, scan=_selective_scan))
gated_norm = without_autocast(reference.gated_norm)
layer_norm = without_autocast(reference.layer_norm)
add_layer_norm = without_autocast(reference.add_layer_norm)


def _register_batching(name: str) -> None:
    """Under vmap, one call for all: the mapped dimension joins the batch, the first dimension of each tensor."""
    operation = getattr(torch.ops.grootvl_ops, name)

    def batched(info, in_dims, *arguments):
        joined = []
        for argument, dim in zip(arguments, in_dims, strict=True):
            if isinstance(argument, Tensor):
                if dim is None:
                    argument = argument.unsqueeze(0).expand(info.batch_size, *argument.shape)
                else:
                    argument = argument.movedim(dim, 0)
                argument = argument.flatten(0, 1)
            joined.append(argument)
        out = operation(*joined)
        if isinstance(out, Tensor):
            return out.unflatten(0, (info.batch_size, -1)), 0
        return tuple(result.unflatten(0, (info.batch_size, -1)) for result in out), (0,) * len(out)

    torch.library.register_vmap(f"grootvl_ops::{name}", batched, lib=library)


for _name in (
    *("edge_weights", "neighbour_cosines", "grid_tree", "graph_tree", "path_tree"),
    *("tree_scan", "tree_scan_backward"),
):
    _register_batching(_name)

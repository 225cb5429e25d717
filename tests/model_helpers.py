"""Official parameter names, checkpoints made up from them, and the operations' definitions under a model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from golden import fill
from torch import Tensor

import grootvl_ops
from grootv.layers import scans
from grootvl_ops import reference

OFFICIAL_NAMES: dict[str, dict[str, list[int]]] = json.loads(
    (Path(__file__).parent / "golden" / "official_names.json").read_text()
)


def official_state(names: dict[str, list[int]]) -> dict[str, Tensor]:
    """Parameters by official names, with the values that depend on their names alone."""
    state = {
        name: torch.zeros(shape, dtype=torch.long if name.endswith("num_batches_tracked") else torch.float32)
        for name, shape in names.items()
    }
    return fill.fill(state)


def shrink(names: dict[str, list[int]], dims: tuple[int, ...], depths: tuple[int, ...], num_classes: int):
    """Official names and shapes of a smaller model, made from those of GrootV-Tiny."""
    smaller = {}
    for name, shape in names.items():
        part = name.split(".")
        if part[0] == "levels" and part[2] == "blocks" and int(part[3]) >= depths[int(part[1])]:
            continue
        stage = int(part[1]) if part[0] == "levels" else {"patch_embed": 0}.get(part[0], 3)
        old, new = 80 * 2**stage, dims[stage]
        rank = {-(-old // 16): -(-new // 16), -(-old // 16) + 2: -(-new // 16) + 2}
        sizes = {old * k // 2: new * k // 2 for k in (1, 2, 3, 4, 8)} | {1000: num_classes}
        if "x_proj" in name or "dt_projs" in name:
            sizes |= rank
        smaller[name] = [sizes.get(size, size) for size in shape]
    return smaller


class ReferenceScan(torch.autograd.Function):
    """The reference's scan and its gradient, in place of the registered operation."""

    @staticmethod
    def forward(ctx, x, decay, parent, order, subtree_size, direction):
        ctx.save_for_backward(x, decay, parent, order, subtree_size)
        ctx.direction = direction
        return reference.tree_scan(x, decay, parent, order, subtree_size, direction)

    @staticmethod
    def backward(ctx, grad):
        return *reference.tree_scan_backward(grad, *ctx.saved_tensors, ctx.direction), None, None, None, None


def reference_tree(features: Tensor, metric: str, root: str) -> grootvl_ops.Tree:
    _, height, width, _ = features.shape
    weights, number = reference.edge_weights(features.detach(), metric), {"first": 0, "last": height * width - 1}[root]
    return grootvl_ops.Tree(*reference.grid_tree(weights, height, width, number))


@contextmanager
def plain_operations(
    scan: Callable[..., Tensor] = ReferenceScan.apply,
    build_tree: Callable[[Tensor, str, str], grootvl_ops.Tree] = reference_tree,
) -> Iterator[None]:
    """Models run on the definitions of the operations in plain PyTorch, with the gradients of autograd."""

    def selective_scan(x, dt, dt_weight, dt_bias, A_log, B, tree, direction="both", C=None):
        return reference.selective_scan(x, dt, dt_weight, dt_bias, A_log, B, C, *tree, direction, scan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scans, "_build_tree", build_tree)
        patch.setattr(grootvl_ops, "selective_scan", selective_scan)
        patch.setattr(grootvl_ops, "gated_norm", lambda *args: reference.gated_norm(*args)[0])
        patch.setattr(grootvl_ops, "layer_norm", lambda *args: reference.layer_norm(*args)[0])
        yield

"""Official parameter names, checkpoints made up from them, and other ways through the same model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import fill
from torch import Tensor, nn

import grootvl_ops
from grootv.layers import LayerNorm, SelectiveSSM, scans
from grootv.models import joined_blocks
from grootv.models.backbone import Mlp
from grootv.models.released import RELEASES
from grootvl_ops import reference

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL_NAMES: dict[str, dict[str, list[int]]] = json.loads((GOLDEN / "official_names.json").read_text())
VMAMBA_NAMES: dict[str, dict[str, list[int]]] = json.loads((GOLDEN / "vmamba_names.json").read_text())


def double(*shape: int, seed: int = 1) -> Tensor:
    """Normally distributed float64 values, the same in each call."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm())


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


def official_names(size: str) -> dict[str, list[int]]:
    """Official names and shapes of a released model of timm's registry."""
    return OFFICIAL_NAMES.get(size) or VMAMBA_NAMES[RELEASES[size].file.split("_ckpt")[0]]


def vmamba_names(
    channels: int, depths: tuple[int, ...], expand: int, num_classes: int = 1000, d_state: int = 1
) -> dict[str, list[int]]:
    """Official names and shapes of a VMamba with `channels` in its first stage."""
    stem = [("0", [channels // 2, 3, 3, 3]), ("2", [channels // 2]), ("5", [channels, channels // 2, 3, 3])]
    names = {f"patch_embed.{number}.weight": shape for number, shape in (*stem, ("7", [channels]))}
    for i, depth in enumerate(depths):
        c, last = channels * 2**i, i == len(depths) - 1
        inner, rank = expand * c, -(-c // 16)
        for j in range(depth):
            block = {
                "norm.weight": [c],
                "op.x_proj_weight": [4, rank + 2 * d_state, inner],
                "op.A_logs": [4 * inner, d_state],
                "op.Ds": [4 * inner],
                "op.dt_projs_weight": [4, inner, rank],
                "op.dt_projs_bias": [4, inner],
                "op.out_norm.weight": [inner],
                "op.in_proj.weight": [inner, c],
                "op.conv2d.weight": [inner, 1, 3, 3],
                "op.out_proj.weight": [c, inner],
                "norm2.weight": [c],
                "mlp.fc1.weight": [4 * c, c],
                "mlp.fc2.weight": [c, 4 * c],
            }
            names |= {f"layers.{i}.blocks.{j}.{name}": shape for name, shape in block.items()}
        if not last:
            names |= {f"layers.{i}.downsample.1.weight": [2 * c, c, 3, 3], f"layers.{i}.downsample.3.weight": [2 * c]}
    names |= {"classifier.norm.weight": [c], "classifier.head.weight": [num_classes, c]}
    bare = ("in_proj.weight", "conv2d.weight", "out_proj.weight")  # without a bias
    with_biases = {}
    for name, shape in names.items():
        with_biases[name] = shape
        if name.endswith(".weight") and not name.endswith(bare):
            with_biases[name.replace(".weight", ".bias")] = shape[:1]
    return with_biases


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
        tree = [field.expand(x.shape[:2]) for field in tree]
        return reference.selective_scan(x, dt, dt_weight, dt_bias, A_log, B, C, *tree, direction, scan)

    def add_layer_norm(x, branch, *args):
        return reference.add_layer_norm(x.to(torch.promote_types(x.dtype, branch.dtype)), branch, *args)[:2]

    def depthwise_conv_silu(x, weight, dilation):
        return reference.depthwise_conv_silu(x.flatten(1, 2), weight, x.shape[1], dilation)[0].view(x.shape)

    def mixer_input(x, in_proj, conv_weight, dilation):
        features, z = F.linear(x, in_proj).chunk(2, dim=-1)
        return depthwise_conv_silu(features, conv_weight, dilation).flatten(1, 2), z.flatten(1, 2)

    def mixer_output(
        x, z, x_proj, dt_weight, dt_bias, A_log, D_skip, h_weight, h_bias, out_weight, out_bias, out_proj,
        tree, direction, eps,
    ):  # fmt: skip
        dt, B, C = F.linear(x, x_proj).split([dt_weight.shape[1], 1, 1], dim=-1)
        h = selective_scan(x, dt, dt_weight, dt_bias, A_log, B.squeeze(-1), tree, direction)
        norms = (D_skip, h_weight, h_bias, out_weight, out_bias)
        return F.linear(reference.gated_norm(h, x, z, C.squeeze(-1), *norms, eps)[0], out_proj)

    def gelu_mlp(x, weight1, bias1, weight2, bias2):
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scans, "_build_tree", build_tree)
        patch.setattr(joined_blocks, "joins_products", lambda x: False)
        patch.setattr(grootvl_ops, "mixer_input", mixer_input)
        patch.setattr(grootvl_ops, "mixer_output", mixer_output)
        patch.setattr(grootvl_ops, "gelu_mlp", gelu_mlp)
        patch.setattr(grootvl_ops, "selective_scan", selective_scan)
        patch.setattr(grootvl_ops, "gated_norm", lambda *args: reference.gated_norm(*args)[0])
        patch.setattr(grootvl_ops, "layer_norm", lambda *args: reference.layer_norm(*args)[0])
        patch.setattr(grootvl_ops, "add_layer_norm", add_layer_norm)
        patch.setattr(grootvl_ops, "depthwise_conv_silu", depthwise_conv_silu)
        yield


def call_submodules(model: nn.Module) -> None:
    """Hooks that change nothing, for which the modules are called whose weights operations would take."""
    for module in model.modules():
        if isinstance(module, LayerNorm | Mlp | nn.GELU):
            module.register_forward_hook(lambda _, __, output: output)
    for mixer in (module for module in model.modules() if isinstance(module, SelectiveSSM)):
        for module in (mixer.in_proj, mixer.conv, mixer.x_proj, mixer.dt_proj, mixer.h_norm, mixer.out_norm):
            module.register_forward_hook(lambda _, __, output: output)
        assert not (mixer.splits_input or mixer.fuses_conv or mixer.fuses_step or mixer.fuses_norms)


def replay_graph(step: Callable[[], list[Tensor]], static: Tensor, other: Tensor) -> list[Tensor]:
    """What `step`, which reads `static`, gives when it is captured in a CUDA graph and replayed on the values of
    `other`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    return [result.clone() for result in captured]

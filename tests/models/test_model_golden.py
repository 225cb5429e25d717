"""GrootV against outputs of the published implementation, and against a plain recomputation for other inputs."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from golden import fill
from model_helpers import OFFICIAL_NAMES, official_state, plain_operations, relative_error, shrink
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor

import grootvl_ops
from grootv.layers import TreeSSM
from grootv.layers.tree_ssm import ROOTS
from grootv.models import GrootV, checkpoint_filter_fn
from grootv.models.checkpoint import official_to_own

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=["operations", "reference"])
def operations(request):
    """What the model runs on: the operations as they are, or their definitions."""
    with plain_operations() if request.param == "reference" else nullcontext():
        yield request.param


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN / "grootv_tiny.pt", weights_only=True)


def golden_model(device: str) -> GrootV:
    model = timm.create_model("grootv_tiny")
    model.load_state_dict(checkpoint_filter_fn(official_state(OFFICIAL_NAMES["grootv_tiny"]), model))
    return model.to(device)


def test_golden_outputs(device, operations, golden):
    model = golden_model(device).eval()
    image = fill.image(7, 2, 224, 224).to(device)
    with torch.no_grad():
        features, stages = model.forward_intermediates(image, output_fmt="NHWC")
        logits = model.forward_head(features)
    assert relative_error(logits, golden["logits"]) < 1e-4
    for stage, expected in zip(stages, golden["stages"], strict=True):
        assert relative_error(stage[:, ::4, ::4, ::8], expected) < 1e-4


def test_golden_gradients(device, operations, golden):
    # The golden gradients carry float32 rounding of about 5e-5 of their own. The reference's order of summation, which
    # depends on the number of threads, can add as much; in float64 it adds nothing.
    dtype = torch.float64 if operations == "reference" else torch.float32
    model = golden_model(device).to(dtype).train()
    logits = model(fill.image(7, 2, 224, 224).to(device, dtype))
    (logits * torch.linspace(-1, 1, 1000, device=device, dtype=dtype)).sum().backward()
    parameters = dict(model.named_parameters())
    assert len(golden["grad_norms"]) == len(parameters)
    for name, norm in golden["grad_norms"].items():
        grad = parameters[official_to_own(name)].grad
        # The bound from below is for the bias before BatchNorm, whose gradient is nothing but rounding.
        assert grad.double().norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name
    mixer = model.stages[0].blocks[0].mixer
    assert relative_error(mixer.x_proj.weight.grad, golden["grad_x_proj_weight"][0]) < 1e-4
    assert relative_error(mixer.A_log.grad, golden["grad_A_logs"][:, 0]) < 1e-4


# A recomputation in float64 that shares nothing with the package: official names, plain NCHW maps, scipy's spanning
# tree, and the scan as a dense matrix of products along paths.


def dense_scan(x: Tensor, decay: Tensor, features: Tensor, metric: str = "cosine", root: str = "all") -> Tensor:
    """x, decay: (L, D) of one map; features: (C, H, W) that the tree is built on."""
    _, height, width = features.shape
    vectors = features.flatten(1).T.detach().double().cpu().numpy()
    vertex = np.arange(height * width).reshape(height, width)
    pairs = list(zip(vertex[:-1].flat, vertex[1:].flat, strict=True))
    pairs += zip(vertex[:, :-1].flat, vertex[:, 1:].flat, strict=True)

    def weight(f: np.ndarray, g: np.ndarray) -> float:
        if metric == "cosine":
            return np.exp(-f @ g / np.linalg.norm(f) / np.linalg.norm(g))
        return np.linalg.norm(f - g, ord={"euclidean": 2, "manhattan": 1}[metric])

    size = height * width
    graph = np.zeros((size, size))
    for i, j in pairs:
        graph[i, j] = weight(vectors[i], vectors[j])
    tree = minimum_spanning_tree(graph)
    _, parent = breadth_first_order(tree, size - 1 if root == "last" else 0, directed=False)
    rows = []
    for start in range(size):
        visited, before = breadth_first_order(tree, start, directed=False)
        product: dict[int, Tensor] = {start: torch.ones_like(x[0])}
        for v in visited[1:]:
            u = before[v]
            child = v if parent[v] == u else u  # every edge carries the decay of its lower end
            downwards = parent[v] == u
            blocked = root != "all" and not downwards
            product[v] = product[u] * (torch.zeros_like(x[0]) if blocked else decay[child])
        rows.append(sum(product[v] * x[v] for v in range(size)))
    return torch.stack(rows)


def plain_tree_ssm(p: dict[str, Tensor], x: Tensor, metric: str = "cosine", root: str = "all") -> Tensor:
    """x: (B, C, H, W); p: parameters of a mixer by official names."""
    x, z = torch.einsum("dc,bchw->bdhw", p["in_proj.weight"], x).chunk(2, dim=1)
    z = F.silu(z)
    x = F.silu(F.conv2d(x, p["conv2d.weight"], padding=1, groups=x.shape[1]))
    outputs = []
    for features, gate in zip(x, z, strict=True):
        u = features.flatten(1).T  # (L, D)
        dt, b, c = torch.split(u @ p["x_proj_weight"][0].T, [p["dt_projs_weight"].shape[2], 1, 1], dim=1)
        delta = F.softplus(dt @ p["dt_projs_weight"][0].T + p["dt_projs_bias"][0])
        h = dense_scan(delta * b * u, torch.exp(-p["A_logs"][:, 0].exp() * delta), features, metric, root)
        h = F.layer_norm(h, h.shape[1:], p["h_norm.weight"], p["h_norm.bias"], 1e-5)
        y = c * h + p["Ds"] * u
        y = F.layer_norm(y, y.shape[1:], p["out_norm.weight"], p["out_norm.bias"], 1e-5) * gate.flatten(1).T
        outputs.append((y @ p["out_proj.weight"].T).T.unflatten(1, features.shape[1:]))
    return torch.stack(outputs)


def plain_model(p: dict[str, Tensor], x: Tensor, depths: tuple[int, ...]) -> list[Tensor]:
    """The four stage features, (B, C, H, W), and the logits in eval mode."""

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, 1e-6).movedim(-1, 1)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}

    for i in "12":
        x = F.conv2d(x, p[f"patch_embed.conv{i}.weight"], p[f"patch_embed.conv{i}.bias"], stride=2, padding=1)
        x = norm(x, f"patch_embed.norm{i}.1")
        x = F.gelu(x) if i == "1" else x
    outputs = []
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"levels.{i}.blocks.{j}"
            x = x + plain_tree_ssm(part(f"{block}.TreeSSM."), norm(x, f"{block}.norm1.0"))
            y = norm(x, f"{block}.norm2.0").movedim(1, -1)
            y = F.gelu(F.linear(y, p[f"{block}.mlp.fc1.weight"], p[f"{block}.mlp.fc1.bias"]))
            x = x + F.linear(y, p[f"{block}.mlp.fc2.weight"], p[f"{block}.mlp.fc2.bias"]).movedim(-1, 1)
        x = norm(x, f"levels.{i}.norm.0")
        outputs.append(x)
        if i < 3:
            x = F.conv2d(x, p[f"levels.{i}.downsample.conv.weight"], stride=2, padding=1)
            x = norm(x, f"levels.{i}.downsample.norm.1")
    x = F.conv2d(x, p["conv_head.0.weight"])
    mean, var = p["conv_head.1.0.running_mean"], p["conv_head.1.0.running_var"]
    x = F.batch_norm(x, mean, var, p["conv_head.1.0.weight"], p["conv_head.1.0.bias"])
    outputs.append(F.linear(F.gelu(x).mean((2, 3)), p["head.weight"], p["head.bias"]))
    return outputs


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("size", [(32, 32), (40, 72), (75, 33), (17, 5)])
def test_outputs_of_other_sizes(size, dtype, bound, device, operations):
    dims, depths = (16, 32, 64, 128), (1, 2, 1, 1)
    state = official_state(shrink(OFFICIAL_NAMES["grootv_tiny"], dims, depths, 10))
    model = GrootV(dims=dims, depths=depths, num_classes=10)
    model.load_state_dict(checkpoint_filter_fn(dict(state), model))
    model.to(device, dtype).eval()
    image = fill.image(size[0], 2, *size).double()
    with torch.no_grad():
        features, stages = model.forward_intermediates(image.to(device, dtype))
        outputs = [*stages, model.forward_head(features)]
    for output, expected in zip(outputs, plain_model(double(state), image, depths), strict=True):
        assert output.dtype == dtype
        assert relative_error(output, expected) < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_gradients_of_other_sizes(dtype, bound, device, operations):
    dims, depths = (16, 32, 64, 128), (1, 2, 1, 1)
    state = official_state(shrink(OFFICIAL_NAMES["grootv_tiny"], dims, depths, 10))
    model = GrootV(dims=dims, depths=depths, num_classes=10)
    model.load_state_dict(checkpoint_filter_fn(dict(state), model))
    model.to(device, dtype).eval()
    image = fill.image(3, 2, 44, 36).double().requires_grad_()
    seen = image.detach().to(device, dtype).requires_grad_()
    weights = torch.linspace(-1, 1, 10).double()
    (model(seen) * weights.to(device, dtype)).sum().backward()

    plain = double(state)
    for name, value in plain.items():
        value.requires_grad_(value.is_floating_point() and "running" not in name)
    (plain_model(plain, image, depths)[-1] * weights).sum().backward()
    assert relative_error(seen.grad, image.grad) < bound
    parameters = dict(model.named_parameters())
    compared = 0
    for name, value in plain.items():
        if value.requires_grad:
            grad = parameters[official_to_own(name)].grad
            assert relative_error(grad, value.grad.reshape(grad.shape)) < bound, name
            compared += 1
    assert compared == len(parameters)


@pytest.mark.parametrize("metric", grootvl_ops.METRICS)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (6, 8)])
def test_mixer_options(size, root, metric, device):
    torch.manual_seed(0)
    mixer = TreeSSM(24, metric=metric, root=root).to(device, torch.float64)
    torch.nn.init.normal_(mixer.A_log, std=0.5)
    torch.nn.init.normal_(mixer.D_skip)
    p = {name: value.detach().cpu() for name, value in mixer.named_parameters()}
    official = {
        "in_proj.weight": p["in_proj.weight"],
        "conv2d.weight": p["conv.weight"],
        "x_proj_weight": p["x_proj.weight"][None],
        "dt_projs_weight": p["dt_proj.weight"][None],
        "dt_projs_bias": p["dt_proj.bias"][None],
        "A_logs": p["A_log"][:, None],
        "Ds": p["D_skip"],
        **{f"{n}.{k}": p[f"{n}.{k}"] for n in ("h_norm", "out_norm") for k in ("weight", "bias")},
        "out_proj.weight": p["out_proj.weight"],
    }
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    built = []
    output = mixer(x.to(device), built=built)
    expected = plain_tree_ssm(official, x.movedim(-1, 1), metric, root).movedim(1, -1)
    assert relative_error(output, expected) < 1e-10
    assert torch.equal(mixer(x.to(device), tree=built[0]), output)

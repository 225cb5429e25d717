"""tools/get_flops.py against the published columns, and against counts by other means."""

import importlib.util
from types import ModuleType

import pytest

pytest.importorskip("mmengine")

import timm
import torch
from dense_helpers import skip_without
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_helpers import ROOT

import grootvl_ops


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("get_flops", ROOT / "tools" / "get_flops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "published"), [("grootv_tiny", 4.8e9), ("grootv_small", 8.5e9), ("grootv_base", 15.1e9)]
)
def test_published_classification_flops(tool: ModuleType, name: str, published: float) -> None:
    _, run = tool.build(name, (224, 224))
    assert round(sum(tool.count_flops(run).values()) / 1e9, 1) == published / 1e9


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vmamba_tiny_s1l8", 4.906),
        ("vmamba_small_s1l20", 8.612),
        ("vmamba_base_s1l20", 15.221),
        ("vmamba_tiny_s2l5", 4.858),
        ("vmamba_small_s2l15", 8.716),
        ("vmamba_base_s2l15", 15.359),
    ],
)
def test_published_flops_of_vmamba(tool: ModuleType, name: str, published: float) -> None:
    """They count ten for each value of a scan, instead of one for its multiplication with its addition."""
    flops = tool.count_flops(tool.build(name, (224, 224))[1])
    assert (sum(flops.values()) + 9 * flops["scan"]) / 1e9 == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize(("size", "parameters", "published"), [("tiny", 60, 941), ("small", 82, 1019)])
def test_published_segmentation_columns(tool: ModuleType, size: str, parameters: int, published: int) -> None:
    skip_without("segmentation")
    config = ROOT / "configs" / "segmentation" / f"grootv-{size}_upernet_8xb2-160k_ade20k-512x512.py"
    network, run = tool.build(str(config), (512, 2048))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == parameters
    assert sum(tool.count_flops(run).values()) / 1e9 == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 49), ("small", 70)])
def test_published_detection_parameters(tool: ModuleType, size: str, parameters: int) -> None:
    skip_without("detection")
    config = ROOT / "configs" / "detection" / f"mask-rcnn_grootv-{size}_fpn_1x_coco.py"
    network, _ = tool.build(str(config), (64, 64))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == parameters


def test_parts_of_a_detector(tool: ModuleType) -> None:
    """FLOPs of a detector grow in proportion to the image, except those of the second stage."""
    skip_without("detection")
    config = ROOT / "configs" / "detection" / "mask-rcnn_grootv-nano_fpn_digits.py"
    small, large = (tool.count_flops(tool.build(str(config), shape)[1]) for shape in ((128, 128), (128, 256)))
    for part in ("scan", "norms"):
        assert large[part] == 2 * small[part] > 0
    assert 1 < large["convolutions"] / small["convolutions"] < 2


def test_layers_are_counted_as_by_hand(tool: ModuleType) -> None:
    """Products and convolutions are counted by the shapes that layers get, parts without layers by the sizes."""
    model = timm.create_model("grootv_nano", num_classes=10, dims=(16, 32), depths=(1, 2)).eval()
    expected = {"convolutions": 0, "products": 0, "norms": 0}

    def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            expected["convolutions"] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            expected["products"] += output.numel() * module.in_features
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            expected["norms"] += 5 * output.numel()

    for module in model.modules():
        module.register_forward_hook(count)
    x = torch.randn(2, 3, 32, 48)
    counted = tool.count_flops(lambda: model(x))
    maps = [(8 * 12, 32, 1), (4 * 6, 64, 2)]  # pixels, inner channels, blocks
    assert {part: counted[part] for part in expected} == expected
    assert counted["scan"] == sum(4 * 2 * pixels * dim * blocks for pixels, dim, blocks in maps)
    edges = {96: 7 * 12 + 8 * 11, 24: 3 * 6 + 4 * 5}
    assert counted["tree"] == sum(2 * (pixels + edges[pixels]) * dim * blocks for pixels, dim, blocks in maps)
    # Without hooks, the fused operations take the weights of some layers, and the counts stay.
    for module in model.modules():
        module._forward_hooks.clear()
    assert tool.count_flops(lambda: model(x)) == counted


@pytest.mark.parametrize("direction, sweeps", [("both", 4), ("up", 1), ("down", 1)])
def test_states_are_counted(tool: ModuleType, direction: str, sweeps: int) -> None:
    """Three states: three scans, and three products with C."""
    tree = grootvl_ops.path_tree(torch.arange(6))
    x, dt, B = torch.ones(2, 6, 8), torch.ones(2, 6, 4), torch.ones(2, 6, 3)
    arguments = (x, dt, torch.ones(8, 4), None, torch.ones(8, 3), B, tree, direction, B)
    counted = tool.count_flops(lambda: grootvl_ops.selective_scan(*arguments))
    assert counted["scan"] == 3 * (sweeps + 1) * x.numel() and counted["products"] == 4 * x.numel()


def test_a_scan_of_one_sweep_costs_a_quarter(tool: ModuleType) -> None:
    scans = []
    for root in ("all", "first"):
        model = timm.create_model("grootv_nano", root=root).eval()
        scans.append(tool.count_flops(lambda model=model: model(torch.randn(1, 3, 32, 32)))["scan"])
    assert scans[0] == 4 * scans[1]


def test_pytorchs_counter_counts_twice_as_much(tool: ModuleType) -> None:
    """It counts multiplications and additions, and, like the table, what the fused operations do."""
    tree = grootvl_ops.path_tree(torch.arange(6))
    x, dt, B = torch.ones(2, 6, 8), torch.ones(2, 6, 4), torch.ones(2, 6, 3)
    weight = torch.ones(8)

    def run() -> None:
        h = grootvl_ops.selective_scan(x, dt, torch.ones(8, 4), None, torch.ones(8, 3), B, tree, "up", B)
        h = grootvl_ops.gated_norm(grootvl_ops.tree_scan(h, x, tree), x, x, B[..., 0], *[weight] * 5, 1e-5)
        grootvl_ops.edge_weights(grootvl_ops.layer_norm(h, weight, weight, 1e-6).view(2, 2, 3, 8))

    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == 2 * sum(tool.count_flops(run).values())

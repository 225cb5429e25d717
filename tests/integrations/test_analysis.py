"""Quantised, counted and explained: tools that look into a model."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from everyday_models import images, make
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import grootv


@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"]
)
def test_torchao(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = timm.create_model("grootv_nano").eval()
    with torch.no_grad():
        expected = model(images())
        quantization.quantize_(model, getattr(quantization, config)())
        assert all(type(m.weight) is not nn.Parameter for m in model.modules() if isinstance(m, nn.Linear))
        quantised = model(images())
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager")(images())
    for found in (quantised, compiled):
        assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_captum() -> None:
    attr = pytest.importorskip("captum.attr")
    model, inputs = make("grootv_nano"), images().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs)[:, 1].sum(), inputs)
    torch.testing.assert_close(attr.Saliency(model).attribute(images(), target=1), gradient.abs())
    # On a short way from the baseline to the input, the integral of the gradient is the gradient.
    near = attr.IntegratedGradients(model).attribute(images(), images() - 1e-4, target=1, n_steps=8).float()
    assert (near - 1e-4 * gradient).norm() < 0.02 * (1e-4 * gradient).norm()
    block = model.stages[-1].blocks[-1]
    layer = attr.LayerGradCam(model, block).attribute(images(), target=1)
    kept = []
    block.register_forward_hook(lambda _, __, y: kept.append(y) or y.retain_grad())
    model(images())[:, 1].sum().backward()
    torch.testing.assert_close(layer, (kept[0].grad.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True))
    assert attr.LayerConductance(model, block).attribute(images(), target=1, n_steps=4).shape == (2, 64, 2, 2)
    assert attr.DeepLift(model).attribute(images(), target=1).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus", "LayerCAM", "EigenCAM"])
def test_grad_cam(method: str) -> None:
    """Of the last block, without a `reshape_transform`, as of ConvNeXt; GradCAM against its definition."""
    cams = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model = make("grootv_nano")
    block = model.stages[-1].blocks[-1]
    with getattr(cams, method)(model=model, target_layers=[block]) as cam:
        maps = cam(input_tensor=images(), targets=[targets.ClassifierOutputTarget(1)] * 2)
    assert maps.shape == (2, 64, 64) and maps.std() > 0
    if method == "GradCAM":
        kept = []
        block.register_forward_hook(lambda _, __, y: kept.append(y) or y.retain_grad())
        model(images())[:, 1].sum().backward()
        weights = kept[0].grad.mean((2, 3), keepdim=True)
        expected = (weights * kept[0]).sum(1).relu()
        coarse = torch.tensor(maps)[:, 16::32, 16::32]  # the four pixels of the map, up to interpolation
        order = expected.flatten(1).argsort(1), coarse.flatten(1).argsort(1)
        assert (order[0][:, -1] == order[1][:, -1]).all()


# Counters


@pytest.fixture(scope="module", params=["grootv_nano", "grootv_tiny"])
def counted(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor, float]:
    """A model, an image, and the FLOPs by tools/get_flops.py."""
    pytest.importorskip("mmengine")
    spec = importlib.util.spec_from_file_location("get_flops", Path(__file__).parents[2] / "tools" / "get_flops.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    model, image = timm.create_model(request.param).eval(), torch.zeros(1, 3, 224, 224)
    return model, image, sum(tool.count_flops(lambda: model(image)).values())


def test_pytorchs_counter(counted: tuple) -> None:
    model, image, expected = counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=0.02)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("handles", [False, True])
def test_fvcore(counted: tuple, handles: bool) -> None:
    nn_tools = pytest.importorskip("fvcore.nn")
    model, image, expected = counted
    counter = nn_tools.FlopCountAnalysis(model, image)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    if handles:
        counter.set_op_handle(**grootv.flops.fvcore_handles())
    assert counter.total() == pytest.approx(expected, rel=0.005 if handles else 0.025)
    # It does not see calls of modules that do nothing.
    uncalled = [name for name in counter.uncalled_modules() if type(model.get_submodule(name)) is not nn.Identity]
    assert uncalled == []
    assert handles != any("grootvl_ops" in name for name in counter.unsupported_ops())


@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops(counted: tuple, backend: str) -> None:
    ptflops = pytest.importorskip("ptflops")
    model, _, expected = counted
    options = {"custom_modules_hooks": grootv.flops.ptflops_hooks(), "backend": backend, "as_strings": False}
    options |= {"print_per_layer_stat": False, "verbose": False}
    total, _ = ptflops.get_model_complexity_info(model, (3, 224, 224), **options)
    assert total == pytest.approx(expected, rel=0.01)


def test_torchinfo(counted: tuple) -> None:
    """It counts a linear layer once for an image, whatever the number of pixels: its total says nothing here."""
    torchinfo = pytest.importorskip("torchinfo")
    model, image, _ = counted
    summary = torchinfo.summary(model, input_data=image, verbose=0)
    names = {id(info.module) for info in summary.summary_list}
    assert all(id(module) in names for module in model.modules())
    assert summary.total_params == sum(p.numel() for p in model.parameters())

"""Whole models under torch.func's transforms, in symbolic traces, and on batches without images."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from model_helpers import call_submodules
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torchvision.models.feature_extraction import create_feature_extractor

import grootvl_ops
from grootv.models import GrootV, VMamba

OPTIONS = [{}, {"tree_per": "stage"}, {"root": "first", "d_state": 2}, {"scan": "cross"}, {"family": VMamba}]
each_variant = pytest.mark.parametrize("options, fused", [*((options, True) for options in OPTIONS), ({}, False)])


def small(device: str = "cpu", family: type[nn.Module] = GrootV, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return family(dims=(16, 32), depths=(2, 1), num_classes=4, **kwargs).eval().to(device)


def image(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)


def loss_of(model: nn.Module, parameters: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(model, parameters, (images,)), targets)


@each_variant
def test_gradients_and_gradients_of_each_sample(options: dict, fused: bool, device: str) -> None:
    model, images = small(device, **options).double(), image(3, 3, 32, 40, device=device)
    targets = torch.tensor([0, 2, 3], device=device)
    twin = copy.deepcopy(model)
    if not fused:
        call_submodules(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    mean = grad(partial(loss_of, model))(parameters, images, targets)
    each = vmap(grad(lambda p, x, y: loss_of(model, p, x[None], y[None])), (None, 0, 0))(parameters, images, targets)
    F.cross_entropy(twin(images), targets).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(mean[name], parameter.grad, msg=name)
        torch.testing.assert_close(each[name].mean(0), parameter.grad, msg=name)
    twin.zero_grad()
    F.cross_entropy(twin(images[1:2]), targets[1:2]).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(each[name][1], parameter.grad, msg=name)


def test_jacobians_agree_in_both_modes(device: str) -> None:
    model, images = small(device).double().requires_grad_(False), image(2, 3, 8, 12, device=device)
    expected = torch.autograd.functional.jacobian(model, images)
    torch.testing.assert_close(jacrev(model)(images), expected)
    torch.testing.assert_close(jacfwd(model)(images), expected)
    output, pull = vjp(model, images)
    torch.testing.assert_close(pull(torch.ones_like(output))[0], expected.sum((0, 1)))


@each_variant
def test_tangents_are_numerical_derivatives(options: dict, fused: bool, device: str) -> None:
    model = small(device, **options).double().requires_grad_(False)
    images, direction = image(4, 3, 16, 24, device=device).split(2)
    step = 1e-6
    expected = (model(images + step * direction) - model(images - step * direction)) / (2 * step)
    if not fused:
        call_submodules(model)
    _, tangent = jvp(model, (images,), (direction,))
    _, linear = linearize(model, images)
    with fwAD.dual_level():
        dual = fwAD.unpack_dual(model(fwAD.make_dual(images, direction))).tangent
    for actual in (tangent, linear(direction), dual):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


def test_maps_over_images_and_over_models(device: str) -> None:
    model, images = small(device).double(), image(3, 2, 3, 32, 40, device=device)
    with torch.no_grad():
        torch.testing.assert_close(vmap(model)(images), torch.stack([model(x) for x in images]))
        models = [model, small(device).double()]
        nn.init.normal_(models[1].stem.conv1.weight)
        state = stack_module_state(models)
        outputs = vmap(lambda p, b: functional_call(model, (p, b), (images[0],)))(*state)
        torch.testing.assert_close(outputs, torch.stack([m(images[0]) for m in models]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, create_feature_extractor], ids=["fx", "torchvision"])
def test_symbolic_traces(trace: Callable, options: dict) -> None:
    model = small(**options)
    if trace is create_feature_extractor:
        nodes = ["stem", "stages.0.blocks.1", "stages.0.blocks.0.mixer", "stages.1", "head"]
        traced = create_feature_extractor(model, nodes)
        seen = {}
        for name in nodes:
            model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))
    else:
        traced, nodes = trace(model), ["head"]
        seen = {"head": None}
    for shape in ((2, 3, 64, 96), (1, 3, 37, 45), (0, 3, 32, 32)):
        outputs = traced(image(*shape).float())
        expected = model(image(*shape).float())
        seen["head"] = expected
        for name in nodes:
            torch.testing.assert_close(outputs[name] if isinstance(outputs, dict) else outputs, seen[name])
    graph = torch.fx.symbolic_trace(small(**options)).graph
    leaves = {node.target for node in graph.nodes if node.op == "call_module"}
    assert {"stages.0.blocks.1.mixer", "stages.1.norm", "stages.1.blocks.0.mlp.fc1", "head.norm"} <= leaves


@pytest.mark.filterwarnings("ignore")
def test_quantisation_of_a_symbolic_trace() -> None:
    """Convolutions and MLPs are quantised, and mixers stay, as the attention of other models does."""
    torch.manual_seed(0)
    model, images = small(), image(4, 3, 64, 64).float()
    expected = model(images)
    prepared = prepare_fx(model, get_default_qconfig_mapping(), (images,))
    prepared(images)
    quantised = convert_fx(prepared)
    kinds = {name: type(module).__module__ for name, module in quantised.named_modules()}
    assert all("quantized" in kinds[name] for name in ("stem.conv1", "stages.0.blocks.0.mlp.fc1", "head.fc"))
    error = (quantised(images) - expected).norm() / expected.norm()
    assert 0 < error < 0.2, error


# Batches without images, and images that are none


def runs(name: str) -> Callable[[Tensor], Tensor | list[Tensor]]:
    """Ways to call a model, each from images to maps or logits."""
    model = small()
    if name == "training":
        return model.train()
    if name == "checkpointing":
        model.set_grad_checkpointing()
        return model.train()
    if name == "intermediates":
        return lambda x: model.forward_intermediates(x, intermediates_only=True)
    if name == "features_only":
        return timm.create_model("grootv_nano", features_only=True, dims=(16, 32), depths=(1, 1), out_indices=(0, 1))
    if name == "autocast":
        return torch.autocast("cpu", torch.bfloat16)(model)
    if name == "compile":
        torch.compiler.reset()
        return torch.compile(model, backend="aot_eager")
    if name == "export":
        return lambda x: torch.export.export(model, (x,)).module()(x)
    example = image(1, 3, 32, 32).float()
    makers = {"eager": lambda: model, "script": lambda: torch.jit.script(model)}
    makers["trace"] = lambda: torch.jit.trace(model, example)
    makers["fx"] = lambda: torch.fx.symbolic_trace(model)
    return makers[name]()


RUNS = ["eager", "training", "checkpointing", "intermediates", "features_only", "autocast", "compile", "export"]
RUNS += ["script", "trace", "fx"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_batch_without_images(name: str) -> None:
    run = runs(name)
    images = torch.zeros(0, 3, 32, 40, requires_grad=True)
    outputs = run(images)
    if isinstance(outputs, list):
        assert [tuple(output.shape) for output in outputs] == [(0, 16, 8, 10), (0, 32, 4, 5)]
    else:
        assert outputs.shape == (0, 4)
        outputs = [outputs]
    if name != "export":
        sum(output.float().sum() for output in outputs).backward()
        assert images.grad.shape == images.shape
    if isinstance(run, nn.Module):
        assert all(torch.isfinite(buffer).all() for buffer in run.buffers() if buffer.is_floating_point())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["eager", "intermediates", "features_only", "fx"])
def test_images_that_a_model_does_not_take(name: str) -> None:
    run = runs(name)
    with pytest.raises(TypeError, match=r"images must be floating point, got torch.uint8: .*resolve_model_data_config"):
        run(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got \[3, 32, 32\]; .*unsqueeze\(0\)"):
        run(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got \[3, 2, 2, 32, 32\]$"):
        run(torch.zeros(3, 2, 2, 32, 32))


@pytest.mark.slow
@pytest.mark.skipif(grootvl_ops.backend() != "compiled", reason="all tests above run without the compiled library")
def test_all_of_this_without_the_compiled_library(tmp_path: Path) -> None:
    package = Path(grootvl_ops.__file__).parent
    shutil.copytree(package, tmp_path / "grootvl_ops", ignore=shutil.ignore_patterns("_C*", "_build.json"))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    selected = "(gradients or jacobians or tangents or maps or (batch and eager)) and not cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, __file__]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0 and "slow reference" in result.stdout, result.stdout[-3000:]

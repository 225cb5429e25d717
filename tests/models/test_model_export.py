"""GrootV and VMamba scripted, traced, symbolically traced, compiled and exported: the same results as in eager mode."""

import copy
import io

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import NodePathTracer

from grootv.models import GrootV, VMamba

OPTIONS = [{}, {"tree_per": "stage"}, {"root": "first", "metric": "manhattan"}, {"scan": "cross"}, {"family": VMamba}]


def small(family: type[nn.Module] = GrootV, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return family(dims=(16, 32, 48, 64), depths=(1, 2, 1, 1), num_classes=10, **kwargs).eval()


def smaller(family: type[nn.Module] = GrootV, **kwargs) -> nn.Module:
    """Two stages: what has to be compiled or exported grows with the number of blocks."""
    torch.manual_seed(0)
    return family(dims=(16, 32), depths=(2, 1), num_classes=10, **kwargs).eval()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def through_a_file(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS)
def test_script(options):
    model = small(**options)
    scripted = through_a_file(torch.jit.script(model))
    for shape in ((2, 3, 64, 96), (1, 3, 37, 45)):
        torch.testing.assert_close(scripted(image(*shape)), model(image(*shape)), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_of_features():
    torch.manual_seed(0)
    kwargs = {"features_only": True, "feature_cls": "getter", "out_indices": (0, 2)}
    model = timm.create_model("grootv_nano", **kwargs).eval()
    scripted = torch.jit.script(model)
    # The maps have a variance of one, and the operations of a script round in another way: single values near zero
    # differ by more than 1e-6.
    for actual, expected in zip(scripted(image(1, 3, 64, 64)), model(image(1, 3, 64, 64)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", OPTIONS)
def test_trace_takes_other_sizes(options):
    model = small(**options)
    traced = through_a_file(torch.jit.trace(model, image(1, 3, 64, 96)))
    for shape in ((1, 3, 64, 96), (2, 3, 64, 64), (1, 3, 37, 45)):
        assert torch.equal(traced(image(*shape)), model(image(*shape)))


@pytest.mark.parametrize("options", OPTIONS)
def test_symbolic_trace_is_bitwise_equal(options):
    model = small(**options)
    tracer = NodePathTracer(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    traced = torch.fx.GraphModule(model, tracer.trace(model))
    twin = copy.deepcopy(model)
    for shape in ((2, 3, 64, 96), (1, 3, 37, 45)):
        assert torch.equal(traced(image(*shape)), twin(image(*shape)))
    traced(image(2, 3, 64, 96)).square().sum().backward()
    twin(image(2, 3, 64, 96)).square().sum().backward()
    grads = {name: p.grad for name, p in traced.named_parameters()}
    for name, p in twin.named_parameters():
        assert torch.equal(grads[name], p.grad), name


def train_step(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(images).float().square().sum()
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("options, checkpointing", [*((options, False) for options in OPTIONS), (OPTIONS[1], True)])
def test_compile(options, checkpointing, device):
    """Through Dynamo and AOTAutograd without a break; code generation has nothing to do with the model."""
    torch.compiler.reset()
    model = smaller(**options).to(device)
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    images = image(2, 3, 64, 96).to(device)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    model.train()
    loss, grads = train_step(compiled, images)
    expected_loss, expected = train_step(model, images)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    for grad, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, e, rtol=1e-3, atol=1e-4)


def test_compile_under_autocast():
    torch.compiler.reset()
    model = smaller()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(image(2, 3, 64, 64)), model(image(2, 3, 64, 64)))


def test_compile_takes_other_sizes():
    torch.compiler.reset()
    model = smaller()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64), (2, 3, 128, 72)):
        torch.testing.assert_close(compiled(image(*shape)), model(image(*shape)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_export(options):
    model = smaller(**options)
    exported = torch.export.export(model, (image(2, 3, 64, 96),)).module()
    torch.testing.assert_close(exported(image(2, 3, 64, 96)), model(image(2, 3, 64, 96)), rtol=1e-5, atol=1e-6)


def test_export_with_free_sizes():
    auto = torch.export.Dim.AUTO
    model = smaller()
    program = torch.export.export(model, (image(2, 3, 64, 96),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    exported = torch.export.load(buffer).module()
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64), (5, 3, 128, 72)):
        torch.testing.assert_close(exported(image(*shape)), model(image(*shape)), rtol=1e-5, atol=1e-6)


def test_onnx_names_the_operation_that_it_lacks():
    """ONNX has no operation for a spanning tree or a scan along it: the export has to stop, and say so."""
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError, match="No ONNX function found for .*grootvl_ops"):
        torch.onnx.export(smaller(), (image(1, 3, 64, 64),), dynamo=True, verbose=False)

"""The model on a GPU: fused operations against their definitions, CUDA graphs, and mixed precision over many steps."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import call_submodules, plain_operations, replay_graph
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import grootv  # noqa: F401  registers the models
import grootvl_ops
from grootv.layers import LayerNorm, TreeSSM, scans
from grootv.layers.path_ssm import PATH_SCANS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or grootvl_ops.backend("cuda") != "compiled", reason="needs a GPU and its kernels"
)
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "called"])
VARIANTS = pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"root": "first"},
        {"root": "last"},
        {"tree_per": "stage", "metric": "euclidean"},
        *({"scan": scan} for scan in PATH_SCANS),
        {"scan": "cross", "d_state": 2},
    ],
    ids=str,
)


def small(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("grootv_nano", dims=(16, 32, 48, 64), num_classes=10, **kwargs).cuda()


def images(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1)).cuda()


def loss_and_gradients(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        loss = 1024 * model(x).float().square().mean()  # scaled, as float16 needs it
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each within `tolerance` of its norm; gradients that are zero but for rounding, of a thousandth of the largest."""
    least = 1e-3 * max(float(e.norm()) for e in expected)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error, size = float((a - e).norm()), max(float(e.norm()), least)
        assert error <= tolerance * size, f"result {number}: {error} > {tolerance} x {size}"


def plain() -> AbstractContextManager[None]:
    """The definitions in plain PyTorch, but for trees and the scan along them, which have tests of their own."""
    return plain_operations(torch.ops.grootvl_ops.tree_scan, scans._build_tree)


@VARIANTS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 5e-3)], ids=str)
def test_fused_equals_plain(kwargs, dtype, tolerance):
    """Convolutions in float32 round to TF32, whose steps are one part in two thousand."""
    model = small(**kwargs).to(dtype)
    x = images(2, 3, 96, 160).to(dtype)
    with plain():
        expected = loss_and_gradients(model, x)
    assert_near(loss_and_gradients(model, x), expected, tolerance)


@FUSED
@VARIANTS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.02), (torch.bfloat16, 0.05)], ids=str)
def test_fused_equals_plain_under_autocast(kwargs, dtype, tolerance, fused):
    """As near to float32 as the format allows; trees of rounded features may differ in edges of near weights."""
    model = small(**kwargs)
    x = images(2, 3, 96, 160)
    with plain():
        exact = loss_and_gradients(model, x)
    if not fused:
        call_submodules(model)
    loss, *gradients = loss_and_gradients(model, x, dtype)
    assert {g.dtype for g in gradients} == {torch.float32}
    assert_near([loss, flat(gradients)], [exact[0], flat(exact[1:])], tolerance)


@VARIANTS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
def test_gradients_are_those_of_float64_on_a_cpu(kwargs, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = small(**kwargs).double(), images(2, 3, 96, 160).double()
    expected = loss_and_gradients(copy.deepcopy(model).cpu(), x.cpu())
    actual = loss_and_gradients(model.to(dtype), x.to(dtype))
    assert_near([a.double().cpu() for a in actual], expected, tolerance)


def test_what_autocast_gives():
    """Maps between blocks are float32, what feeds a matrix product is not, as with PyTorch's own layers."""
    model = small()
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, (LayerNorm, TreeSSM)):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cuda", torch.float16):
        features = model.forward_features(images(1, 3, 64, 64))
    assert features.dtype == torch.float32
    assert seen["stem.norm2"] == seen["stages.1.downsample.norm"] == seen["stages.0.norm"] == torch.float32
    assert seen["stages.0.blocks.0.norm1"] == seen["stages.0.blocks.0.norm2"] == torch.float16
    assert seen["stages.0.blocks.0.mixer"] == torch.float16


@pytest.mark.parametrize("dim", [1024, 1030])
def test_any_number_of_channels(dim):
    """The norms' kernels end at 2048 inner channels."""
    torch.manual_seed(0)
    mixer = TreeSSM(dim, device="cuda", dtype=torch.float64)
    x = images(1, 2, 3, dim).double()
    with plain():
        expected = mixer(x)
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize("scan", ["tree", "cross"])
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_cuda_graph(dtype, scan):
    """Inference and a training step are captured, and a replay on other images gives what the eager model gives."""
    model = small(scan=scan)
    static, other = images(2, 3, 64, 96), images(4, 3, 64, 96)[2:]

    def step() -> list[Tensor]:
        with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=dtype is not None):
            logits = model(static)
        return [logits, *loss_and_gradients(model, static, dtype)]

    results = replay_graph(step, static, other)
    for result, expected in zip(results, step(), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_paths_that_a_graph_makes_are_its_own(monkeypatch):
    """Without a call before the capture: the graph makes them, and nobody else gets memory of the graph."""
    monkeypatch.setattr(scans, "_KEPT", {})
    maps = images(1, 5, 7, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scans.cross(maps)
    assert not scans._KEPT
    graph.replay()
    kept = scans.cross(maps)
    for (path, _), (expected, _) in zip(captured, kept, strict=True):
        assert all(map(torch.equal, path, expected))
    assert scans.cross(maps)[0][0] is kept[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_follows_float32(dtype):
    """400 steps on handwritten digits: the loss falls along the curve of float32 by the operations' definitions."""
    digits = load_digits()
    pixels = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    pixels = F.interpolate(pixels, scale_factor=4).cuda()
    labels = torch.tensor(digits.target).cuda()

    def curve(model: nn.Module, dtype: torch.dtype | None) -> np.ndarray:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        losses = []
        for step in range(400):
            batch = torch.arange(64 * step, 64 * (step + 1), device="cuda") % len(labels)
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(pixels[batch]), labels[batch])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).float().cpu().numpy().reshape(-1, 50).mean(1)

    with plain():
        exact = curve(small(), None)
    mixed = curve(small(), dtype)
    assert exact[0] > 1 and exact[-1] < 0.1, exact
    assert np.all(np.abs(mixed - exact) < 0.15 * exact + 0.1), (mixed, exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@FUSED
def test_everything_on_the_second_gpu(fused):
    """While the first one is current: all results equal those of a CPU, and the first one allocates nothing."""
    model, x = small().cpu().double().eval(), images(2, 3, 64, 96).cpu().double()
    if not fused:
        call_submodules(model)

    def results(device: str) -> list[Tensor]:
        moved, inputs = copy.deepcopy(model).to(device), x.to(device)
        parameters = {name: parameter.detach() for name, parameter in moved.named_parameters()}

        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return functional_call(moved, parameters, (image[None],)).square().sum()

        output = moved(inputs)
        tangent = jvp(moved, (inputs,), (inputs.flip(0),))[1]
        of_samples = vmap(grad(loss), (None, 0))(parameters, inputs)
        gradients = torch.autograd.grad(output.square().sum(), list(moved.parameters()))
        return [output, tangent, *of_samples.values(), *gradients]

    expected = results("cpu")
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    with torch.cuda.device(0):
        actual = results("cuda:1")
        assert torch.cuda.current_device() == 0
    assert torch.cuda.max_memory_allocated(0) == before
    for a, e in zip(actual, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), e, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_compiled_mixer_pads_the_outputs_of_its_projection_in_half_precision(dtype):
    """To rows of 16 bytes, with the results of the eager mixer."""
    targets = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch.manual_seed(0)
    mixer = TreeSSM(40).cuda()
    x, grad = images(2, 6, 5, 40).requires_grad_(), torch.randn(2, 6, 5, 40, device="cuda")
    results = []
    for call in (mixer, torch.compile(mixer, backend=backend, fullgraph=True)):
        with torch.autocast("cuda", torch.float16, enabled=dtype == torch.float16):
            y = call(x).float()
        results.append([y.detach(), *torch.autograd.grad(y, [x, *mixer.parameters()], grad)])
    assert (torch._C._nn.pad in targets) == (dtype == torch.float16)
    for compiled, eager in zip(results[1], results[0], strict=True):
        assert (compiled - eager).norm() <= 0.02 * eager.norm()

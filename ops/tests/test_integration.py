"""The operations inside PyTorch: opcheck, torch.compile, export, autocast, TorchScript, fake tensors, CUDA graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial, wraps

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from tree_makers import make_tree

import grootvl_ops
from grootvl_ops import DIRECTIONS, METRICS, Tree, _loading
from grootvl_ops._registration import register_autograd
from grootvl_ops._schemas import SCHEMAS

library = torch.ops.grootvl_ops


class Scan(nn.Module):
    """Features to tree to scan, as a model's block uses the operations."""

    def __init__(self, direction: str = "both") -> None:
        super().__init__()
        self.direction = direction

    def forward(self, features: Tensor, decay: Tensor) -> Tensor:
        batch, height, width, channels = features.shape
        tree = grootvl_ops.build_tree(features)
        x = features.reshape(batch, height * width, channels)
        h = grootvl_ops.tree_scan(x * 2, decay.sigmoid().flatten(1, 2), tree, self.direction)
        return h.relu().reshape(batch, height, width, channels)


def inputs(batch: int, height: int, width: int, channels: int, device: str) -> tuple[Tensor, Tensor]:
    """Features, and the logits of the decays, both (B, H, W, C)."""
    return tuple(torch.randn(batch, height, width, channels, device=device, requires_grad=True) for _ in range(2))


def run(function, *arguments: Tensor) -> tuple[Tensor, ...]:
    """The result and its gradients."""
    out = function(*arguments)
    return (out, *torch.autograd.grad(out.square().sum(), arguments))


def merged_operands(device: str) -> list[Tensor]:
    """x, dt, dt_weight, dt_bias, A_log, B, C and D_skip of a merged scan of two groups."""
    shapes = [(2, 9, 3), (2, 9, 2, 2), (2, 3, 2), (2, 3), (2, 3), (2, 9, 2), (2, 9, 2), (3,)]
    return [torch.rand(shape, device=device) for shape in shapes]


def joined(function: Callable) -> Callable:
    """A function of which the results are joined to one."""

    @wraps(function)
    def call(*operands: Tensor) -> Tensor:
        return torch.cat(function(*operands), -1)

    return call


@pytest.fixture(params=["tree_scan", "selective_scan", "merged_scan", "gated_norm", "layer_norm", "add_layer_norm"])
def operation(request, device) -> tuple[Callable, list[Tensor]]:
    """A differentiable operation, and what it can be differentiated for."""
    maps, vectors = torch.rand(4, 2, 9, 3, device=device), torch.rand(5, 3, device=device)
    dt, dt_weight, per_pixel = maps[3, ..., :2], torch.rand(3, 2, device=device), torch.rand(2, 9, device=device)
    operands = {
        "tree_scan": [*maps[:2]],
        "selective_scan": [maps[0], dt, dt_weight, *vectors[:2], per_pixel],
        "merged_scan": merged_operands(device)[:-1],
        "gated_norm": [*maps[:3], per_pixel, *vectors],
        "layer_norm": [maps[0], *vectors[:2]],
        "add_layer_norm": [*maps[:2], *vectors[:2]],
    }[request.param]
    function = getattr(grootvl_ops, request.param)
    if request.param == "add_layer_norm":
        function = joined(function)
    if request.param.endswith("scan"):
        function = partial(function, tree=make_tree("scattered", 2, 9, device))
    return function, [operand.clone().requires_grad_() for operand in operands]


@pytest.fixture(scope="module")
def twin() -> Iterator[object]:
    """The operations once more, with the gradients of `_registration.py` in place of the compiled library's."""
    twins = torch.library.Library("grootvl_ops_twin", "DEF")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        twins.define(schema)

        def kernel(*arguments, name=name):
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(library, name)(*arguments)

        twins.impl(name, kernel, "CompositeExplicitAutograd")
    register_autograd("grootvl_ops_twin", twins)
    yield torch.ops.grootvl_ops_twin
    twins._destroy()


def twin_calls(device: str) -> dict[str, tuple[list, tuple]]:
    """For each way to call a differentiable operation: what it is differentiated for, and its other arguments."""
    tree = make_tree("scattered", 2, 9, device)
    maps, vectors = torch.rand(4, 2, 9, 3, device=device), torch.rand(5, 3, device=device)
    per_pixel, rates, states = torch.rand(2, 9), torch.rand(3, 2), torch.rand(2, 2, 9, 2)
    per_pixel, rates, states = (operand.to(device) for operand in (per_pixel, rates, states))
    low_rank, weight = maps[3, ..., :2], torch.rand(3, 2, device=device)
    mlp = [torch.rand(shape, device=device) for shape in ((5, 3), (5,), (3, 5), (3,))]
    return {
        "tree_scan": ([*maps[:2]], (*tree, "up")),
        "selective_scan": ([maps[0], low_rank, weight, *vectors[:2], per_pixel, None], (*tree, "both")),
        "selective_scan of states": ([maps[0], low_rank, weight, vectors[0], rates, *states], (*tree, "down")),
        "selective_scan of projected steps": ([*maps[:2], None, None, vectors[1], per_pixel, per_pixel], (*tree, "up")),
        "stepped_scan": ([*maps[:3], rates, *states], (*tree, "up")),
        "merged_scan": (merged_operands(device), (*tree, "down", None, True)),
        "merged_scan without bias and skip": (
            [o if i not in (3, 7) else None for i, o in enumerate(merged_operands(device))],
            (*tree, "up", None, True),
        ),
        "depthwise_conv_silu": ([maps[0], torch.rand(3, 1, 3, 3, device=device)], (3, 2, True)),
        "gelu_mlp": ([maps[0, 0], *mlp], (False,)),
        "gelu_mlp in one operation": ([maps[0, 0], *mlp], (True,)),
        "gated_norm": ([*maps[:3], per_pixel, *vectors], (1e-5,)),
        "layer_norm": ([maps[0], *vectors[:2]], (1e-5, None)),
        "add_layer_norm": ([*maps[:2], *vectors[:2]], (1e-5, None)),
        "add_layer_norm of half a branch": (
            [maps[0], maps[1].half(), *vectors[:2]],
            (1e-5, None, torch.rand(2, device=device)),
        ),
    }


@pytest.mark.parametrize("call", twin_calls("cpu"))
def test_both_registrations_give_the_same_gradients(twin, device, call):
    """The gradients stand in C++ and, for installations without a compiled library, in Python."""
    name = call.partition(" ")[0]
    operands, others = twin_calls(device)[call]
    for wanted in [*range(len(operands)), None]:  # for one operand each, and for all
        if wanted is not None and operands[wanted] is None:
            continue
        found = []
        for namespace in (library, twin):
            leaves = [o if o is None else o.clone().requires_grad_(wanted in (None, i)) for i, o in enumerate(operands)]
            out = getattr(namespace, name)(*leaves, *others)
            outs = [o for o in out if o.requires_grad] if isinstance(out, tuple) else [out]
            asked = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            gradients = torch.autograd.grad(sum(o.square().sum() for o in outs), asked, create_graph=True)
            if not (name == "gelu_mlp" and wanted == 4):  # for the last bias it is linear
                with pytest.raises(RuntimeError, match="second derivatives"):
                    torch.autograd.grad(gradients[0].sum(), asked)
            found.append([*outs, *gradients])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck_edge_weights(device, metric):
    torch.library.opcheck(library.edge_weights.default, (torch.randn(2, 3, 4, 5, device=device), metric))
    torch.library.opcheck(library.edge_weights.default, (torch.randn(2, 1, 4, 5, device=device).half(), metric))


def test_opcheck_neighbour_cosines(device):
    for dtype in (torch.float32, torch.float16):
        for neighbours in (1, 7):
            operands = torch.randn(2, 5, 6, device=device).to(dtype), neighbours
            torch.library.opcheck(library.neighbour_cosines.default, operands)


def test_opcheck_trees(device):
    weights = torch.rand(2, 17, device=device)
    edges = torch.tensor(oracles.pixel_pairs(3, 4), device=device).expand(2, -1, -1)
    torch.library.opcheck(library.grid_tree.default, (weights, 3, 4, 5))
    torch.library.opcheck(library.grid_tree.default, (weights[:0].double(), 3, 4, 0))
    torch.library.opcheck(library.grid_tree.default, (weights[:1], 3, 4, 0))
    torch.library.opcheck(library.graph_tree.default, (edges, weights, 12, 5))
    torch.library.opcheck(library.graph_tree.default, (edges.int().contiguous(), weights.double(), 12, 0))
    torch.library.opcheck(library.path_tree.default, (torch.stack([torch.randperm(7) for _ in range(2)]).to(device),))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_first"])
def test_opcheck_tree_scan(device, layout, dtype, direction):
    tree = make_tree("scattered", 2, 9, device)
    x, decay, grad = (torch.rand(2, 9, 3, device=device, dtype=dtype) for _ in range(3))
    if layout == "channels_first":
        x, decay, grad = (operand.transpose(1, 2).contiguous().transpose(1, 2) for operand in (x, decay, grad))
    torch.library.opcheck(library.tree_scan_backward.default, (grad, x, decay, *tree, direction))
    x.requires_grad_()
    decay.requires_grad_()
    torch.library.opcheck(library.tree_scan.default, (x, decay, *tree, direction))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compile(device, fresh_compiler, direction):
    module = Scan(direction)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    arguments = inputs(2, 5, 4, 3, device)
    for result, expected in zip(run(compiled, *arguments), run(module, *arguments), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_each_operation(operation, fresh_compiler, dynamic):
    function, operands = operation
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for result, expected in zip(run(compiled, *operands), run(function, *operands), strict=True):
        torch.testing.assert_close(result, expected)


def test_gradients_have_the_memory_that_compilers_expect(operation):
    """Contiguous, also from a gradient that is not: compiled code after them takes views without looking."""
    function, operands = operation
    operands = [operand.detach().requires_grad_() for operand in operands]
    result = function(*operands)
    transposed = torch.randn(result.mT.shape, dtype=result.dtype, device=result.device).mT
    for gradient in torch.autograd.grad(result, operands, transposed):
        assert gradient.is_contiguous()


def test_compiled_autograd(operation, fresh_compiler):
    """The graph of an operation that ran eagerly is compiled when it is gone through."""
    function, operands = operation
    _, *expected = run(function, *operands)
    loss = function(*operands).square().sum()
    counters.clear()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss.backward(), backend="eager")()
    assert counters["compiled_autograd"]["captures"] == 1
    for operand, gradient in zip(operands, expected, strict=True):
        torch.testing.assert_close(operand.grad, gradient)


def test_compile_with_dynamic_shapes(device, fresh_compiler):
    """One graph serves every size of map and batch."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    module = Scan()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    traced = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in [(2, 5, 4, 3), (3, 6, 7, 5), (4, 2, 9, 8)]:
        arguments = inputs(*size, device)
        expected = run(module, *arguments)
        for function in (compiled, traced):
            for result, target in zip(run(function, *arguments), expected, strict=True):
                torch.testing.assert_close(result, target)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compile_to_machine_code(device, fresh_compiler):
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        pytest.skip("torch.compile needs a C++ compiler")
    module = Scan()
    compiled = torch.compile(module, fullgraph=True)
    arguments = inputs(2, 5, 4, 3, device)
    with fresh_cache():  # what an earlier run has cached would hide a change in how the operations are registered
        found = run(compiled, *arguments)
    for result, expected in zip(found, run(module, *arguments), strict=True):
        torch.testing.assert_close(result, expected)


def test_compile_of_graph_trees(device, fresh_compiler):
    edges = torch.tensor(oracles.pixel_pairs(3, 4), device=device)
    weights = torch.rand(2, 17, device=device)
    compiled = torch.compile(grootvl_ops.build_tree_from_edges, fullgraph=True, backend="aot_eager")
    expected = grootvl_ops.build_tree_from_edges(edges, weights, 12, 3)
    assert all(torch.equal(a, b) for a, b in zip(compiled(edges, weights, 12, 3), expected, strict=True))


def test_compiled_call_still_refuses_bad_input(device, fresh_compiler):
    compiled = torch.compile(grootvl_ops.tree_scan, backend="aot_eager")
    tree = make_tree("path", 1, 5, device)
    with pytest.raises(ValueError, match="x must be"):
        compiled(torch.zeros(5, 3, device=device), torch.zeros(5, 3, device=device), tree)


def test_export(device, tmp_path):
    features, decay = (argument.detach() for argument in inputs(2, 5, 4, 3, device))
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    dynamic = {0: batch, 1: height, 2: width}
    program = torch.export.export(Scan(), (features, decay), dynamic_shapes=(dynamic, dynamic))
    torch.export.save(program, tmp_path / "scan.pt2")
    loaded = torch.export.load(tmp_path / "scan.pt2").module()
    names = {str(node.target) for node in program.graph.nodes}
    assert {"grootvl_ops.edge_weights.default", "grootvl_ops.grid_tree.default"} <= names
    for size in [(2, 5, 4, 3), (3, 6, 7, 3)]:
        features, decay = (argument.detach() for argument in inputs(*size, device))
        torch.testing.assert_close(loaded(features, decay), Scan()(features, decay))


def test_export_of_one_size(device):
    features, decay = (argument.detach() for argument in inputs(1, 1, 6, 2, device))
    program = torch.export.export(Scan(), (features, decay))
    torch.testing.assert_close(program.module()(features, decay), Scan()(features, decay))


HALF_OF = {"cpu": torch.bfloat16, "cuda": torch.float16}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["eager", "scripted", "compiled"])
def test_autocast(device, how, fresh_compiler):
    """float32 data, half data and a mix of both are scanned in float32, and each gradient has its input's dtype."""
    half = HALF_OF[device]
    scan = {
        "eager": grootvl_ops.tree_scan,
        "scripted": torch.jit.script(grootvl_ops.tree_scan),
        "compiled": torch.compile(grootvl_ops.tree_scan, fullgraph=True, backend="aot_eager"),
    }[how]
    tree = make_tree("scattered", 2, 30, device)
    values = torch.randn(2, 30, 4, device=device), torch.rand(2, 30, 4, device=device)
    for dtypes in ((torch.float32, torch.float32), (half, half), (half, torch.float32), (torch.float32, half)):
        x, decay = (value.to(dtype).requires_grad_() for value, dtype in zip(values, dtypes, strict=True))
        with torch.autocast(device, dtype=half):
            h = scan(x, decay, tree)
        assert h.dtype == torch.float32
        expected = oracles.dense_scan(x, decay, tree).float()
        torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)
        dx, ddecay = torch.autograd.grad(h.square().sum(), (x, decay))
        assert (dx.dtype, ddecay.dtype) == dtypes


def test_autocast_leaves_float64_alone(device):
    tree = make_tree("scattered", 1, 12, device)
    x, decay = torch.randn(1, 12, 3, device=device).double(), torch.rand(1, 12, 3, device=device).double()
    with torch.autocast(device, dtype=HALF_OF[device]):
        h = grootvl_ops.tree_scan(x, decay, tree)
    torch.testing.assert_close(h, oracles.dense_scan(x, decay, tree), rtol=1e-12, atol=1e-12)


def test_dtypes_must_agree_again_after_autocast(device):
    tree = make_tree("path", 1, 5, device)
    x = torch.zeros(1, 5, 2, device=device)
    with torch.autocast(device, dtype=HALF_OF[device]):
        grootvl_ops.tree_scan(x, x.to(HALF_OF[device]), tree)
    with pytest.raises(TypeError, match="one dtype"):
        grootvl_ops.tree_scan(x, x.to(HALF_OF[device]), tree)


def test_trees_under_autocast(device):
    features = torch.randn(2, 5, 6, 4, device=device)
    expected = grootvl_ops.build_tree(features)
    with torch.autocast(device, dtype=HALF_OF[device]):
        tree = grootvl_ops.build_tree(features)
    assert all(torch.equal(a, b) for a, b in zip(tree, expected, strict=True))


class Scripted(nn.Module):
    def forward(
        self, features: Tensor, decay: Tensor, edges: Tensor, direction: str = "both"
    ) -> tuple[Tensor, Tree, Tree]:
        weights = grootvl_ops.edge_weights(features, "euclidean")
        tree = grootvl_ops.build_tree_from_grid(weights, features.size(1), features.size(2), 1)
        same_tree = grootvl_ops.build_tree_from_edges(edges, weights, features.size(1) * features.size(2), 1)
        own_tree = grootvl_ops.build_tree(features, metric="manhattan", root=2)
        decay = decay.sigmoid().flatten(1, 2)
        h = grootvl_ops.tree_scan(features.flatten(1, 2), decay, tree, direction)
        return h + grootvl_ops.tree_scan(h, decay, own_tree), tree, same_tree


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(device, tmp_path):
    features, decay = inputs(2, 5, 4, 3, device)
    edges = torch.tensor(oracles.pixel_pairs(5, 4), device=device)
    torch.jit.script(Scripted()).save(str(tmp_path / "scripted.pt"))
    scripted = torch.jit.load(str(tmp_path / "scripted.pt"))
    for direction in DIRECTIONS:
        h, tree, same_tree = scripted(features, decay, edges, direction)
        expected, expected_tree, _ = Scripted()(features, decay, edges, direction)
        torch.testing.assert_close(h, expected)
        assert all(torch.equal(a, b) for a, b in zip(tree, expected_tree, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(same_tree, expected_tree, strict=True))
        gradients = torch.autograd.grad(h.sum(), (features, decay), retain_graph=True)
        for result, target in zip(gradients, torch.autograd.grad(expected.sum(), (features, decay)), strict=True):
            torch.testing.assert_close(result, target)
    with pytest.raises(torch.jit.Error, match="x must be"):
        torch.jit.script(grootvl_ops.tree_scan)(features[0, 0], decay[0, 0], tree)


def check_shapes(features: Tensor, decay: Tensor, edges: Tensor) -> None:
    batch, height, width, _ = features.shape
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        weights = grootvl_ops.edge_weights(features.to(dtype))
        assert weights.shape == (batch, len(oracles.pixel_pairs(height, width)))
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert weights.device == features.device
        tree = grootvl_ops.build_tree(features.to(dtype))
        graph_tree = grootvl_ops.build_tree_from_edges(edges, weights, height * width)
        for field in (*tree, *graph_tree):
            assert (field.shape, field.dtype) == ((batch, height * width), torch.int32)
            assert field.device == features.device
        x = features.flatten(1, 2).to(dtype).requires_grad_()
        h = grootvl_ops.tree_scan(x, decay.flatten(1, 2).to(dtype), tree)
        assert (h.shape, h.dtype, h.device) == (x.shape, dtype, x.device)
        h.sum().backward()
        assert (x.grad.shape, x.grad.dtype) == (x.shape, dtype)


@pytest.mark.parametrize("size", [(2, 5, 4, 3), (1, 1, 1, 1), (0, 3, 2, 4)], ids=str)
def test_meta_tensors(size):
    features, decay = (argument.detach().to("meta") for argument in inputs(*size, "cpu"))
    check_shapes(features, decay, torch.empty(len(oracles.pixel_pairs(*size[1:3])), 2, device="meta").long())


@pytest.mark.parametrize("size", [(2, 5, 4, 3), (1, 1, 1, 1), (0, 3, 2, 4)], ids=str)
def test_fake_tensors(device, size):
    with FakeTensorMode():
        features, decay = (argument.detach() for argument in inputs(*size, device))
        edges = torch.empty(len(oracles.pixel_pairs(*size[1:3])), 2, device=device, dtype=torch.int64)
        check_shapes(features, decay, edges)


def test_checkpointing_recomputes_the_same(device):
    arguments = inputs(2, 6, 5, 4, device)
    module = Scan()

    checkpointed = partial(checkpoint, module, use_reentrant=False)
    for result, expected in zip(run(checkpointed, *arguments), run(module, *arguments), strict=True):
        assert torch.equal(result, expected)


def test_checkpointing_each_operation(operation):
    function, operands = operation
    checkpointed = partial(checkpoint, function, use_reentrant=False)
    assert all(map(torch.equal, run(checkpointed, *operands), run(function, *operands)))


def test_no_second_derivative(operation):
    function, operands = operation
    name = getattr(function, "func", function).__name__
    for gradient in torch.autograd.grad(function(*operands).square().sum(), operands, create_graph=True):
        with pytest.raises(RuntimeError, match=rf"^grootvl_ops\.{name} can be differentiated once only"):
            torch.autograd.grad(gradient.sum(), operands, retain_graph=True)


def test_gradient_for_one_input(operation):
    function, operands = operation
    _, *expected = run(function, *operands)
    for number, gradient in enumerate(expected):
        alone = [operand.detach().requires_grad_(i == number) for i, operand in enumerate(operands)]
        (found,) = torch.autograd.grad(function(*alone).square().sum(), alone[number])
        torch.testing.assert_close(found, gradient)


def test_gradients_have_the_dtypes_of_parameters(operation):
    function, operands = operation
    halved = [o.detach().bfloat16().requires_grad_() if o.dim() == 1 else o for o in operands]
    expected = run(function, *(o.detach().float().requires_grad_() for o in halved))
    found = run(function, *halved)
    assert [gradient.dtype for gradient in found[1:]] == [o.dtype for o in halved]
    for result, target in zip(found, expected, strict=True):
        torch.testing.assert_close(result, target.to(result.dtype))


class Forget(torch.autograd.Function):
    """The identity, which hands no gradient on."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        return None


def test_no_gradient_arrives(operation):
    function, operands = operation
    for gradient in torch.autograd.grad(Forget.apply(function(*operands)).sum(), operands):
        assert not gradient.any()


def test_nothing_is_saved_where_no_gradient_is_wanted(operation):
    function, operands = operation
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        with torch.no_grad():
            assert not function(*operands).requires_grad
        assert not function(*(operand.detach() for operand in operands)).requires_grad
        assert not saved
        assert function(*operands).requires_grad
    assert saved


def test_statistics_are_not_differentiable(device):
    h, vector = torch.rand(2, 9, 3, device=device, requires_grad=True), torch.rand(3, device=device, requires_grad=True)
    for out, statistics in (
        library.layer_norm(h, vector, vector, 1e-5),
        library.add_layer_norm(h, h, vector, vector, 1e-5)[1:],
        library.gated_norm(h, h, h, h[..., 0], *[vector] * 5, 1e-5),
    ):
        assert out.requires_grad and not statistics.requires_grad


def test_inference_mode(device):
    features, decay = inputs(2, 4, 4, 3, device)
    expected = Scan()(features, decay)
    with torch.inference_mode():
        torch.testing.assert_close(Scan()(features, decay), expected.detach())


@pytest.mark.parametrize("grad", [False, True])
def test_too_little_memory(compiled_device, grad):
    """Programs that search for the largest batch size know the error, by its type or its message."""
    x = torch.zeros(1, 64, device=compiled_device, requires_grad=grad).expand(2**42, 64)
    ones = torch.ones(64, device=compiled_device)
    on_cpu = compiled_device == "cpu"
    typed = not on_cpu and _loading.problems["autograd"] is None
    message = "DefaultCPUAllocator: can't allocate memory" if on_cpu else "CUDA out of memory."
    with pytest.raises(torch.OutOfMemoryError if typed else RuntimeError, match=message):
        grootvl_ops.layer_norm(x, ones, ones)


def test_cuda_graph(cuda_kernels):
    """Forward and backward, tree included, in one captured graph that is replayed on other data."""
    features, decay = inputs(2, 28, 28, 16, cuda_kernels)
    module = Scan()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(module, features, decay)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(module, features, decay)
    for _ in range(3):
        with torch.no_grad():
            features.normal_()
            decay.normal_()
        graph.replay()
        for result, expected in zip(captured, run(module, features, decay), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("size", [(2, 7, 7, 8), (1, 200, 336, 4)], ids=str)
def test_cuda_never_waits(cuda_kernels, size):
    features, decay = inputs(*size, cuda_kernels)
    edges = grootvl_ops.grid_edges(*size[1:3]).to(cuda_kernels)
    weights = torch.rand(size[0], len(edges), device=cuda_kernels)
    run(Scan(), features, decay)  # what is set up once may wait
    grootvl_ops.build_tree_from_edges(edges, weights, size[1] * size[2])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for direction in DIRECTIONS:
            run(Scan(direction), features, decay)
        grootvl_ops.build_tree_from_edges(edges, weights, size[1] * size[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_runs_on_the_current_stream(cuda_kernels):
    features, decay = inputs(4, 56, 56, 64, cuda_kernels)
    expected = run(Scan(), features, decay)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_features, late_decay = (argument.detach().clone().requires_grad_() for argument in (features, decay))
        found = run(Scan(), late_features, late_decay)
    stream.synchronize()
    for result, target in zip(found, expected, strict=True):
        torch.testing.assert_close(result, target)


def test_cpu_and_cuda_give_one_tree(cuda_kernels):
    weights = torch.randint(0, 20, (3, len(oracles.pixel_pairs(31, 45)))).float()
    for root in (0, 700):
        on_cpu = grootvl_ops.build_tree_from_grid(weights, 31, 45, root)
        on_cuda = grootvl_ops.build_tree_from_grid(weights.to(cuda_kernels), 31, 45, root)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_cuda, strict=True))


def test_mixed_devices(cuda_kernels):
    tree = make_tree("path", 1, 5)
    x = torch.zeros(1, 5, 2)
    with pytest.raises(ValueError, match="must be on one device, got cuda:0 and cpu"):
        grootvl_ops.tree_scan(x.to(cuda_kernels), x.to(cuda_kernels), tree)
    with pytest.raises((ValueError, RuntimeError)):
        library.tree_scan(x.to(cuda_kernels), x, *(field.to(cuda_kernels) for field in tree))

"""Forward mode and torch.func's transforms of the operations, against reverse mode, gradcheck and plain loops."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from tree_makers import SHAPES, make_tree

import grootvl_ops
from grootvl_ops import DIRECTIONS, METRICS

OPERATIONS = (
    *(f"tree_scan {direction}" for direction in DIRECTIONS),
    *(f"selective_scan {direction}" for direction in DIRECTIONS),
    "selective_scan of states",
    "selective_scan with steps of decays",
    "merged_scan down",
    "gated_norm",
    "layer_norm",
    "add_layer_norm",
)
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def operation(name: str, device: str, shape: str = "scattered", length: int = 7) -> tuple[Callable, list[Tensor]]:
    """A function of tensors, and float64 operands for it."""
    kind, _, direction = name.partition(" ")
    tree, D, R, N = make_tree(shape, 2, length, device), 3, 2, 2
    sizes = {
        "tree_scan": [(2, length, D), (2, length, D)],
        "selective_scan": [(2, length, D), (2, length, R), (D, R), (D,), (D,), (2, length)],
        "merged_scan": [(2, length, D), (2, length, 2, R), (2, D, R), (2, D), (2, D), *[(2, length, 2)] * 2],
        "gated_norm": [*[(2, length, D)] * 3, (2, length), *[(D,)] * 5],
        "layer_norm": [(2, length, D), (D,), (D,)],
        "add_layer_norm": [(2, length, D), (2, length, D), (D,), (D,)],
    }[kind]
    function = getattr(grootvl_ops, kind)
    if kind == "add_layer_norm":

        def function(*operands):
            return torch.cat(grootvl_ops.add_layer_norm(*operands), -1)

    if direction == "of states":
        sizes = [*sizes[:4], (D, N), (2, length, N), (2, length, N)]

        def function(x, dt, weight, bias, A_log, B, C):
            return grootvl_ops.selective_scan(x, dt, weight, bias, A_log, B, tree, "both", C)

    elif direction == "with steps of decays":
        sizes = [*[(2, length, D)] * 3, (D, N), (2, length, N), (2, length, N)]

        def function(x, dt, decay_dt, A_log, B, C):
            return grootvl_ops.selective_scan(x, dt, None, None, A_log, B, tree, "up", C, decay_dt)

    elif direction:
        function = partial(function, tree=tree, direction=direction)
    return function, [torch.rand(size, dtype=torch.float64, device=device) + 0.1 for size in sizes]


@each_operation
def test_gradcheck_in_every_mode(device, name):
    """Numerical derivatives against reverse mode, forward mode, and both under vmap."""
    function, operands = operation(name, device)
    operands = [operand.requires_grad_() for operand in operands]
    assert torch.autograd.gradcheck(
        function, operands, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, 1.3], ids="decay{}".format)
@pytest.mark.parametrize("shape", SHAPES)
def test_tangents_on_trees_of_any_shape(device, shape, decay, direction):
    """Forward mode against reverse mode, also at decays where a formula that divides by 1 - a^2 breaks."""
    function, (x, a) = operation(f"tree_scan {direction}", device, shape, 8)
    a = torch.full_like(a, decay)
    tangents = torch.randn_like(x), torch.randn_like(a)
    h, dh = jvp(function, (x, a), tangents)
    assert torch.equal(h, function(x, a))
    weights = torch.randn_like(h)
    _, pull_back = vjp(function, x, a)
    expected = sum((g * t).sum() for g, t in zip(pull_back(weights), tangents, strict=True))
    torch.testing.assert_close((dh * weights).sum(), expected, rtol=1e-11, atol=1e-11)


@each_operation
def test_forward_mode_by_dual_numbers(device, name):
    function, operands = operation(name, device)
    tangents = [torch.randn_like(operand) for operand in operands]
    with fwAD.dual_level():
        duals = [fwAD.make_dual(*pair) for pair in zip(operands, tangents, strict=True)]
        out, tangent = fwAD.unpack_dual(function(*duals))
    expected_out, expected = jvp(function, tuple(operands), tuple(tangents))
    torch.testing.assert_close((out, tangent), (expected_out, expected))
    pushed_out, push = linearize(function, *operands)
    torch.testing.assert_close((pushed_out, push(*tangents)), (expected_out, expected))


@each_operation
def test_jacobians_of_both_modes_agree(device, name):
    function, operands = operation(name, device, length=4)
    everything = tuple(range(len(operands)))
    reverse, forward = (transform(function, everything)(*operands) for transform in (jacrev, jacfwd))
    torch.testing.assert_close(reverse, forward, rtol=1e-9, atol=1e-11)


@each_operation
def test_gradient_equals_that_of_autograd(device, name):
    function, operands = operation(name, device)
    found = grad(lambda *o: function(*o).square().sum(), tuple(range(len(operands))))(*operands)
    leaves = [operand.clone().requires_grad_() for operand in operands]
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@each_operation
def test_vmap_over_every_operand(device, name):
    """Each operand mapped alone, in its first and in its last dimension, and all together."""
    function, operands = operation(name, device)
    stacked = [torch.stack([operand, operand * 0.5, operand + 0.1]) for operand in operands]
    for mapped in [*[[i] for i in range(len(operands))], range(len(operands))]:
        for dim in (0, -1):
            dims = tuple(dim if i in mapped else None for i in range(len(operands)))
            given = [stacked[i].movedim(0, dim) if i in mapped else operand for i, operand in enumerate(operands)]
            found = vmap(function, in_dims=dims)(*given)
            for item in range(3):
                single = [stacked[i][item] if i in mapped else operand for i, operand in enumerate(operands)]
                torch.testing.assert_close(found[item], function(*single), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_single_samples(device, metric):
    """From features to tree to scan, as a model's block does it."""
    weight = torch.randn(5, 5, dtype=torch.float64, device=device)

    def loss(weight: Tensor, features: Tensor) -> Tensor:
        tree = grootvl_ops.build_tree(features.unsqueeze(0), metric)
        x = F.linear(features, weight).reshape(1, -1, 5)
        return grootvl_ops.tree_scan(x, x.sigmoid(), tree).square().sum()

    features = torch.randn(6, 3, 4, 5, dtype=torch.float64, device=device)
    found = vmap(grad(loss), in_dims=(None, 0))(weight, features)
    for sample, gradient in zip(features, found, strict=True):
        leaf = weight.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf, sample), leaf)[0])


def test_trees_of_graphs_and_paths_under_vmap(device):
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]], device=device)
    weights = torch.rand(3, 2, 5, device=device)
    found = vmap(lambda w: tuple(grootvl_ops.build_tree_from_edges(edges, w, 4)))(weights)
    orders = torch.stack([torch.randperm(6) for _ in range(3)]).to(device)
    paths = vmap(lambda order: tuple(grootvl_ops.path_tree(order)))(orders)
    for item in range(3):
        tree, path = grootvl_ops.build_tree_from_edges(edges, weights[item], 4), grootvl_ops.path_tree(orders[item])
        assert all(torch.equal(a[item], b) for a, b in zip(found, tree, strict=True))
        assert all(torch.equal(a[item], b) for a, b in zip(paths, path, strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_precision_under_autocast(device, direction):
    """As without a transform, a scan under autocast runs in float32, and gives half-precision inputs their tangents."""
    tree = make_tree("scattered", 2, 9, device)
    x, a, dx = (torch.rand(2, 9, 3, device=device).bfloat16() for _ in range(3))
    with torch.autocast(device, torch.bfloat16):
        h, dh = jvp(lambda x: grootvl_ops.tree_scan(x, a, tree, direction), (x,), (dx,))
    assert h.dtype == dh.dtype == torch.float32
    torch.testing.assert_close(dh, grootvl_ops.tree_scan(dx.float(), a.float(), tree, direction))


@each_operation
def test_second_derivatives_raise(device, name):
    """Those of the norms alone exist, for under a transform they are made of PyTorch's operations."""
    function, operands = operation(name, device)
    second = hessian(lambda x: function(x, *operands[1:]).square().sum())
    if "scan" in name:
        with pytest.raises(RuntimeError, match="second derivatives"):
            second(operands[0])
    else:
        assert second(operands[0]).isfinite().all()


def test_operations_without_a_tangent_raise(device):
    """torch.ops.grootvl_ops is below the functions that know forward mode: it must not drop a tangent silently."""
    if grootvl_ops.backend(device) != "compiled":
        pytest.skip("no compiled kernels")
    tree = make_tree("path", 2, 5, device)
    x = torch.rand(2, 5, 3, device=device)
    with fwAD.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.ops.grootvl_ops.tree_scan(fwAD.make_dual(x, x), x, *tree)


def test_without_a_compiled_library(tmp_path):
    """The same tests on the reference alone."""
    package = Path(grootvl_ops.__file__).parent
    ignored = shutil.ignore_patterns("_C*", "_build.json", "__pycache__")
    shutil.copytree(package, tmp_path / "grootvl_ops", ignore=ignored)
    selected = "(gradcheck and (up or down or norm)) or vmap_over or single_samples"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", __file__, "-k", selected]
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import grootvl_ops, pytest; "
    program += "assert grootvl_ops.backend() == 'reference'; "
    program += f"sys.exit(pytest.main({run[3:]!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

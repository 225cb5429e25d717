"""The MLP that computes its hidden values again, against linear layers and a GELU in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_selective_scan import TOLERANCE, assert_near, with_gradients
from torch import Tensor

import grootvl_ops
from grootvl_ops import _mlp_kernel, reference

library = torch.ops.grootvl_ops
HALF = (torch.float16, torch.bfloat16)


def defined(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def make_operands(size: tuple[int, ...], hidden: int, dtype: torch.dtype) -> list[Tensor]:
    channels = size[-1]
    of_parameters = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(hidden, channels), (hidden,), (channels, hidden), (channels,)]
    parameters = [torch.randn(shape, dtype=of_parameters) / shape[-1] ** 0.5 for shape in shapes]
    return [torch.randn(size).to(dtype), *parameters]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("size", "hidden"), [((3,), 5), ((2, 5, 7, 8), 32), ((40, 3), 9), ((1, 260, 80), 320)], ids=str
)
def test_against_the_definition(device, size, hidden, dtype, poisoned_memory):
    operands = make_operands(size, hidden, dtype)
    grad = torch.randn(size).to(dtype)
    expected = with_gradients(defined, [o.double() for o in operands], grad.double())
    moved = [o.to(device) for o in operands]
    actual = with_gradients(grootvl_ops.gelu_mlp, moved, grad.to(device))
    assert [a.dtype for a in actual] == [dtype, *(o.dtype for o in operands)]
    if dtype in HALF or (dtype == torch.float32 and device == "cuda"):  # rounded products, of values in half precision
        for found, wanted in zip(actual, expected, strict=True):
            error = (found.double().cpu() - wanted).norm() / wanted.norm()
            assert error < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    else:
        assert_near(actual, expected, dtype)
    again = with_gradients(grootvl_ops.gelu_mlp, moved, grad.to(device))
    assert all(map(torch.equal, actual, again))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 8), (300, 9), (1000, 72), (33, 1032), (6000, 24)], ids=str)
def test_backward_of_gelu(device, size, dtype, poisoned_memory):
    before, dhidden = (3 * torch.randn(size, device=device).to(dtype) for _ in range(2))
    leaf = before.double().cpu().requires_grad_()
    hidden = F.gelu(leaf, approximate="tanh")
    (dbefore,) = torch.autograd.grad(hidden, leaf, dhidden.double().cpu())
    found = library.gelu_mlp_backward(dhidden, before)
    assert_near(found[:2], [hidden.detach(), dbefore], dtype)
    assert_near(found[2:], [dbefore.sum(0)], torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(map(torch.equal, found, library.gelu_mlp_backward(dhidden, before)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [(0, 3), (1, 1), (7, 8), (300, 9), (70000, 24), (33, 2056)], ids=str)
def test_gradient_of_a_bias(device, size, dtype, poisoned_memory):
    grad = torch.randn(size, device=device).to(dtype)
    found = library.bias_backward(grad)
    of_sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == of_sums
    expected = grad.double().cpu().sum(0)
    assert ((found.double().cpu() - expected).abs() <= 1e-6 * grad.double().cpu().abs().sum(0) + 1e-12).all()
    assert torch.equal(found, library.bias_backward(grad))
    shifted = torch.empty(grad.numel() + 1, dtype=dtype, device=device)[1:].view_as(grad).copy_(grad)
    torch.testing.assert_close(library.bias_backward(shifted), found, rtol=1e-5, atol=1e-3)
    with pytest.raises(RuntimeError, match="differentiated once"):
        library.bias_backward(grad.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("to", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cast_weights(device, dtype, to, poisoned_memory):
    sizes = [(5, 8), (7,), (12, 3), (1, 1), (0, 4), (64, 4096), (2056,), (40, 8), (9, 8), (9,), (6, 3), (3, 6)]
    rows, columns = [8, 1, 12, 3, 2, 64, 1, 40, 4, 1, 4, 5], [8, 7, 8, 5, 4, 4096, 2056, 5, 8, 0, 5, 4]
    weights = [torch.randn(size, device=device).to(dtype) for size in sizes]
    weights[2] = weights[2].t().contiguous().t()
    found = library.cast_weights(weights, rows, columns, to)
    for weight, result, n, m in zip(weights, found, rows, columns, strict=True):
        matrix = torch.atleast_2d(weight)
        expected = F.pad(matrix, (0, m - matrix.shape[1], 0, n - matrix.shape[0])).to(to)  # a negative one leaves out
        assert result.dtype == to and torch.equal(result, expected[0] if weight.dim() == 1 else expected)
    torch.library.opcheck(library.cast_weights.default, (weights[:3], rows[:3], columns[:3], to))
    leaves = [weight.clone().requires_grad_() for weight in weights[:4]]
    sum(result.sum() for result in library.cast_weights(leaves, rows[:4], columns[:4], to)).backward()
    assert all(torch.equal(leaf.grad, torch.ones_like(leaf)) for leaf in leaves)
    for bad in ((weights[:1], [-1], [8]), (weights[:1], [5], [-1]), (weights[:1], [5, 1], [8, 8])):
        with pytest.raises((ValueError, RuntimeError)):
            library.cast_weights(*bad, to)


def test_far_from_zero(device):
    before = torch.tensor([[-65504.0, -1000, -100, 0, 100, 1000, 65504, float("inf"), float("nan")]], device=device)
    for dtype in TOLERANCE:
        some = before.to(dtype)
        hidden, dbefore, _ = library.gelu_mlp_backward(torch.ones_like(some), some)
        assert hidden[0, :7].tolist() == [0, 0, 0, 0, *some[0, 4:7].tolist()]
        assert dbefore[0, :7].tolist() == [0, 0, 0, 0.5, 1, 1, 1]
        assert hidden[0, 8].isnan() and dbefore[0, 8].isnan()


def test_gradcheck_and_opcheck(device):
    leaves = [o.to(device).requires_grad_() for o in make_operands((2, 3, 4), 6, torch.float64)]
    assert torch.autograd.gradcheck(grootvl_ops.gelu_mlp, leaves)
    for i in range(len(leaves)):  # each alone
        some = [leaf.detach().requires_grad_(i == k) for k, leaf in enumerate(leaves)]
        assert torch.autograd.gradcheck(grootvl_ops.gelu_mlp, some)
    for dtype in TOLERANCE:
        rows = [torch.randn(5, 8, device=device).to(dtype) for _ in range(2)]
        torch.library.opcheck(library.gelu_mlp_backward.default, rows)
        operands = [o.to(device).requires_grad_() for o in make_operands((5, 8), 16, dtype)]
        for fused in (False, True):
            torch.library.opcheck(library.gelu_mlp.default, (*operands, fused))
        weights = [torch.randn(shape, device=device).to(dtype) for shape in ((16, 8), (16,), (8, 16))]
        torch.library.opcheck(library.gelu_mlp_fused_backward.default, (*rows, *weights))


def test_transforms(device):
    operands = [o.to(device) for o in make_operands((3, 4), 6, torch.float64)]
    expected = torch.func.jacrev(defined)(*operands)
    torch.testing.assert_close(torch.func.jacrev(grootvl_ops.gelu_mlp)(*operands), expected)
    torch.testing.assert_close(torch.func.jacfwd(grootvl_ops.gelu_mlp)(*operands), expected)


def test_second_derivatives_raise(device):
    leaves = [o.to(device).requires_grad_() for o in make_operands((3, 4), 6, torch.float64)]
    (dx,) = torch.autograd.grad(grootvl_ops.gelu_mlp(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dx.sum().backward()


def test_keeps_no_hidden_values(device):
    operands = [o.to(device).requires_grad_() for o in make_operands((20, 8), 4000, torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        grootvl_ops.gelu_mlp(*operands)
    assert kept and max(kept) < 20 * 4000


def test_under_autocast(device):
    operands = [o.to(device).requires_grad_() for o in make_operands((9, 16), 32, torch.float32)]
    with torch.autocast(device, torch.bfloat16):
        out = grootvl_ops.gelu_mlp(*operands)
        expected = defined(*operands)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    out.float().sum().backward()
    assert all(o.grad.dtype == torch.float32 for o in operands)


def test_keeps_dtypes_under_autocast(device):
    operands = [o.to(device).requires_grad_() for o in make_operands((9, 16), 32, torch.float32)]
    expected = library.gelu_mlp(*operands, False)
    with torch.autocast(device, torch.bfloat16):
        out = library.gelu_mlp(*operands, False)
        assert torch.equal(out, expected)
        out.sum().backward()
    found = [o.grad.clone() for o in operands]
    for o in operands:
        o.grad = None
    expected.sum().backward()
    assert all(torch.equal(a, o.grad) for a, o in zip(found, operands, strict=True))


@pytest.mark.parametrize("to", [torch.float16, torch.float64], ids=str)
def test_cast_weights_beside_other_kernels(to, poisoned_memory):
    """More weights than one launch takes, on another stream, as `cast_weights` converts them."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weights = [torch.randn(1 + 7 * i, 1 + 13 * i % 300, device="cuda") for i in range(70)] + [
        torch.randn(5, device="cuda")
    ]
    rows = [
        (weight.shape[0] if weight.dim() == 2 else 1) + i % 2 * (weight.dim() - 1) for i, weight in enumerate(weights)
    ]
    columns = [weight.shape[-1] + i % 3 for i, weight in enumerate(weights)]
    expected = library.cast_weights(weights, rows, columns, to)
    results = [torch.empty_like(result) for result in expected]
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        library.cast_weights_into(results, weights, True)
    torch.cuda.current_stream().wait_stream(other)
    assert all(map(torch.equal, results, expected))
    for bad in ((results[:1], weights), ([results[2].t()], weights[2:3]), (results[:1], weights[-1:])):
        with pytest.raises((ValueError, RuntimeError)):
            library.cast_weights_into(*bad, True)


def test_sums_that_wait():
    """Sums over blocks of several operations, computed in one launch at the end, with more parts than one allocation
    has, and more sums."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sizes = [(rows, 40 + i) for i, rows in enumerate([1, 60000, 257, 0] * 20)] + [(2000, 20000), (2000, 15000)] * 3
    grads = [torch.randn(size, device="cuda").half() for size in sizes]
    expected = [library.bias_backward(grad) for grad in grads]
    library.sums_wait(grads[0])
    found = [library.bias_backward(grad) for grad in grads]
    library.sums_run(grads[0])
    for actual, wanted, grad in zip(found, expected, grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * max(1, len(grad)) ** 0.5)
    assert torch.equal(library.bias_backward(grads[1]), expected[1])  # no other waits
    del found
    before = torch.cuda.memory_allocated()
    library.sums_wait(grads[0])
    found = library.bias_backward(grads[1])
    library.sums_run(grads[0])
    assert torch.cuda.memory_allocated() - before <= 1 << 17  # the memory of the parts is free again
    torch.testing.assert_close(found, expected[1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiled(device, dtype):
    operands = make_operands((70, 24), 96, dtype)
    grad = torch.randn(70, 24).to(dtype).to(device)
    moved = [o.to(device) for o in operands]
    expected = with_gradients(grootvl_ops.gelu_mlp, moved, grad)
    compiled = torch.compile(grootvl_ops.gelu_mlp, fullgraph=True)
    for found, wanted in zip(with_gradients(compiled, moved, grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2 if dtype == torch.float16 else 1e-4)


def fused_operands(pixels: int, channels: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    grad, x = (torch.randn(pixels, channels).to(dtype) for _ in range(2))
    weight1, weight2 = (0.1 * torch.randn(shape) for shape in ((hidden, channels), (channels, hidden)))
    return [grad, x, weight1.to(dtype), torch.randn(hidden), weight2.to(dtype)]


def check_fused(found: tuple[Tensor, ...], operands: list[Tensor], dtype: torch.dtype) -> None:
    expected = reference.gelu_mlp_fused_backward(*(o.double() for o in operands))
    assert_near(found[:2], expected[:2], dtype)
    assert (found[2].double().cpu() - expected[2]).norm() < 1e-4 * expected[2].norm()


SIZES = [(1, 8, 8), (150, 80, 72), (129, 64, 136), (257, 112, 448), (600, 328, 200)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fused_kernel(cuda_kernels, size, dtype, poisoned_memory):
    operands = fused_operands(*size, dtype)
    moved = [o.to(cuda_kernels) for o in operands]
    if torch.cuda.get_device_capability() >= (9, 0):
        assert _mlp_kernel.runs(moved[1], moved[2])
    found = library.gelu_mlp_fused_backward(*moved)
    check_fused(found, operands, dtype)
    assert all(map(torch.equal, found, library.gelu_mlp_fused_backward(*moved)))
    shifted = [torch.empty(o.numel() + 1, dtype=o.dtype, device=o.device)[1:].view_as(o).copy_(o) for o in moved]
    assert all(map(torch.equal, found, library.gelu_mlp_fused_backward(*shifted)))


def interpreted() -> None:
    """The fused kernel by Triton's interpreter, which runs on a CPU. It takes no bfloat16."""
    torch.manual_seed(0)
    for size in SIZES[:4]:
        operands = fused_operands(*size, torch.float16)
        check_fused(_mlp_kernel.hidden_gradients(*operands), operands, torch.float16)


def test_fused_kernel_interpreted():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import test_mlps; test_mlps.interpreted()"]
    subprocess.run(command, env=environment, check=True)


def test_refuses(device):
    names = ("x", "weight1", "bias1", "weight2", "bias2")
    good = dict(zip(names, (o.to(device) for o in make_operands((3, 4), 6, torch.float32)), strict=True))
    for name, bad in (
        ("x", good["x"].sum()),
        ("weight1", good["weight1"][0]),
        ("weight1", good["weight1"][:, :3]),
        ("bias1", good["bias1"][:5]),
        ("weight2", good["weight2"].t()),
        ("bias2", good["bias2"].long()),
        ("weight2", good["weight2"].to("meta")),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            grootvl_ops.gelu_mlp(**{**good, name: bad})
    with pytest.raises((ValueError, RuntimeError), match="dhidden|size"):
        library.gelu_mlp_backward(good["x"], good["weight1"])

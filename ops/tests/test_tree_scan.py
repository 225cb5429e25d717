"""The scan and its gradients against the definition by paths, float64 autograd, gradcheck and the published code."""

from __future__ import annotations

import math
from pathlib import Path

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Operations
from tree_makers import SHAPES, make_tree, tree_of

import grootvl_ops
from grootvl_ops import DIRECTIONS, Tree, reference

GOLDEN = Path(__file__).parent / "golden" / "tree_scan.pt"
HALF = (torch.float16, torch.bfloat16)
NAMES = ("h", "dx", "ddecay")
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)


def operands(
    batch: int, num_vertices: int, channels: int, device: str, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, decay in (0, 1) and an output gradient."""
    shape = (batch, num_vertices, channels)
    x, decay, grad = torch.randn(shape), torch.rand(shape), torch.randn(shape)
    return tuple(operand.to(device, dtype) for operand in (x, decay, grad))


def check(found, expected, rtol: float, atol: float) -> None:
    for name, result, target in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(
            result.double(), target.double(), rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_tree_by_hand(ops, device):
    """Root 0 with the children 1 and 2; decays 0.5 and 0.25."""
    tree = tree_of([[0, 0, 0]], device)
    x = torch.tensor([[[1.0], [2.0], [4.0]]], device=device)
    decay = torch.tensor([[[7.0], [0.5], [0.25]]], device=device)
    h = ops.tree_scan(x, decay, tree)
    assert h.flatten().tolist() == [1 + 1 + 1, 2 + 0.5 * 1 + 0.125 * 4, 4 + 0.25 * 1 + 0.125 * 2]
    assert ops.tree_scan(x, decay, tree, direction="up").flatten().tolist() == [1 + 1 + 1, 2, 4]
    assert ops.tree_scan(x, decay, tree, direction="down").flatten().tolist() == [1, 2 + 0.5 * 1, 4 + 0.25 * 1]


@each_direction
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_vertices, channels", [(2, 3), (23, 9)])
def test_definition(ops, device, shape, num_vertices, channels, direction):
    if shape == "forest" and num_vertices < 6:
        pytest.skip("no vertices for three trees")
    tree = make_tree(shape, 2, num_vertices, device)
    x, decay, grad = operands(2, num_vertices, channels, device)
    found = ops.gradients(x, decay, tree, grad, direction)
    check(found, oracles.dense_gradients(x, decay, tree, grad, direction), rtol=1e-11, atol=1e-11)


@each_direction
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_definition_on_any_tree(ops, device, direction, data):
    num_vertices = data.draw(st.integers(1, 14))
    parent = [0] + [data.draw(st.integers(0, vertex - 1)) for vertex in range(1, num_vertices)]
    names = data.draw(st.permutations(range(num_vertices)))
    renamed = [0] * num_vertices
    for vertex, above in enumerate(parent):
        renamed[names[vertex]] = names[above]
    tree = tree_of([renamed], device)
    x, decay, grad = operands(1, num_vertices, data.draw(st.integers(1, 3)), device)
    decay = decay * data.draw(st.sampled_from([0.0, 1.0, -1.0, 1.5]))
    found = ops.gradients(x, decay, tree, grad, direction)
    check(found, oracles.dense_gradients(x, decay, tree, grad, direction), rtol=1e-9, atol=1e-9)


@each_direction
@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, -0.6, 1.2], ids="decay{}".format)
@pytest.mark.parametrize("shape", ["path", "star", "scattered"])
def test_decays_at_and_beyond_the_limits(ops, device, shape, decay, direction):
    tree = make_tree(shape, 2, 20, device)
    x, _, grad = operands(2, 20, 3, device)
    decay = torch.full_like(x, decay)
    found = ops.gradients(x, decay, tree, grad, direction)
    check(found, oracles.dense_gradients(x, decay, tree, grad, direction), rtol=1e-10, atol=1e-10)


def test_decay_0_changes_nothing_and_decay_1_sums_the_tree(ops, device):
    tree = make_tree("scattered", 3, 30, device)
    x = torch.randint(-9, 10, (3, 30, 4), device=device).float()
    for direction in DIRECTIONS:
        assert torch.equal(ops.tree_scan(x, torch.zeros_like(x), tree, direction), x)
    assert torch.equal(ops.tree_scan(x, torch.ones_like(x), tree), x.sum(1, keepdim=True).expand_as(x))


@each_direction
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 15, 16, 31, 33, 64, 160, 161])
def test_widths(ops, device, channels, direction):
    tree = make_tree("scattered", 3, 18, device)
    x, decay, grad = operands(3, 18, channels, device, torch.float32)
    found = ops.gradients(x, decay, tree, grad, direction)
    check(found, oracles.dense_gradients(x, decay, tree, grad, direction), rtol=1e-5, atol=1e-5)


@each_direction
@pytest.mark.parametrize("batch", [1, 2, 5, 17])
def test_batches(ops, device, batch, direction):
    tree = make_tree("binary", batch, 15, device)
    x, decay, grad = operands(batch, 15, 40, device, torch.float32)
    found = ops.gradients(x, decay, tree, grad, direction)
    check(found, oracles.dense_gradients(x, decay, tree, grad, direction), rtol=1e-5, atol=1e-5)


@each_direction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", ["path", "scattered", "comb"])
def test_dtypes(ops, device, shape, dtype, direction):
    """Half formats within one rounding of their results: the sums themselves are taken in float32."""
    tree = make_tree(shape, 2, 23, device)
    x, decay, grad = operands(2, 23, 9, device, dtype)
    found = ops.gradients(x, decay, tree, grad, direction)
    assert all(result.dtype == dtype for result in found)
    accumulation = 1e-12 if dtype == torch.float64 else 2e-5
    rounding = torch.finfo(dtype).eps if dtype in HALF else accumulation
    check(found, oracles.dense_gradients(x, decay, tree, grad, direction), rtol=rounding, atol=accumulation)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_formats_are_not_accumulated_in_half(ops, device, dtype):
    """4096 ones are summed exactly. Summed in float16 they would stop at 2048, in bfloat16 at 256."""
    tree = make_tree("comb", 1, 4096, device)
    ones = torch.ones(1, 4096, 2, device=device, dtype=dtype)
    assert (ops.tree_scan(ones, ones, tree) == 4096).all()


@each_direction
@pytest.mark.parametrize("shape", ["path", "star", "comb", "binary", "scattered"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_large_trees(compiled_device, shape, dtype, direction):
    device, num_vertices = compiled_device, 1500
    tree = make_tree(shape, 2, num_vertices, device)
    x, decay, grad = operands(2, num_vertices, 37, device, dtype)
    found = Operations.gradients(x, decay, tree, grad, direction)
    expected = oracles.message_gradients(x, decay, tree, grad, direction)
    scale = max(result.abs().max().item() for result in expected)  # a star's root sums 1500 terms
    accumulation = (1e-13 if dtype == torch.float64 else 1e-6) * max(scale, 10)
    rounding = torch.finfo(dtype).eps if dtype in HALF else 1e-6
    check(found, expected, rtol=rounding, atol=accumulation)


@pytest.mark.parametrize("kind", ["random", "smooth", "constant"])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 33), (33, 1), (13, 17), (56, 56), (200, 336)])
def test_feature_maps(compiled_device, kind, height, width):
    """From features to result, as a model uses it, with decays near 1 as the model has them."""
    batch = 1 if height == 200 else 2
    rows, columns = torch.linspace(0, 9, height)[:, None, None], torch.linspace(0, 7, width)[:, None]
    features = {
        "random": torch.randn(batch, height, width, 6),
        "smooth": (rows * torch.rand(6) + columns * torch.rand(6)).sin().expand(batch, -1, -1, -1),
        "constant": torch.ones(batch, height, width, 6),
    }[kind].to(compiled_device)
    tree = grootvl_ops.build_tree(features)
    x, decay, grad = operands(batch, height * width, 6, compiled_device, torch.float32)
    decay = decay.sqrt().sqrt()
    found = Operations.gradients(x, decay, tree, grad)
    check(found, oracles.message_gradients(x, decay, tree, grad), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [700, 1500])
@pytest.mark.parametrize("size", [(7, 9), (16, 16), (17, 19)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_trees_at_a_time(cuda_kernels, batch, size, dtype):
    """So many that a GPU walks along whole trees rather than runs, or than having a block for each short tree; the CPU
    knows no such difference."""
    features = torch.randn(batch, *size, 8)
    tree = grootvl_ops.build_tree(features)
    x, decay, grad = operands(batch, math.prod(size), 8, "cpu", dtype)
    expected = Operations.gradients(x, decay, tree, grad)
    on_gpu = Tree(*(field.to(cuda_kernels) for field in tree))
    found = Operations.gradients(x.to(cuda_kernels), decay.to(cuda_kernels), on_gpu, grad.to(cuda_kernels))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", ["path", "star", "comb", "binary", "scattered", "forest"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("num_vertices", [1, 2, 7, 8, 9, 49, 196, 255, 256, 257])
def test_short_trees(cuda_kernels, num_vertices, dtype, shape, poisoned_memory):
    """Around the whole tiles, and the most vertices, that one kernel takes; with channels beyond its groups of 16, and
    decays near 1, so that all of a tree counts everywhere."""
    tree = make_tree(shape, 3, num_vertices)
    x, decay, _ = operands(3, num_vertices, 37, "cpu", dtype)
    decay = decay ** (1 / 16)
    expected = grootvl_ops.tree_scan(x.double(), decay.double(), tree)
    on_gpu = Tree(*(field.to(cuda_kernels) for field in tree))
    runs = [grootvl_ops.tree_scan(x.to(cuda_kernels), decay.to(cuda_kernels), on_gpu).cpu() for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    scale = max(expected.abs().max().item(), 10)
    rounding, accumulation = (
        (torch.finfo(dtype).eps if dtype in HALF else 1e-6),
        1e-13 if dtype == torch.float64 else 1e-6,
    )
    torch.testing.assert_close(runs[0].double(), expected, rtol=rounding, atol=accumulation * scale)


def test_not_finite_values_stay_in_their_tree(cuda_kernels):
    """Of a forest, also in a short one, which one kernel takes."""
    tree = make_tree("forest", 1, 100)
    x, decay, _ = operands(1, 100, 5, "cpu", torch.float32)
    expected = grootvl_ops.tree_scan(x, decay, tree)
    root_of = tree.parent[0].long()
    for _ in range(100):
        root_of = tree.parent[0].long()[root_of]
    first = root_of == root_of[50]
    x[0, 50, 2] = float("nan")
    found = grootvl_ops.tree_scan(
        *(operand.to(cuda_kernels) for operand in (x, decay)), Tree(*(field.to(cuda_kernels) for field in tree))
    ).cpu()
    assert first.any() and not first.all()
    assert found[0, first, 2].isnan().all()
    torch.testing.assert_close(found[0, ~first], expected[0, ~first])


@each_direction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", ["path", "star", "comb", "binary", "scattered"])
@pytest.mark.parametrize("num_vertices, channels", [(60, 40), (200, 72), (1500, 40), (9000, 24), (40_000, 41)])
def test_cuda_equals_cpu(cuda_kernels, num_vertices, channels, shape, dtype, direction, poisoned_memory):
    """Trees of each size that a GPU treats in its own way: sums kept on chip, whole trees, runs, sections of runs; with
    rows that are copied in chunks of 16 bytes, and rows that cannot be. The CPU computes in float64, the GPU thrice. In
    float64 decays are near 1, so that what one run hands to another counts, and not only to the next."""
    tree = make_tree(shape, 2, num_vertices)
    x, decay, grad = operands(2, num_vertices, channels, "cpu", dtype)
    if dtype == torch.float64:
        decay = decay ** (1 / 64)
    expected = Operations.gradients(x.double(), decay.double(), tree, grad.double(), direction)
    on_gpu = Tree(*(field.to(cuda_kernels) for field in tree))
    runs = [
        Operations.gradients(*(o.to(cuda_kernels) for o in (x, decay)), on_gpu, grad.to(cuda_kernels), direction)
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    scale = max(result.abs().max().item() for result in expected)
    accumulation = (1e-12 if dtype == torch.float64 else 1e-5) * max(scale, 10)  # a star's root sums 40,000 terms
    rounding = torch.finfo(dtype).eps if dtype in HALF else 1e-6
    check([result.cpu() for result in runs[0]], expected, rtol=rounding, atol=accumulation)


@each_direction
@pytest.mark.parametrize("small", range(1, 9))
def test_small_trees_before_a_large_one(cuda_kernels, small, direction):
    """Runs are joined eight at a time, here those of several trees, so that what one leaves on the stack meets the
    next: of 1 to 8 paths of a run each, and a binary tree of 31 runs."""
    paths = [first * 32 + above for first in range(small) for above in SHAPES["path"](32)]
    parent = paths + [len(paths) + above for above in SHAPES["binary"](1023)]
    tree = tree_of([parent])
    x, decay, grad = operands(1, len(parent), 3, "cpu")
    decay = decay ** (1 / 64)
    on_gpu = Tree(*(field.to(cuda_kernels) for field in tree))
    found = Operations.gradients(x.to(cuda_kernels), decay.to(cuda_kernels), on_gpu, grad.to(cuda_kernels), direction)
    expected = oracles.message_gradients(x, decay, tree, grad, direction)
    check([result.cpu() for result in found], expected, rtol=1e-10, atol=1e-9)


def test_deep_and_wide_trees(compiled_device):
    """100,000 vertices in one branch, and below one vertex: no recursion, no stack that a branch could overrun."""
    num_vertices = 100_000
    vertices = torch.arange(num_vertices, dtype=torch.int32)[None]
    chain = Tree((vertices - 1).clamp(min=0), vertices, num_vertices - vertices)
    size = torch.ones_like(vertices)
    size[0, 0] = num_vertices
    wide = Tree(torch.zeros_like(vertices), vertices, size)
    x = torch.randint(0, 3, (1, num_vertices, 2)).float().to(compiled_device)
    ones = torch.ones_like(x)
    for tree in (chain, wide):
        tree = Tree(*(field.to(compiled_device) for field in tree))
        h, dx, _ = Operations.gradients(x, ones, tree, x)
        total = x.sum(1, keepdim=True).expand_as(x)
        assert torch.equal(h, total)
        assert torch.equal(dx, total)


@each_direction
def test_strides_do_not_matter(ops, device, direction):
    tree = make_tree("scattered", 3, 12, device)
    x, decay, grad = operands(3, 12, 6, device)

    def channels_first(operand):
        return operand.transpose(1, 2).contiguous().transpose(1, 2)

    def vertices_first(operand):
        return operand.transpose(0, 1).contiguous().transpose(0, 1)

    def spread(operand):
        wide = torch.full((3, 24, 18), float("nan"), dtype=operand.dtype, device=device)
        wide[:, ::2, 1::3] = operand
        return wide[:, ::2, 1::3]

    def offset(operand):
        flat = torch.zeros(operand.numel() + 1, dtype=operand.dtype, device=device)
        flat[1:] = operand.flatten()
        return flat[1:].view_as(operand)  # contiguous, but not aligned for vector loads

    expected = ops.gradients(x, decay, tree, grad, direction)
    for layout in (channels_first, vertices_first, spread, offset):
        for chosen in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
            arguments = [layout(o) if use else o for o, use in zip((x, decay, grad), chosen, strict=True)]
            check(ops.gradients(arguments[0], arguments[1], tree, arguments[2], direction), expected, 1e-12, 1e-12)
        single = [layout(o.float()) for o in (x, decay, grad)]
        check(ops.gradients(single[0], single[1], tree, single[2], direction), expected, 1e-5, 1e-5)


@each_direction
def test_expanded_operands(ops, device, direction):
    tree = make_tree("scattered", 3, 12, device)
    x, decay, grad = operands(3, 12, 6, device)
    for view in (
        lambda operand: operand[:1].expand(3, -1, -1),
        lambda operand: operand[:, :1].expand(-1, 12, -1),
        lambda operand: operand[:, :, :1].expand(-1, -1, 6),
        lambda operand: operand[:1, :1, :1].expand(3, 12, 6),
    ):
        x_view, decay_view, grad_view = view(x), view(decay), view(grad)
        found = ops.gradients(x_view, decay_view, tree, grad_view, direction)
        expected = oracles.dense_gradients(x_view, decay_view, tree, grad_view, direction)
        check(found, expected, rtol=1e-11, atol=1e-11)


def test_gradient_of_a_sum(device):
    """`sum` hands back an expanded gradient without memory of its own."""
    tree = make_tree("comb", 2, 11, device)
    x, decay, _ = operands(2, 11, 3, device)
    x.requires_grad_()
    decay.requires_grad_()
    grootvl_ops.tree_scan(x, decay, tree).sum().backward()
    _, dx, ddecay = oracles.dense_gradients(x, decay, tree, torch.ones_like(x))
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(decay.grad, ddecay)


def test_strided_tree(ops, device):
    tree = make_tree("scattered", 3, 12, device)
    x, decay, grad = operands(3, 12, 6, device)
    strided = Tree(*(field.T.contiguous().T for field in tree))
    check(ops.gradients(x, decay, strided, grad), ops.gradients(x, decay, tree, grad), 0, 0)
    one = Tree(*(field[:1].expand(3, -1) for field in tree))
    check(ops.gradients(x, decay, one, grad), oracles.dense_gradients(x, decay, one, grad), 1e-11, 1e-11)


@each_direction
def test_one_vertex(ops, device, direction):
    tree = tree_of([[0]] * 3, device)
    x, decay, grad = operands(3, 1, 5, device)
    h, dx, ddecay = ops.gradients(x, decay, tree, grad, direction)
    assert torch.equal(h, x)
    assert torch.equal(dx, grad)
    assert torch.equal(ddecay, torch.zeros_like(decay))


@each_direction
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (0, 1, 0)], ids=str)
def test_empty(ops, device, shape, direction):
    tree = Tree(*(field[: shape[0]] for field in make_tree("path", 2, shape[1], device)))
    x, decay, grad = operands(*shape, device)
    assert [result.shape for result in ops.gradients(x, decay, tree, grad, direction)] == [shape] * 3


@each_direction
@pytest.mark.parametrize("shape", ["scattered", "forest"])
def test_decay_of_a_root_is_not_used(ops, device, shape, direction):
    tree = make_tree(shape, 2, 20, device)
    x, decay, grad = operands(2, 20, 4, device)
    expected = ops.gradients(x, decay, tree, grad, direction)
    roots = tree.parent == torch.arange(20, device=device)
    for value in (float("nan"), float("inf"), 1e300):
        decay[roots] = value
        found = ops.gradients(x, decay, tree, grad, direction)
        check(found, expected, rtol=0, atol=0)
        assert (found[2][roots] == 0).all()


@each_direction
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_values_stay_in_their_channel(ops, device, value, direction):
    tree = make_tree("scattered", 3, 20, device)
    x, decay, grad = operands(3, 20, 6, device, torch.float32)
    expected = ops.gradients(x, decay, tree, grad, direction)
    for operand in (x, decay, grad):
        spoiled = operand.clone()
        spoiled[1, 7:9, 2] = value
        arguments = [spoiled if other is operand else other for other in (x, decay, grad)]
        for result, target in zip(ops.gradients(*arguments[:2], tree, arguments[2], direction), expected, strict=True):
            result[1, :, 2] = target[1, :, 2]
            assert torch.equal(result, target)


@each_direction
@pytest.mark.parametrize("shape", ["path", "star", "scattered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_deterministic(ops, device, shape, dtype, direction, restore_threads):
    """Over runs and numbers of threads, at sizes where work is divided and many children meet in one parent."""
    num_vertices = 20 if shape == "path" else 1500
    tree = make_tree(shape, 2, num_vertices, device)
    x, decay, grad = operands(2, num_vertices, 45, device, dtype)
    runs = []
    for threads in (1, 2, 2, 3) if ops is Operations else (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(ops.gradients(x, decay, tree, grad, direction))
    for run in runs[1:]:
        for name, result, first in zip(NAMES, run, runs[0], strict=True):
            assert torch.equal(result, first), name


@each_direction
def test_result_does_not_depend_on_the_batch_around_it(ops, device, direction):
    tree = make_tree("scattered", 6, 50, device)
    x, decay, grad = operands(6, 50, 70, device, torch.float32)
    whole = ops.gradients(x, decay, tree, grad, direction)
    for item in range(6):
        part = slice(item, item + 1)
        alone = ops.gradients(x[part], decay[part], Tree(*(field[part] for field in tree)), grad[part], direction)
        check(alone, [result[part] for result in whole], rtol=1e-6, atol=1e-6)


@each_direction
def test_nothing_is_read_before_it_is_written(ops, device, poisoned_memory, direction):
    for shape in SHAPES:
        tree = make_tree(shape, 2, 20, device)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float16, 2e-3)):
            x, decay, grad = operands(2, 20, 7, device, dtype)
            found = ops.gradients(x, decay, tree, grad, direction)
            check(found, oracles.message_gradients(x, decay, tree, grad, direction), rtol=tolerance, atol=tolerance)


def test_arguments_are_left_alone(ops, device):
    tree = make_tree("comb", 2, 9, device)
    arguments = (*operands(2, 9, 3, device), *tree)
    before = [argument.clone() for argument in arguments]
    x, decay, grad, *fields = arguments
    results = ops.gradients(x, decay, Tree(*fields), grad)
    assert all(torch.equal(now, then) for now, then in zip(arguments, before, strict=True))
    assert len({tensor.data_ptr() for tensor in (*arguments, *results)}) == len(arguments) + len(results)


@each_direction
@pytest.mark.parametrize("shape", ["path", "star", "binary", "forest"])
def test_gradcheck(device, shape, direction):
    tree = make_tree(shape, 2, 9, device)
    x, decay, _ = operands(2, 9, 2, device)
    x.requires_grad_()
    decay.requires_grad_()

    def scan(x, decay):
        return grootvl_ops.tree_scan(x, decay, tree, direction)

    assert torch.autograd.gradcheck(scan, (x, decay), nondet_tol=0.0)
    assert torch.autograd.gradcheck(lambda x: scan(x, decay.detach()), (x,))
    assert torch.autograd.gradcheck(lambda decay: scan(x.detach(), decay), (decay,))


@each_direction
@pytest.mark.parametrize("shape", ["comb", "scattered", "forest"])
def test_reference_sweeps_differentiate_to_the_written_backward(device, shape, direction):
    tree = make_tree(shape, 2, 40, device)
    x, decay, grad = operands(2, 40, 3, device)
    found = reference.tree_scan_backward(grad, x, decay, *tree, direction)
    h = reference.tree_scan(x.requires_grad_(), decay.requires_grad_(), *tree, direction)
    for result, target in zip(found, torch.autograd.grad(h, (x, decay), grad), strict=True):
        torch.testing.assert_close(result, target, rtol=1e-12, atol=1e-12)


@each_direction
def test_the_two_oracles_agree(direction):
    tree = make_tree("scattered", 2, 25)
    x, decay, grad = operands(2, 25, 3, "cpu")
    found = oracles.message_gradients(x, decay, tree, grad, direction)
    check(found, oracles.dense_gradients(x, decay, tree, grad, direction), rtol=1e-12, atol=1e-12)


def test_scan_over_all_roots_is_symmetric(ops, device):
    """<g, scan(x)> = <scan(g), x>: the path from j to i is the path from i to j."""
    tree = make_tree("scattered", 2, 60, device)
    x, decay, grad = operands(2, 60, 4, device)
    left, right = (grad * ops.tree_scan(x, decay, tree)).sum(), (ops.tree_scan(grad, decay, tree) * x).sum()
    torch.testing.assert_close(left, right)


def test_root_does_not_matter_where_all_vertices_are_roots(ops, device):
    """The same edges and decays, rooted elsewhere: each decay moves to the other end of its edge on the way."""
    features = torch.randn(1, 4, 5, 3, device=device)
    first, last = ops.build_tree(features, root=0), ops.build_tree(features, root=19)
    x, decay, _ = operands(1, 20, 3, device)
    moved = torch.empty_like(decay)
    parent = first.parent[0].tolist()
    for vertex, above in enumerate(last.parent[0].tolist()):
        moved[0, vertex] = decay[0, vertex if parent[vertex] == above else above]
    torch.testing.assert_close(ops.tree_scan(x, decay, first), ops.tree_scan(x, moved, last))


@pytest.mark.parametrize("size", ["op_2_4_5_7", "op_1_8_14_14"])
def test_published_implementation(ops, device, size):
    """Tree, result and gradients that the published code gave on a GPU, see golden/README.md."""
    golden = {name: value.to(device) for name, value in torch.load(GOLDEN, weights_only=True)[size].items()}
    features = golden["x"].permute(0, 2, 3, 1)
    x = features.flatten(1, 2)
    decay, grad = (golden[name].transpose(1, 2) for name in ("w", "go"))
    tree = ops.build_tree(features)
    for b, published in enumerate(golden["tree"]):
        children = [v for v, above in enumerate(tree.parent[b].tolist()) if v != above]
        ours = {frozenset((v, tree.parent[b, v].item())) for v in children}
        assert ours == {frozenset(edge) for edge in published.tolist()}
    order, above = golden["sorted_index"].long(), golden["sorted_parent"].long()  # parents as places in the order
    assert torch.equal(tree.parent.long().gather(1, order)[:, 1:], order.gather(1, above)[:, 1:])
    h, dx, ddecay = ops.gradients(x, decay, tree, grad)
    torch.testing.assert_close(h, golden["out"].transpose(1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx, golden["gx"].flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    by_order = ddecay.gather(1, order.unsqueeze(-1).expand_as(ddecay))[:, 1:]  # the root has no edge
    torch.testing.assert_close(by_order, golden["gw_sorted"].transpose(1, 2)[:, 1:], rtol=1e-4, atol=1e-4)


TREE = make_tree("path", 2, 5)
X = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    "x, decay, tree, error, message",
    [
        (X[0], X[0], TREE, ValueError, r"x must be \(B, L, D\), got \[5, 3\]"),
        (X, X[:, :, :2], TREE, ValueError, r"decay must have the shape of x, \[2, 5, 3\], got \[2, 5, 2\]"),
        (X, X[0], TREE, ValueError, r"decay must have the shape of x, \[2, 5, 3\], got \[5, 3\]"),
        (X, X[:1], TREE, ValueError, r"decay must have the shape of x, \[2, 5, 3\], got \[1, 5, 3\]"),
        (X.int(), X.int(), TREE, TypeError, r"x must be floating point, got .*int32"),
        (X.cfloat(), X.cfloat(), TREE, TypeError, r"x must be floating point, got .*complex64"),
        (X, X.half(), TREE, TypeError, r"one dtype, got .*float32 and .*float16"),
        (X, X.double(), TREE, TypeError, r"one dtype, got .*float32 and .*float64"),
        (X[:1], X[:1], TREE, ValueError, r"\(B, L\) = \[1, 5\] for x \[1, 5, 3\], got \[2, 5\]"),
        (X[:, :4], X[:, :4], TREE, ValueError, r"\(B, L\) = \[2, 4\] for x \[2, 4, 3\], got \[2, 5\]"),
        (X, X, TREE._replace(order=TREE.order[:, :4]), ValueError, r"\(B, L\) = \[2, 5\].*got \[2, 4\]"),
        (X, X, TREE._replace(parent=TREE.parent[0]), ValueError, r"\(B, L\) = \[2, 5\].*got \[5\]"),
        (X, X, TREE._replace(parent=TREE.parent.long()), TypeError, r"fields must be int32, got .*int64"),
        (X, X, TREE._replace(subtree_size=TREE.subtree_size.float()), TypeError, r"must be int32, got .*float32"),
    ],
)
def test_errors(device, x, decay, tree, error, message):
    with pytest.raises(error, match=message):
        grootvl_ops.tree_scan(x.to(device), decay.to(device), Tree(*(field.to(device) for field in tree)))


@pytest.mark.parametrize(
    "x, decay, tree",
    [(X.to("meta"), X, TREE), (X, X.to("meta"), TREE), (X, X, TREE._replace(order=TREE.order.to("meta")))],
)
def test_operands_on_two_devices(x, decay, tree):
    with pytest.raises(ValueError, match="must be on one device, got .*meta"):
        grootvl_ops.tree_scan(x, decay, tree)


BAD_CALLS = {
    "flat x": (X[0], X[0], *TREE),
    "narrow decay": (X, X[..., :2], *TREE),
    "small decay": (X, X[:1], *TREE),
    "integers": (X.int(), X.int(), *TREE),
    "two dtypes": (X, X.double(), *TREE),
    "long parent": (X, X, TREE.parent.long(), *TREE[1:]),
    "float order": (X, X, TREE.parent, TREE.order.float(), TREE.subtree_size),
    "long size": (X, X, *TREE[:2], TREE.subtree_size.long()),
    "small tree": (X, X, *(field[:1] for field in TREE)),
    "short tree": (X, X, *(field[:, :4] for field in TREE)),
    "flat tree": (X, X, *(field[0] for field in TREE)),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_kernels_check_what_they_are_called_with(compiled_device, call):
    arguments = [argument.to(compiled_device) for argument in BAD_CALLS[call]]
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.grootvl_ops.tree_scan(*arguments)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.grootvl_ops.tree_scan_backward(arguments[0], *arguments)


@pytest.mark.parametrize("grad", [X[:1], X[0], X[..., :2], X.double(), X.int()], ids=lambda grad: str(list(grad.shape)))
def test_backward_kernel_checks_the_gradient(compiled_device, grad):
    x, *fields = (argument.to(compiled_device) for argument in (X, *TREE))
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.grootvl_ops.tree_scan_backward(grad.to(compiled_device), x, x, *fields)


@pytest.mark.parametrize("vertex", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("field", ["parent", "order"])
def test_broken_trees_are_refused_on_the_cpu(field, vertex):
    if grootvl_ops.backend("cpu") != "compiled":
        pytest.skip("no compiled kernels")
    broken = getattr(TREE, field).clone()
    broken[1, 3] = vertex
    for direction in DIRECTIONS:
        with pytest.raises((ValueError, RuntimeError)):
            grootvl_ops.tree_scan(X, X, TREE._replace(**{field: broken}), direction)

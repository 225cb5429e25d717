"""The selective scan and the gated norm against their definitions in float64, differentiated by autograd."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tree_makers import SHAPES, make_tree

import grootvl_ops
from grootvl_ops import DIRECTIONS, Tree

library = torch.ops.grootvl_ops
# Of the largest value; half formats round results, the projected step size and the gradients of a step.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def path_products(decay: Tensor, tree: Tree) -> Tensor:
    """(B, L, L, D): the product of the decays on the path between each two vertices."""
    batch, length, channels = decay.shape
    products = torch.zeros(batch, length, length, channels, dtype=decay.dtype)
    rows = []
    for b in range(batch):
        done: dict[int, list[Tensor]] = {}
        known: list[int] = []
        for v in tree.order[b].tolist():
            p = int(tree.parent[b, v])
            row = {w: done[p][w] * decay[b, v] if p != v else torch.zeros(channels, dtype=decay.dtype) for w in known}
            for w in known:
                done[w][v] = row[w]
            row[v] = torch.ones(channels, dtype=decay.dtype)
            done[v] = row
            known.append(v)
        rows.append(torch.stack([torch.stack([done[i][j] for j in range(length)]) for i in range(length)]))
    return torch.stack(rows) if rows else products


def is_below(tree: Tree) -> Tensor:
    """(B, L, L): whether the second vertex is in the subtree of the first."""
    place = torch.argsort(tree.order.long(), dim=1)
    start, size = place.unsqueeze(2), tree.subtree_size.long().unsqueeze(2)
    return (place.unsqueeze(1) >= start) & (place.unsqueeze(1) < start + size)


def defined_scan(x, dt, dt_weight, dt_bias, A_log, B, tree: Tree, direction: str) -> Tensor:
    """Straight from the paper: every vertex sums over all vertices, with the decays along the path."""
    delta = F.softplus(dt @ dt_weight.T + dt_bias)
    products = path_products(torch.exp(-A_log.exp() * delta), tree)
    if direction != "both":
        below = is_below(tree)
        products = products * (below if direction == "up" else below.mT).unsqueeze(-1)
    return (products * (delta * B.unsqueeze(-1) * x).unsqueeze(1)).sum(2)


def defined_norm(h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias, eps: float) -> Tensor:
    inner = F.layer_norm(h, h.shape[-1:], h_weight, h_bias, eps)
    return F.layer_norm(C.unsqueeze(-1) * inner + D_skip * x, h.shape[-1:], out_weight, out_bias, eps) * F.silu(z)


def scan_operands(batch: int, length: int, channels: int, rank: int, dtype: torch.dtype) -> list[Tensor]:
    """x, dt, dt_weight, dt_bias, A_log, B; step sizes from small ones to those where softplus is the identity."""
    maps = [torch.randn(batch, length, size) for size in (channels, rank)]
    parameters = [torch.randn(channels, rank), torch.linspace(-7, 3, channels), torch.randn(channels) / 2]
    if channels > 1:
        parameters[1][-1] = 30
    maps, B = [operand.to(dtype) for operand in maps], torch.randn(batch, length).to(dtype)
    return [*maps, *(p.to(dtype if dtype == torch.float64 else torch.float32) for p in parameters), B]


def norm_operands(batch: int, length: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    maps = [torch.randn(batch, length, channels).to(dtype) + offset for offset in (3, 0, 0)]
    parameters = [torch.randn(channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)] * 5
    return [*maps, torch.randn(batch, length).to(dtype), *(p.roll(i) for i, p in enumerate(parameters))]


def with_gradients(function, operands: list[Tensor], grad: Tensor, *others) -> list[Tensor]:
    operands = [operand.detach().requires_grad_() for operand in operands]
    out = function(*operands, *others)
    return [out.detach(), *torch.autograd.grad(out, operands, grad.to(out), materialize_grads=True)]


def assert_near(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and torch.isfinite(a).all(), number
        difference = (a.double().cpu() - e).abs().max() if e.numel() else torch.tensor(0.0)
        limit = TOLERANCE[dtype] * max(float(e.abs().max()), 1e-3) if e.numel() else 0
        assert difference <= limit, f"result {number}: {float(difference)} > {limit}"


def check_scan(tree: Tree, operands: list[Tensor], device: str, direction: str) -> None:
    dtype = operands[0].dtype
    grad = torch.randn(operands[0].shape).to(dtype)
    expected = with_gradients(defined_scan, [o.double() for o in operands], grad.double(), tree, direction)
    on_device = Tree(*(field.to(device) for field in tree))
    actual = with_gradients(
        grootvl_ops.selective_scan, [o.to(device) for o in operands], grad.to(device), on_device, direction
    )
    assert [a.dtype for a in actual] == [dtype, *(o.dtype for o in operands)]
    assert_near(actual, expected, dtype)


@DTYPES
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 2, 3, 2), (2, 17, 40, 5), (3, 9, 32, 1), (1, 40, 70, 3)], ids=str)
def test_selective_scan(device, size, direction, dtype, poisoned_memory):
    batch, length, channels, rank = size
    check_scan(
        make_tree("scattered", batch, length), scan_operands(batch, length, channels, rank, dtype), device, direction
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_selective_scan_on_trees_of_any_shape(device, shape, direction):
    check_scan(make_tree(shape, 2, 23), scan_operands(2, 23, 5, 2, torch.float32), device, direction)


def check_parts(kind: str, size: tuple[int, int, int], dtype: torch.dtype, direction: str, device: str) -> None:
    """Against discretisation by PyTorch and the tree scan, on a CPU in float64; the same bits thrice."""
    batch, height, width = size
    features = torch.randn(*size, 40) if kind == "random" else torch.ones(*size, 40)
    tree = grootvl_ops.build_tree(features)
    operands = scan_operands(batch, height * width, 40, 3, dtype)
    grad = torch.randn(operands[0].shape).to(operands[0])

    def parts(x, dt, dt_weight, dt_bias, A_log, B):
        delta = F.softplus(dt @ dt_weight.T + dt_bias)
        return grootvl_ops.tree_scan(delta * B.unsqueeze(-1) * x, torch.exp(-A_log.exp() * delta), tree, direction)

    expected = with_gradients(parts, [o.double() for o in operands], grad.double())
    operands, grad = [o.to(device) for o in operands], grad.to(device)
    on_device = Tree(*(field.to(device) for field in tree))
    run = partial(with_gradients, grootvl_ops.selective_scan, operands, grad, on_device, direction)
    actual, *again = (run() for _ in range(3))
    assert_near(actual, expected, dtype)
    assert all(torch.equal(a, b) for run in again for a, b in zip(actual, run, strict=True))


@pytest.mark.parametrize(
    "dtype, direction",
    [
        (torch.float64, "both"),
        (torch.float64, "up"),
        (torch.float64, "down"),
        (torch.float32, "both"),
        (torch.bfloat16, "both"),
        (torch.bfloat16, "up"),
        (torch.bfloat16, "down"),
    ],
    ids=str,
)
@pytest.mark.parametrize("height, width", [(1, 700), (23, 29), (56, 56), (95, 101)])
@pytest.mark.parametrize("kind", ["random", "constant"])
def test_selective_scan_equals_its_parts(device, kind, height, width, dtype, direction, poisoned_memory):
    """On maps large enough to be cut into runs."""
    check_parts(kind, (2, height, width), dtype, direction, device)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_selective_scan_of_a_large_map_in_float64(cuda_kernels, direction):
    """The largest values and the deepest stacks: more shared memory than a kernel has without asking for it."""
    check_parts("random", (1, 300, 300), torch.float64, direction, cuda_kernels)


@DTYPES
@pytest.mark.parametrize(
    "size",
    [
        *[(1, 1, 1), (2, 3, 5), (2, 7, 40), (3, 5, 264), (1, 3, 1021), (2, 70, 1280)],
        *[(2, 301, 128), (1, 9, 160), (1, 77, 192), (2, 65, 320), (1, 33, 640), (1, 17, 768)],  # several words a thread
    ],
    ids=str,
)
def test_gated_norm(device, size, dtype, poisoned_memory):
    operands = norm_operands(*size, dtype)
    grad = torch.randn(operands[0].shape).to(dtype)
    expected = with_gradients(defined_norm, [o.double() for o in operands], grad.double(), 1e-5)
    actual = with_gradients(grootvl_ops.gated_norm, [o.to(device) for o in operands], grad.to(device), 1e-5)
    assert [a.dtype for a in actual] == [dtype, *(o.dtype for o in operands)]
    if size[-1] == 1:  # LN of one value is its bias: the gradients before it are zero but for rounding
        actual, expected = ([r for i, r in enumerate(results) if i not in (1, 2)] for results in (actual, expected))
    assert_near(actual, expected, dtype)


def test_gated_norm_of_many_pixels(device):
    """More pixels than the threads of a GPU take at once; the same bits each time."""
    operands = [o.to(device) for o in norm_operands(3, 12_345, 24, torch.float16)]
    grad = torch.randn(operands[0].shape).to(operands[0])
    expected = with_gradients(defined_norm, [o.double() for o in operands], grad.double(), 1e-5)
    actual = with_gradients(grootvl_ops.gated_norm, operands, grad)
    assert_near(actual, [e.cpu() for e in expected], torch.float16)
    assert all(map(torch.equal, actual, with_gradients(grootvl_ops.gated_norm, operands, grad)))


CONVERSIONS = [(dtype, dtype) for dtype in TOLERANCE] + [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("dtype, out_dtype", CONVERSIONS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 3, 5), (7, 40), (1, 9, 11, 80), (5, 264), (3, 1021), (1500, 96)], ids=str)
def test_layer_norm(device, size, dtype, out_dtype, poisoned_memory):
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    operands = [torch.randn(size).to(dtype) + 3, *torch.randn(2, size[-1], dtype=parameter_dtype)]
    grad = torch.randn(size).to(out_dtype)

    def defined(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    expected = with_gradients(defined, [o.double() for o in operands], grad.double())
    actual = with_gradients(grootvl_ops.layer_norm, [o.to(device) for o in operands], grad.to(device), 1e-6, out_dtype)
    assert [a.dtype for a in actual] == [out_dtype, *(o.dtype for o in operands)]
    if size[-1] == 1:  # the gradient before the norm is zero but for rounding
        actual, expected = ([r for i, r in enumerate(results) if i not in (1, 2)] for results in (actual, expected))
    assert_near(actual, expected, min((dtype, out_dtype), key=lambda d: -TOLERANCE[d]))


def test_layer_norm_refuses(device):
    x, weight = torch.randn(2, 5, device=device), torch.ones(5, device=device)
    for bad in (weight[:4], weight.unsqueeze(0), weight.long(), weight.to("meta")):
        for arguments in ((x, bad, weight), (x, weight, bad)):
            with pytest.raises((ValueError, TypeError), match="bias" if arguments[2] is bad else "weight"):
                grootvl_ops.layer_norm(*arguments)
    with pytest.raises((ValueError, TypeError), match=r"\(\.\.\., C\)"):
        grootvl_ops.layer_norm(x[0, 0], weight, weight)


def as_columns(operand: Tensor) -> Tensor:
    """The same values as a part of a larger tensor."""
    *sizes, last = operand.shape
    return torch.cat([operand.reshape(*sizes, last), torch.full((*sizes, 3), torch.nan).to(operand)], -1)[..., :last]


def test_operands_need_not_be_contiguous(device):
    tree = make_tree("scattered", 2, 17, device)
    operands = [o.to(device) for o in scan_operands(2, 17, 24, 3, torch.float32)]
    expected = grootvl_ops.selective_scan(*operands, tree)
    for number, operand in enumerate(operands):
        views = [as_columns(operand)] if operand.dim() > 1 else [operand.repeat_interleave(2)[::2]]
        if number == 5:
            views.append(operand.unsqueeze(-1).expand(-1, -1, 3).contiguous()[..., 1])
        for view in views:
            changed = [*operands[:number], view, *operands[number + 1 :]]
            torch.testing.assert_close(grootvl_ops.selective_scan(*changed, tree), expected, rtol=1e-5, atol=1e-5)
    operands = [o.to(device) for o in norm_operands(2, 17, 24, torch.float32)]
    expected = grootvl_ops.gated_norm(*operands)
    for number, operand in enumerate(operands):
        view = as_columns(operand) if operand.dim() > 1 else operand.repeat_interleave(2)[::2]
        changed = [*operands[:number], view, *operands[number + 1 :]]
        torch.testing.assert_close(grootvl_ops.gated_norm(*changed), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [8, 24, 7])
@pytest.mark.parametrize("place", ["alone", "first half", "second half", "with a column beside", "misaligned"])
def test_gradient_of_the_gate_into_a_larger_map(device, place, channels, dtype, poisoned_memory):
    operands = [o.to(device) for o in norm_operands(2, 17, channels, dtype)]
    grad, statistics = library.gated_norm(*operands, 1e-5)
    expected = library.gated_norm_backward(grad, *operands, statistics)
    begin = int(place == "misaligned")
    total = channels if place in ("alone", "misaligned") else channels + (1 if "column" in place else channels)
    first = total - channels if place == "second half" else 0
    memory = torch.full((begin + 2 * 17 * total,), torch.nan, dtype=dtype, device=device)
    dz = memory[begin:].view(2, 17, total)[..., first : first + channels]
    dh, dx, dC, dparameters = library.gated_norm_backward_into(dz, grad, *operands, statistics)
    assert all(map(torch.equal, (dh, dx, dz, dC, dparameters), expected))
    assert memory.isnan().sum() == memory.numel() - dz.numel()  # nothing else was written
    if device == "cuda":
        for bad in (dz[:1], dz.to("cpu"), dz.transpose(0, 1).contiguous().transpose(0, 1)):
            with pytest.raises((ValueError, RuntimeError), match="dz"):
                library.gated_norm_backward_into(bad, grad, *operands, statistics)


def test_gradcheck(device):
    tree = make_tree("scattered", 2, 7, device)
    operands = [o.to(device).requires_grad_() for o in scan_operands(2, 7, 3, 2, torch.float64)]
    for direction in DIRECTIONS:
        assert torch.autograd.gradcheck(lambda *o, d=direction: grootvl_ops.selective_scan(*o, tree, d), operands)
    operands = [o.to(device).requires_grad_() for o in norm_operands(2, 4, 3, torch.float64)]
    assert torch.autograd.gradcheck(grootvl_ops.gated_norm, operands)
    operands = [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in ((2, 4, 3), 3, 3)]
    assert torch.autograd.gradcheck(grootvl_ops.layer_norm, operands)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_opcheck(device, dtype):
    tree = make_tree("scattered", 2, 9, device)
    operands = [o.to(device) for o in scan_operands(2, 9, 3, 2, dtype)]
    torch.library.opcheck(library.selective_scan_backward.default, (operands[0], *operands, None, *tree, "both"))
    operands = [o.requires_grad_() for o in operands]
    torch.library.opcheck(library.selective_scan.default, (*operands, None, *tree, "both"))
    operands = [o.to(device) for o in norm_operands(2, 4, 24, dtype)]
    out, statistics = library.gated_norm(*operands, 1e-5)
    torch.library.opcheck(library.gated_norm_backward.default, (out, *operands, statistics))
    torch.library.opcheck(library.gated_norm.default, (*(o.requires_grad_() for o in operands), 1e-5))
    x, weight, bias = operands[0].detach(), *(o.detach() for o in operands[5:7])
    out, statistics = library.layer_norm(x, weight, bias, 1e-5)
    torch.library.opcheck(library.layer_norm_backward.default, (out, x, weight, statistics))
    torch.library.opcheck(
        library.layer_norm.default, (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), 1e-5)
    )


def test_under_autocast(device):
    """Operands keep their precision: all are in the one that the maps have."""
    tree = make_tree("scattered", 2, 9, device)
    operands = [o.to(device) for o in scan_operands(2, 9, 3, 2, torch.float32)]
    expected = grootvl_ops.selective_scan(*operands, tree)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(grootvl_ops.selective_scan(*operands, tree), expected)


def test_nothing_to_do(device):
    empty = Tree(*(torch.empty(0, 5, dtype=torch.int32, device=device) for _ in range(3)))
    operands = [o.to(device) for o in scan_operands(0, 5, 3, 2, torch.float32)]
    results = with_gradients(grootvl_ops.selective_scan, operands, operands[0], empty)
    assert results[0].shape == (0, 5, 3) and not any(r.any() for r in results[3:6])
    for batch, length in ((0, 5), (2, 0)):
        operands = [o.to(device) for o in norm_operands(batch, length, 3, torch.float32)]
        results = with_gradients(grootvl_ops.gated_norm, operands, operands[0])
        assert results[0].shape == (batch, length, 3) and not any(r.any() for r in results[5:])


@pytest.mark.parametrize("number, name", list(enumerate(["x", "dt", "dt_weight", "dt_bias", "A_log", "B"])))
def test_selective_scan_refuses(device, number, name):
    tree = make_tree("path", 2, 5, device)
    operands = [o.to(device) for o in scan_operands(2, 5, 3, 2, torch.float32)]
    for bad in (operands[number][..., :0], operands[number].unsqueeze(0), operands[number].long()):
        changed = [*operands[:number], bad, *operands[number + 1 :]]
        with pytest.raises((ValueError, TypeError), match=name if number else None):
            grootvl_ops.selective_scan(*changed, tree)
    changed = [*operands[:number], operands[number].to("meta"), *operands[number + 1 :]]
    with pytest.raises(ValueError, match="device"):
        grootvl_ops.selective_scan(*changed, tree)


NORM_NAMES = ("h", "x", "z", "C", "D_skip", "h_weight", "h_bias", "out_weight", "out_bias")


@pytest.mark.parametrize("number, name", list(enumerate(NORM_NAMES)))
def test_gated_norm_refuses(device, number, name):
    operands = [o.to(device) for o in norm_operands(2, 5, 3, torch.float32)]
    for bad in (operands[number][..., :0], operands[number].unsqueeze(0), operands[number].long()):
        changed = [*operands[:number], bad, *operands[number + 1 :]]
        with pytest.raises((ValueError, TypeError), match=name if number else None):
            grootvl_ops.gated_norm(*changed)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("channels", [1024, 1025, 2048, 4096, 4104])
def test_norms_of_any_number_of_channels(device, channels, offset):
    """On CUDA also of more than the kernels take, and where rows begin at any address."""
    operands = norm_operands(1, 2, channels, torch.float32)
    for i in range(3):
        storage = torch.empty(2 * channels + offset)
        operands[i] = storage[offset:].view(1, 2, channels).copy_(operands[i])
    grad = torch.randn(1, 2, channels)
    expected = with_gradients(defined_norm, [o.double() for o in operands], grad.double(), 1e-5)
    actual = with_gradients(grootvl_ops.gated_norm, [o.to(device) for o in operands], grad.to(device))
    assert_near(actual, expected, torch.float32)
    operands = [operands[0], *operands[4:6]]
    expected = with_gradients(defined_layer_norm, [o.double() for o in operands], grad.double())
    actual = with_gradients(grootvl_ops.layer_norm, [o.to(device) for o in operands], grad.to(device))
    assert_near(actual, expected, torch.float32)


def defined_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def state_operands(
    batch: int, length: int, channels: int, rank: int, states: int | None, dtype: torch.dtype
) -> list[Tensor]:
    """As `scan_operands`, and C, with `states` states a channel; None: one state without an axis."""
    operands, axes = scan_operands(batch, length, channels, rank, dtype), () if states is None else (states,)
    operands[4] = torch.randn(channels, *axes).to(operands[4].dtype) / 2
    return [*operands[:5], *(torch.randn(batch, length, *axes).to(dtype) for _ in range(2))]


def defined_states(x, dt, dt_weight, dt_bias, A_log, B, C, tree: Tree, direction: str) -> Tensor:
    """State by state from the definition, (B, L, D, N); C weighs and sums them."""
    if A_log.dim() == 1:
        A_log, B, C = A_log.unsqueeze(-1), B.unsqueeze(-1), C.unsqueeze(-1)
    states = [
        defined_scan(x, dt, dt_weight, dt_bias, A_log[:, n], B[..., n], tree, direction) for n in range(A_log.shape[1])
    ]
    return (torch.stack(states, -1) * C.unsqueeze(2)).sum(-1)


@DTYPES
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("states", [None, 1, 3])
def test_several_states(device, states, direction, dtype):
    tree = make_tree("scattered", 2, 19)
    operands, grad = state_operands(2, 19, 5, 2, states, dtype), torch.randn(2, 19, 5).to(dtype)
    expected = with_gradients(defined_states, [o.double() for o in operands], grad.double(), tree, direction)
    on_device = Tree(*(field.to(device) for field in tree))

    def summed(*operands: Tensor) -> Tensor:
        return grootvl_ops.selective_scan(*operands[:6], on_device, direction, operands[6])

    actual = with_gradients(summed, [o.to(device) for o in operands], grad.to(device))
    assert [a.dtype for a in actual] == [dtype, *(o.dtype for o in operands)]
    assert_near(actual, expected, dtype)

    def weighed(*operands: Tensor) -> Tensor:
        h = grootvl_ops.selective_scan(*operands[:6], on_device, direction)
        assert h.shape == ((2, 19, 5) if states is None else (2, 19, 5, states))
        C = operands[6].unsqueeze(2)
        return h * C if states is None else (h * C).sum(-1)

    actual = with_gradients(weighed, [o.to(device) for o in operands], grad.to(device))
    assert_near(actual, expected, dtype)


# Sizes of one run, of several, and of several sections; the last states and channels fill no warp.
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("states", [1, 4, 7, 16, 18])
@pytest.mark.parametrize(
    "shape, size",
    [("scattered", (3, 100, 40)), ("forest", (2, 700, 7)), ("binary", (1, 1500, 9)), ("comb", (1, 9000, 5))],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_over_states_on_cuda(cuda_kernels, shape, size, states, direction, dtype, poisoned_memory):
    """Against the kernels for CPUs in float64; the same bits twice."""
    batch, length, channels = size
    tree = make_tree(shape, batch, length)
    operands = state_operands(batch, length, channels, 2, states, dtype)
    grad = torch.randn(size).to(dtype)

    def run(operands: list[Tensor], grad: Tensor, tree: Tree) -> list[Tensor]:
        scan = grootvl_ops.selective_scan
        return with_gradients(lambda *o: scan(*o[:6], tree, direction, o[6]), operands, grad)

    expected = run([o.double() for o in operands], grad.double(), tree)
    on_device = [o.to(cuda_kernels) for o in operands], grad.to(cuda_kernels), Tree(*(f.to(cuda_kernels) for f in tree))
    actual, again = run(*on_device), run(*on_device)
    assert_near(actual, expected, dtype)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def stepped_operands(batch: int, length: int, channels: int, states: int, dtype: torch.dtype) -> list[Tensor]:
    """x, dt, decay_dt, A_log, B, C; one step of a decay is so small that it decays nothing."""
    maps = [torch.randn(batch, length, channels).to(dtype) for _ in range(3)]
    maps[2][:, length // 2] = -1e4
    A_log = torch.randn(channels, states).to(dtype if dtype == torch.float64 else torch.float32) / 2
    return [*maps, A_log, *(torch.randn(batch, length, states).to(dtype) for _ in range(2))]


def stepped(x, dt, decay_dt, A_log, B, C, tree: Tree, direction: str) -> Tensor:
    return grootvl_ops.selective_scan(x, dt, None, None, A_log, B, tree, direction, C, decay_dt)


def defined_steps(x, dt, decay_dt, A_log, B, C, tree: Tree, direction: str) -> Tensor:
    """State by state, by discretisation in PyTorch and the tree scan."""
    states = [
        grootvl_ops.tree_scan(
            F.softplus(dt) * B[..., n, None] * x, torch.exp(-A_log[:, n].exp() * F.softplus(decay_dt)), tree, direction
        )
        for n in range(A_log.shape[1])
    ]
    return (torch.stack(states, -1) * C.unsqueeze(2)).sum(-1)


@DTYPES
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 19, 5, 3), (2, 300, 40, 16), (1, 900, 7, 18)], ids=str)
def test_decays_with_steps_of_their_own(device, size, direction, dtype, poisoned_memory):
    batch, length, channels, states = size
    tree = make_tree("scattered", batch, length)
    operands, grad = stepped_operands(*size, dtype), torch.randn(batch, length, channels).to(dtype)
    expected = with_gradients(defined_steps, [o.double() for o in operands], grad.double(), tree, direction)
    on_device = Tree(*(field.to(device) for field in tree))
    actual = with_gradients(stepped, [o.to(device) for o in operands], grad.to(device), on_device, direction)
    assert [a.dtype for a in actual] == [dtype, *(o.dtype for o in operands)]
    assert_near(actual, expected, dtype)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_equal_steps_of_decays_change_nothing(device, direction):
    tree = make_tree("binary", 2, 30, device)
    x, dt, _, A_log, B, C = (o.to(device) for o in stepped_operands(2, 30, 9, 4, torch.float64))
    found = grootvl_ops.selective_scan(x, dt, None, None, A_log, B, tree, direction, C, dt)
    torch.testing.assert_close(found, grootvl_ops.selective_scan(x, dt, None, None, A_log, B, tree, direction, C))


def test_steps_of_decays_are_checked(device):
    tree = make_tree("path", 2, 5, device)
    x, dt, decay_dt, A_log, B, C = (o.to(device) for o in stepped_operands(2, 5, 3, 2, torch.float32))
    scan = grootvl_ops.selective_scan
    for steps in (decay_dt[:, :4], decay_dt[..., :2], decay_dt[:1]):
        with pytest.raises(ValueError, match="decay_dt must be"):
            scan(x, dt, None, None, A_log, B, tree, "up", C, steps)
    with pytest.raises(TypeError, match="decay_dt must"):
        scan(x, dt, None, None, A_log, B, tree, "up", C, decay_dt.double())
    bias, weight = torch.zeros(3, device=device), torch.zeros(3, 3, device=device)
    for arguments in (
        (None, None, A_log, B, tree, "both", C),
        (None, None, A_log, B, tree, "up", None),
        (None, bias, A_log, B, tree, "up", C),
        (weight, None, A_log, B, tree, "up", C),
        (None, None, A_log[:, 0], B[..., 0], tree, "up", C[..., 0]),
    ):
        with pytest.raises(ValueError, match="decay_dt needs C"):
            scan(x, dt, *arguments, decay_dt)


def test_opcheck_of_steps_of_decays(device):
    tree = make_tree("scattered", 2, 9, device)
    operands = [o.to(device) for o in stepped_operands(2, 9, 3, 2, torch.float32)]
    torch.library.opcheck(library.stepped_scan_backward.default, (operands[0], *operands, *tree, "down"))
    torch.library.opcheck(library.stepped_scan.default, (*(o.requires_grad_() for o in operands), *tree, "up"))


@pytest.mark.parametrize("bias", [False, True])
def test_step_sizes_that_are_projected_already(device, bias):
    """The step size of each channel given in place of a low-rank one and its weight."""
    tree = make_tree("comb", 2, 17, device)
    x, dt, weight, dt_bias, A_log, B = (o.to(device) for o in scan_operands(2, 17, 5, 2, torch.float64))
    grad = torch.randn_like(x)

    def projected(x: Tensor, dt: Tensor, weight: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor) -> Tensor:
        delta = F.linear(dt, weight, None if bias else dt_bias)
        return grootvl_ops.selective_scan(x, delta, None, dt_bias if bias else None, A_log, B, tree)

    operands = [x, dt, weight, dt_bias, A_log, B]
    expected = with_gradients(grootvl_ops.selective_scan, operands, grad, tree)
    assert_near([a.cpu() for a in with_gradients(projected, operands, grad)], [e.cpu() for e in expected], x.dtype)


def test_states_are_checked(device):
    tree = make_tree("path", 2, 5, device)
    *operands, C = (o.to(device) for o in state_operands(2, 5, 3, 2, 4, torch.float32))
    for number, bad in ((4, operands[4][:, :0]), (4, operands[4][:, :3]), (5, operands[5][..., 0]), (5, C[..., :3])):
        changed = [*operands[:number], bad, *operands[number + 1 :]]
        with pytest.raises(ValueError, match="A_log|B must be"):
            grootvl_ops.selective_scan(*changed, tree, C=C)
    for bad in (C[..., 0], C[:, :4], C.double()):
        with pytest.raises((ValueError, TypeError), match="C must"):
            grootvl_ops.selective_scan(*operands, tree, C=bad)
    with pytest.raises(ValueError, match="dt must be"):
        grootvl_ops.selective_scan(operands[0], operands[1], None, *operands[3:], tree)


@pytest.mark.parametrize("with_C", [False, True])
def test_opcheck_of_several_states(device, with_C):
    tree = make_tree("scattered", 2, 9, device)
    *operands, C = (o.to(device) for o in state_operands(2, 9, 3, 2, 2, torch.float32))
    operands = [*operands, C if with_C else None]
    grad = library.selective_scan(*operands, *tree, "down")
    torch.library.opcheck(library.selective_scan_backward.default, (grad, *operands, *tree, "down"))
    operands = [o if o is None else o.requires_grad_() for o in operands]
    torch.library.opcheck(library.selective_scan.default, (*operands, *tree, "down"))
    operands = [operands[0], operands[0].detach(), None, None, *operands[4:]]
    torch.library.opcheck(library.selective_scan.default, (*operands, *tree, "up"))


def test_memory_does_not_grow_with_the_states(cuda_kernels):
    """With C, no tensor of all states of large maps is in memory, neither forward nor backward."""
    length, channels = 65_536, 1024
    tree = make_tree("path", 1, length, cuda_kernels)

    def peak(states: int) -> int:
        operands = state_operands(1, 1, channels, 4, states, torch.float32)
        per_pixel = (0, 1, 5, 6)
        operands = [
            torch.randn(1, length, *o.shape[2:], device=cuda_kernels) if i in per_pixel else o.to(cuda_kernels)
            for i, o in enumerate(operands)
        ]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with_gradients(
            lambda *o: grootvl_ops.selective_scan(*o[:6], tree, "down", o[6]), operands, torch.randn_like(operands[0])
        )
        return torch.cuda.max_memory_allocated() - before

    peak(1)
    of_weights = 16 * length * 4  # B and C, and their gradients, in float32
    assert peak(16) < peak(2) + 8 * of_weights


@pytest.mark.parametrize("number, value", list(itertools.product((0, 1, 5), (torch.nan, torch.inf))))
def test_nan_is_not_lost(device, number, value):
    tree = make_tree("path", 1, 5, device)
    operands = [o.to(device) for o in scan_operands(1, 5, 3, 2, torch.float32)]
    operands[number][0, 0] = value
    assert not torch.isfinite(grootvl_ops.selective_scan(*operands, tree)).all()

"""The parts of a mixer that are one operation each, against the operations of which they consist, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_selective_scan import TOLERANCE, assert_near, with_gradients
from torch import Tensor

import grootvl_ops
from grootvl_ops.mixers import composed_input, composed_output

library = torch.ops.grootvl_ops
HALF = (torch.float16, torch.bfloat16)
SIZES = [(1, 1, 1, 4, 3, 1), (2, 5, 7, 8, 16, 1), (2, 6, 3, 24, 40, 6), (1, 9, 8, 80, 160, 5)]  # B, H, W, C, D, rank


def input_operands(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    B, H, W, C, D, _ = size
    of_parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(B, H, W, C).to(dtype)
    return [x, torch.randn(2 * D, C, dtype=of_parameters) / C**0.5, torch.randn(D, 1, 3, 3, dtype=of_parameters) / 3]


def output_operands(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    B, H, W, C, D, rank = size
    of_parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(B, H * W, D).to(dtype)
    z = torch.randn(B, H * W, 2 * D).to(dtype)[..., D:]
    shapes = [(rank + 2, D), (D, rank), (D,), (D,), (D,), (D,), (D,), (D,), (D,), (C, D)]
    parameters = [torch.randn(shape, dtype=of_parameters) / shape[-1] ** 0.5 for shape in shapes]
    return [x, z, *parameters]


def make_tree(size: tuple[int, ...], device: str) -> grootvl_ops.Tree:
    B, H, W, *_ = size
    return grootvl_ops.build_tree(torch.rand(B, H, W, 3, generator=torch.Generator().manual_seed(0)).to(device))


def defined_input(x: Tensor, in_proj: Tensor, conv_weight: Tensor, dilation: int = 1) -> tuple[Tensor, Tensor]:
    features, z = F.linear(x, in_proj).chunk(2, dim=-1)
    maps = features.permute(0, 3, 1, 2)
    maps = F.conv2d(maps, conv_weight, padding=dilation, dilation=dilation, groups=len(conv_weight))
    return F.silu(maps).flatten(2).mT, z.flatten(1, 2)


def check(actual: list[Tensor], expected: list[Tensor], peers: list[Tensor], dtype: torch.dtype, device: str) -> None:
    """Against float64; where products are rounded, to half precision or TF32, about as near as the `peers` are."""
    if dtype not in HALF and not (device == "cuda" and dtype == torch.float32):
        assert_near(actual, expected, dtype)
        return
    for found, wanted, peer in zip(actual, expected, peers, strict=True):
        error, of_peer = ((a.double().cpu() - wanted).norm() for a in (found, peer))
        assert error <= 2 * of_peer + (4e-3 if dtype == torch.bfloat16 else 1e-3) * wanted.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_input_against_the_definition(device, size, dilation, dtype, poisoned_memory):
    operands = input_operands(size, dtype)
    grads = [torch.randn(size[0], size[1] * size[2], size[4]).to(dtype) for _ in range(2)]

    def joined(function):
        def both(x, in_proj, conv_weight):
            return torch.cat(function(x, in_proj, conv_weight, dilation), dim=-1)

        return both

    grad = torch.cat(grads, dim=-1)
    expected = with_gradients(joined(defined_input), [o.double() for o in operands], grad.double())
    moved = [o.to(device) for o in operands]
    actual = with_gradients(joined(grootvl_ops.mixer_input), moved, grad.to(device))
    assert [a.dtype for a in actual] == [dtype, *(o.dtype for o in operands)]
    peers = with_gradients(joined(composed_input), operands, grad)
    check(actual, expected, peers, dtype, device)
    again = with_gradients(joined(grootvl_ops.mixer_input), moved, grad.to(device))
    assert all(map(torch.equal, actual, again))
    with torch.inference_mode():
        found = joined(grootvl_ops.mixer_input)(*moved)
    torch.testing.assert_close(found, actual[0], rtol=1e-5 if dtype not in HALF else 1e-2, atol=1e-5)


@pytest.mark.parametrize("direction", grootvl_ops.DIRECTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_against_the_operations(device, size, dtype, direction, poisoned_memory):
    operands = output_operands(size, dtype)
    grad = torch.randn(size[0], size[1] * size[2], size[3]).to(dtype)

    def composed(*tensors):
        return composed_output(*tensors, *make_tree(size, "cpu"), 1e-5, direction)

    def mixer_output(*tensors):
        return grootvl_ops.mixer_output(*tensors, make_tree(size, device), direction)

    expected = with_gradients(composed, [o.double() for o in operands], grad.double())
    moved = [o.to(device) for o in operands]
    actual = with_gradients(mixer_output, moved, grad.to(device))
    assert [a.dtype for a in actual] == [dtype, *(o.dtype for o in operands)]
    check(actual, expected, with_gradients(composed, operands, grad), dtype, device)
    assert all(map(torch.equal, actual, with_gradients(mixer_output, moved, grad.to(device))))
    with torch.inference_mode():
        assert torch.equal(mixer_output(*moved), actual[0])


def test_gradients_of_some(device):
    """Only those that are asked for, each as where all are."""
    size = SIZES[1]
    tree = make_tree(size, device)
    for function, operands in (
        (lambda *o: torch.cat(grootvl_ops.mixer_input(*o), -1), input_operands(size, torch.float32)),
        (lambda *o: grootvl_ops.mixer_output(*o, tree), output_operands(size, torch.float32)),
    ):
        moved = [o.to(device) for o in operands]
        leaves = [o.clone().requires_grad_() for o in moved]
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        for i, wanted in enumerate(expected):
            some = [o.clone().requires_grad_(i == k) for k, o in enumerate(moved)]
            (found,) = torch.autograd.grad(function(*some).square().sum(), some[i : i + 1])
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_of_the_input(device, which):
    leaves = [o.to(device).requires_grad_() for o in input_operands(SIZES[1], torch.float64)]
    found = torch.autograd.grad(grootvl_ops.mixer_input(*leaves)[which].square().sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad(defined_input(*leaves)[which].square().sum(), leaves, allow_unused=True)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, torch.zeros_like(actual) if wanted is None else wanted)


def test_gradcheck_and_opcheck(device):
    size = SIZES[1]
    tree = make_tree(size, device)
    leaves = [o.to(device).requires_grad_() for o in input_operands(size, torch.float64)]
    assert torch.autograd.gradcheck(lambda *o: grootvl_ops.mixer_input(*o), leaves, fast_mode=True)
    torch.library.opcheck(library.mixer_input.default, (*leaves, 1))
    leaves = [o.to(device).requires_grad_() for o in output_operands(size, torch.float64)]
    assert torch.autograd.gradcheck(lambda *o: grootvl_ops.mixer_output(*o, tree), leaves, fast_mode=True)
    torch.library.opcheck(library.mixer_output.default, (*leaves, *tree, 1e-5, "both"))


def test_composed(device):
    """Without the library of gradients: the same results."""
    size = SIZES[2]
    tree = make_tree(size, device)
    operands = [o.to(device) for o in input_operands(size, torch.float64)]
    for found, expected in zip(composed_input(*operands, 1), library.mixer_input(*operands, 1), strict=True):
        torch.testing.assert_close(found, expected)
    operands = [o.to(device) for o in output_operands(size, torch.float64)]
    torch.testing.assert_close(
        composed_output(*operands, *tree, 1e-5, "up"), library.mixer_output(*operands, *tree, 1e-5, "up")
    )


def test_transforms(device):
    size = SIZES[1]
    tree = make_tree(size, device)
    operands = [o.to(device) for o in input_operands(size, torch.float64)]
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        found = transform(lambda x: grootvl_ops.mixer_input(x, *operands[1:])[0].sum())(operands[0])
        expected = transform(lambda x: defined_input(x, *operands[1:])[0].sum())(operands[0])
        torch.testing.assert_close(found, expected)
    operands = [o.to(device) for o in output_operands(size, torch.float64)]
    leaf = operands[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(grootvl_ops.mixer_output(leaf, *operands[1:], tree).sum(), leaf)
    found = torch.func.grad(lambda x: grootvl_ops.mixer_output(x, *operands[1:], tree).sum())(operands[0])
    torch.testing.assert_close(found, expected)


def test_second_derivatives_raise(device):
    size = SIZES[1]
    tree = make_tree(size, device)
    for function, operands in (
        (lambda *o: grootvl_ops.mixer_input(*o)[0], input_operands(size, torch.float64)),
        (lambda *o: grootvl_ops.mixer_output(*o, tree), output_operands(size, torch.float64)),
    ):
        leaves = [o.to(device).requires_grad_() for o in operands]
        for gradient in torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True, allow_unused=True):
            with pytest.raises(RuntimeError, match="differentiated once"):
                gradient.sum().backward(retain_graph=True)


def test_under_autocast(device):
    size = SIZES[3]
    tree = make_tree(size, device)
    operands = [o.to(device).requires_grad_() for o in input_operands(size, torch.float32)]
    with torch.autocast(device, torch.bfloat16):
        features, z = grootvl_ops.mixer_input(*operands)
        expected = defined_input(*operands)
    assert features.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(features, expected[0], rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(z, expected[1], rtol=2e-2, atol=2e-2)
    operands = [o.to(device).requires_grad_() for o in output_operands(size, torch.bfloat16)]
    expected = grootvl_ops.mixer_output(*operands, tree)
    with torch.autocast(device, torch.float16):  # which changes nothing
        assert torch.equal(grootvl_ops.mixer_output(*operands, tree), expected)


def test_weights_of_several_types(device):
    """Some have the type of the map, others do not, and are converted."""
    size = SIZES[1]
    tree = make_tree(size, device)
    operands = [o.to(device) for o in output_operands(size, torch.float32)]
    expected = grootvl_ops.mixer_output(*operands, tree)
    for which, dtype in ((2, torch.float64), (3, torch.float64), (11, torch.float64)):
        mixed = list(operands)
        mixed[which] = operands[which].to(dtype)
        assert torch.equal(grootvl_ops.mixer_output(*mixed, tree), expected)
    mixed = [*operands[:2], operands[2].double(), operands[3].half(), *operands[4:]]
    torch.testing.assert_close(grootvl_ops.mixer_output(*mixed, tree), expected, rtol=1e-2, atol=1e-2)


def test_refuses(device):
    size = SIZES[1]
    tree = make_tree(size, device)
    names = ("x", "in_proj", "conv_weight")
    good = dict(zip(names, (o.to(device) for o in input_operands(size, torch.float32)), strict=True))
    for name, bad in (
        ("x", good["x"][0]),
        ("in_proj", good["in_proj"][1:]),
        ("conv_weight", good["conv_weight"][:, 0]),
        ("in_proj", good["in_proj"].to("meta")),
        ("dilation", 0),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            grootvl_ops.mixer_input(**{**good, name: bad})
    names = (
        "x",
        "z",
        "x_proj",
        "dt_weight",
        "dt_bias",
        "A_log",
        "D_skip",
        "h_weight",
        "h_bias",
        "out_weight",
        "out_bias",
        "out_proj",
    )
    good = dict(zip(names, (o.to(device) for o in output_operands(size, torch.float32)), strict=True))
    for name in names:
        for bad in (good[name][..., :-1], good[name].long(), good[name].to("meta")):
            if name == "x" or (name == "out_proj" and bad.dtype.is_floating_point and bad.device.type != "meta"):
                continue
            with pytest.raises((ValueError, TypeError)):
                grootvl_ops.mixer_output(**{**good, name: bad}, tree=tree)
    with pytest.raises(ValueError, match="direction"):
        grootvl_ops.mixer_output(**good, tree=tree, direction="sideways")
    with pytest.raises(ValueError, match="tree"):
        grootvl_ops.mixer_output(**good, tree=grootvl_ops.Tree(*(field[:, 1:] for field in tree)))

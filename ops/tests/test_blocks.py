"""Residual blocks as one operation, against the operations of which they consist."""

from __future__ import annotations

import pytest
import torch
from test_mixers import HALF, SIZES, output_operands
from test_selective_scan import with_gradients
from torch import Tensor

import grootvl_ops
from grootvl_ops import BlockParameters
from grootvl_ops.blocks import composed_blocks

library = torch.ops.grootvl_ops
COUNT = len(BlockParameters._fields)


def parameters_of(size: tuple[int, ...], dtype: torch.dtype, blocks: int, device: str) -> list[Tensor]:
    """Of all blocks, in a row; float64 for float64 maps, otherwise float32."""
    B, H, W, C, D, _ = size
    of_parameters = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = []
    for _ in range(blocks):
        shapes = [(C,), (C,), (3 * C, C), (3 * C,), (C, 3 * C), (C,), (C,), (C,)]
        parameters += [torch.randn(2 * D, C) / C**0.5, torch.randn(D, 1, 3, 3) / 3]
        parameters += output_operands(size, dtype)[2:]
        parameters += [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    return [parameter.to(device, of_parameters) for parameter in parameters]


def maps_of(size: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """The map, which is float32 beside products in half precision, and its norm."""
    of_map = torch.float32 if dtype in HALF else dtype
    return [torch.randn(size[:4], dtype=of_map).to(device), torch.randn(size[:4]).to(device, dtype)]


def joined(function, *others):
    """A function of maps and parameters that gives both results as one tensor."""

    def both(x, normed, *parameters):
        x, normed = function(x, normed, list(parameters), *others)
        return torch.cat((x, normed.to(x.dtype)), dim=-1)

    return both


@pytest.mark.parametrize(
    "settings",
    [
        (1, "cosine", "both", 0, False, torch.float64),
        (2, "euclidean", "up", -1, False, torch.float64),
        (1, "manhattan", "down", 0, True, torch.float64),
    ],
    ids=["all", "up", "shared"],
)
@pytest.mark.parametrize("drops", [False, True], ids=["", "drops"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_operations(device, size, drops, settings, poisoned_memory):
    dilation, metric, direction, root, one_tree, dtype = settings
    root = root % (size[1] * size[2])
    factors = torch.tensor([[0.0, 2.0], [1.5, 0.0], [2.0, 3.0], [0.5, 1.0], [1.0, 0.0], [4.0, 1.0]])
    factors = factors[:, : size[0]].to(device, torch.float64) if drops else None
    others = (factors, dilation, metric, direction, root, one_tree, 1e-5, 1e-6, dtype)
    operands = [*maps_of(size, dtype, device), *parameters_of(size, dtype, 3, device)]
    grad = torch.randn(*size[:3], 2 * size[3], dtype=dtype).to(device)
    actual = with_gradients(joined(library.tree_blocks, *others), operands, grad)
    expected = with_gradients(joined(composed_blocks, *others), operands, grad)
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with torch.inference_mode():
        torch.testing.assert_close(joined(library.tree_blocks, *others)(*operands), actual[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_half_precision(device, size, dtype):
    """The same kernels on the same values: results are the same, and the same in every run."""
    others = (None, 1, "cosine", "both", 0, False, 1e-5, 1e-6, torch.float32)
    operands = [*maps_of(size, dtype, device), *parameters_of(size, dtype, 2, device)]
    grad = torch.randn(*size[:3], 2 * size[3]).to(device)
    actual = with_gradients(joined(library.tree_blocks, *others), operands, grad)
    assert [a.dtype for a in actual[1:]] == [operand.dtype for operand in operands]
    for found, wanted in zip(actual, with_gradients(joined(composed_blocks, *others), operands, grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
    assert all(map(torch.equal, actual, with_gradients(joined(library.tree_blocks, *others), operands, grad)))
    with torch.inference_mode():
        assert torch.equal(joined(library.tree_blocks, *others)(*operands), actual[0])


def blocks_of(size: tuple[int, ...], dtype: torch.dtype, blocks: int, device: str) -> list[BlockParameters]:
    parameters = parameters_of(size, dtype, blocks, device)
    return [BlockParameters(*parameters[i * COUNT : (i + 1) * COUNT]) for i in range(blocks)]


def test_gradients_of_some(device):
    """Only those that are asked for, each as where all are; also where only one result is used."""
    size = SIZES[1]
    operands = [*maps_of(size, torch.float64, device), *parameters_of(size, torch.float64, 1, device)]
    for which in (0, 1):

        def loss(x, normed, *parameters, which=which):
            return grootvl_ops.tree_blocks(x, normed, [BlockParameters(*parameters)])[which].square().sum()

        leaves = [operand.clone().requires_grad_() for operand in operands]
        expected = torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)
        for i in range(0, len(operands), 3):
            some = [operand.clone().requires_grad_(i == k) for k, operand in enumerate(operands)]
            out = loss(*some)
            if not out.requires_grad:
                assert not expected[i].any()
                continue
            (found,) = torch.autograd.grad(out, some[i : i + 1], materialize_grads=True)
            torch.testing.assert_close(found, expected[i])


def test_gradcheck_and_opcheck(device):
    size = SIZES[1]
    others = (None, 1, "cosine", "both", 0, False, 1e-5, 1e-6, torch.float64)
    operands = [*maps_of(size, torch.float64, device), *parameters_of(size, torch.float64, 1, device)]
    leaves = [operand.requires_grad_() for operand in operands]
    assert torch.autograd.gradcheck(joined(library.tree_blocks, *others), leaves, fast_mode=True)
    torch.library.opcheck(library.tree_blocks.default, (*leaves[:2], leaves[2:], *others))


def test_second_derivatives_raise(device):
    x, normed = maps_of(SIZES[1], torch.float64, device)
    x.requires_grad_()
    out, _ = grootvl_ops.tree_blocks(x, normed.requires_grad_(), blocks_of(SIZES[1], torch.float64, 1, device))
    for gradient in torch.autograd.grad(out.square().sum(), (x, normed), create_graph=True):
        with pytest.raises(RuntimeError, match="differentiated once"):
            gradient.sum().backward(retain_graph=True)


def test_transforms(device):
    x, normed = maps_of(SIZES[1], torch.float64, device)
    blocks = blocks_of(SIZES[1], torch.float64, 2, device)
    leaf = normed.clone().requires_grad_()
    (expected,) = torch.autograd.grad(grootvl_ops.tree_blocks(x, leaf, blocks)[1].square().sum(), leaf)
    found = torch.func.grad(lambda n: grootvl_ops.tree_blocks(x, n, blocks)[1].square().sum())(normed)
    torch.testing.assert_close(found, expected)


def test_no_blocks(device):
    x, normed = maps_of(SIZES[1], torch.float32, device)
    for found, given in zip(grootvl_ops.tree_blocks(x, normed, []), (x, normed), strict=True):
        assert torch.equal(found, given)


def test_refuses(device):
    size = SIZES[2]
    x, normed = maps_of(size, torch.float32, device)
    (block,) = blocks_of(size, torch.float32, 1, device)
    for name, bad in (
        ("x and normed", {"normed": normed[:1]}),
        ("x and normed", {"x": x[0], "normed": normed[0]}),
        ("metric", {"metric": "chebyshev"}),
        ("direction", {"direction": "sideways"}),
        ("root", {"root": size[1] * size[2]}),
        ("factors", {"factors": torch.ones(3, 2, device=device)}),
        ("factors", {"factors": torch.ones(2, 2, device=device, requires_grad=True)}),
        ("x_proj", {"blocks": [block._replace(x_proj=block.x_proj[1:])]}),
        ("dt_weight", {"blocks": [block._replace(dt_weight=block.dt_bias)]}),
        ("out_proj", {"blocks": [block._replace(out_proj=block.out_proj[:, 1:])]}),
        ("A_log", {"blocks": [block._replace(A_log=block.A_log[1:])]}),
        ("h_weight", {"blocks": [block._replace(h_weight=block.h_weight[1:])]}),
        ("weight", {"blocks": [block._replace(norm_weight=block.norm_weight[1:])]}),
    ):
        with pytest.raises((ValueError, RuntimeError), match=name):
            grootvl_ops.tree_blocks(**{"x": x, "normed": normed, "blocks": [block], **bad})
    with pytest.raises(ValueError, match="parameters must be 20 of each block, got 3"):
        library.tree_blocks(x, normed, list(block[:3]), None, 1, "cosine", "both", 0, False, 1e-5, 1e-6, x.dtype)

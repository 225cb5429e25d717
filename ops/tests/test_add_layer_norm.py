"""The sum with its LayerNorm against its definition in float64, differentiated by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_selective_scan import TOLERANCE, as_columns, assert_near
from torch import Tensor

import grootvl_ops

library = torch.ops.grootvl_ops
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Of the map, of the branch, and of the norm.
DTYPES = [
    (DOUBLE, DOUBLE, DOUBLE),
    (FLOAT, FLOAT, FLOAT),
    (FLOAT, FLOAT, HALF),
    (FLOAT, HALF, HALF),
    (FLOAT, HALF, FLOAT),
    (FLOAT, BFLOAT, BFLOAT),
    (FLOAT, BFLOAT, HALF),
    (HALF, HALF, HALF),
    (HALF, HALF, FLOAT),
    (HALF, FLOAT, HALF),
]


def defined(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    scaled = branch if factors is None else torch.stack([f * b for f, b in zip(factors, branch, strict=True)])
    return x + scaled, F.layer_norm(x + scaled, x.shape[-1:], weight, bias, 1e-6)


def results(function, operands: list[Tensor], grads: list[Tensor], *others) -> list[Tensor]:
    """Sum, norm, and the gradients for the operands."""
    operands = [operand.detach().requires_grad_() for operand in operands]
    out = function(*operands, *others)
    grads = [grad.to(o) for grad, o in zip(grads, out, strict=True)]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, operands, grads)]


def make_operands(size: tuple[int, ...], dtype: torch.dtype, branch_dtype: torch.dtype) -> list[Tensor]:
    parameters = torch.randn(2, size[-1], dtype=DOUBLE if dtype == DOUBLE else FLOAT)
    return [(torch.randn(size) + 3).to(dtype), torch.randn(size).to(branch_dtype), *parameters]


def compiled(dtype: torch.dtype | None):
    def function(*operands):
        *operands, factors = operands
        return grootvl_ops.add_layer_norm(*operands, 1e-6, dtype, factors)

    return function


@pytest.mark.parametrize("scaled", [False, True], ids=["", "factors"])
@pytest.mark.parametrize("dtype, branch_dtype, out_dtype", DTYPES, ids=str)
# One thread, parts of a warp, warps and whole blocks for a pixel; words of one to five vectors.
@pytest.mark.parametrize(
    "size",
    [(1, 2), (2, 3, 5), (2, 5, 7, 80), (3, 7, 96), (300, 9, 40), (2, 3, 640), (2, 3, 1021), (2, 1, 2560)],
    ids=str,
)
def test_against_the_definition(device, size, dtype, branch_dtype, out_dtype, scaled, poisoned_memory):
    operands = make_operands(size, dtype, branch_dtype)
    factors = torch.rand(size[0]) * (torch.arange(size[0]) % 3 > 0) if scaled else None
    grads = [torch.randn(size).to(kind) for kind in (torch.promote_types(dtype, branch_dtype), out_dtype)]
    expected = results(
        defined,
        [o.double() for o in operands],
        [g.double() for g in grads],
        factors if factors is None else factors.double(),
    )
    on_device = factors if factors is None else factors.to(device)
    actual = results(compiled(out_dtype), [o.to(device) for o in operands], [g.to(device) for g in grads], on_device)
    assert [a.dtype for a in actual] == [
        grads[0].dtype,
        out_dtype,
        dtype,
        branch_dtype,
        *(o.dtype for o in operands[2:]),
    ]
    assert_near(actual, expected, min((dtype, branch_dtype, out_dtype), key=lambda kind: -TOLERANCE[kind]))
    again = results(compiled(out_dtype), [o.to(device) for o in operands], [g.to(device) for g in grads], on_device)
    assert all(map(torch.equal, actual, again))


@pytest.mark.parametrize("asked", [0, 1], ids=["sum", "norm"])
@pytest.mark.parametrize("branch_dtype", [FLOAT, HALF], ids=str)
def test_gradients_of_one_result(device, asked, branch_dtype):
    operands = make_operands((2, 9, 24), FLOAT, branch_dtype)
    expected_in = [o.double().requires_grad_() for o in operands]
    actual_in = [o.to(device).requires_grad_() for o in operands]
    grad = torch.randn(2, 9, 24)
    expected = torch.autograd.grad(
        defined(*expected_in, None)[asked], expected_in, grad.double(), materialize_grads=True
    )
    out = grootvl_ops.add_layer_norm(*actual_in, 1e-6)[asked]
    actual = torch.autograd.grad(out, actual_in, grad.to(device), materialize_grads=True)
    assert_near(list(actual), list(expected), branch_dtype)


@pytest.mark.parametrize("number", range(4))
def test_operands_need_not_be_contiguous_or_aligned(device, number):
    operands = [o.to(device) for o in make_operands((2, 9, 40), FLOAT, HALF)]
    expected = grootvl_ops.add_layer_norm(*operands)
    storage = torch.empty(operands[number].numel() + 1, dtype=operands[number].dtype, device=device)
    shifted = storage[1:].view_as(operands[number]).copy_(operands[number])
    views = (
        [as_columns(operands[number])] if operands[number].dim() > 1 else [operands[number].repeat_interleave(2)[::2]]
    )
    for view in (shifted, *views):
        actual = grootvl_ops.add_layer_norm(*operands[:number], view, *operands[number + 1 :])
        torch.testing.assert_close(actual, expected)


def test_channels_beyond_one_pass(device):
    operands = make_operands((2, 2, 4104), FLOAT, FLOAT)
    grads = list(torch.randn(2, 2, 2, 4104))
    expected = results(defined, [o.double() for o in operands], [g.double() for g in grads], torch.tensor([2.0, 0.5]))
    factors = torch.tensor([2.0, 0.5], device=device)
    actual = results(compiled(None), [o.to(device) for o in operands], [g.to(device) for g in grads], factors)
    assert_near(actual, expected, FLOAT)


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT, HALF], ids=str)
def test_gradcheck_and_opcheck(device, dtype):
    operands = [o.to(device) for o in make_operands((2, 4, 24), dtype, HALF if dtype == FLOAT else dtype)]
    for factors in (None, torch.tensor([0.0, 1.25], device=device)):
        total, normed, statistics = library.add_layer_norm(*operands, 1e-5, None, factors)
        saved = (total, operands[2], statistics, factors, operands[1].dtype)
        for grad_sum in (None, total):
            torch.library.opcheck(library.add_layer_norm_backward.default, (normed, grad_sum, *saved))
        leaves = [operand.clone().requires_grad_() for operand in operands]
        torch.library.opcheck(library.add_layer_norm.default, (*leaves, 1e-5, None, factors))
        if dtype == DOUBLE:
            assert torch.autograd.gradcheck(lambda *o, f=factors: grootvl_ops.add_layer_norm(*o, factors=f), leaves)


def test_under_autocast(device):
    operands = [o.to(device) for o in make_operands((2, 9, 24), FLOAT, FLOAT)]
    expected = grootvl_ops.add_layer_norm(*operands)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(grootvl_ops.add_layer_norm(*operands), expected)


def test_nothing_to_do(device):
    for size in ((0, 5, 3), (2, 0, 3)):
        operands = [o.to(device) for o in make_operands(size, FLOAT, HALF)]
        found = results(compiled(HALF), operands, [operands[0], operands[0]], torch.ones(size[0], device=device))
        assert found[0].shape == size and not found[4].any() and not found[5].any()


def test_refuses(device):
    x, ones = torch.randn(2, 5, device=device), torch.ones(5, device=device)
    for name, bad in (
        ("branch", x[:, :4]),
        ("branch", x.long()),
        ("weight", ones[:4]),
        ("bias", ones.to("meta")),
        ("factors", ones),
        ("factors", ones[:2].clone().requires_grad_()),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            grootvl_ops.add_layer_norm(**{"x": x, "branch": x, "weight": ones, "bias": ones, name: bad})
    with pytest.raises(ValueError, match="factors"):
        grootvl_ops.add_layer_norm(ones, ones, ones, ones, factors=ones[:1])

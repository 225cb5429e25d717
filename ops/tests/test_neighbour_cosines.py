"""Cosines of neighbouring vectors against torch.nn.functional in float64."""

from __future__ import annotations

import oracles
import pytest
import torch

import grootvl_ops

TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 3e-6}


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 3), (3, 17, 16), (1, 40, 321), (2, 9, 1536)], ids=str)
@pytest.mark.parametrize("neighbours", [1, 3, 4, 9])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_direct_formula(ops, device, shape, neighbours, dtype, poisoned_memory):
    x = torch.randn(shape, device=device).to(dtype)
    cosines = ops.neighbour_cosines(x, neighbours)
    assert cosines.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(cosines.cpu().double(), oracles.neighbour_cosines(x, neighbours), **tolerance)


def test_strides_do_not_matter(ops, device):
    data = torch.randn(4, 11, 48, device=device)
    for view in (
        data[::2, :, 16:32],
        data[:, 1:, 1:18],
        data[:, ::3, ::2],
        data.permute(1, 0, 2),
        data[:1].expand(3, -1, -1),
    ):
        expected = ops.neighbour_cosines(view.clone(memory_format=torch.contiguous_format), 3)
        torch.testing.assert_close(ops.neighbour_cosines(view, 3), expected, rtol=1e-6, atol=1e-6)


def test_nothing_to_do(ops, device):
    assert ops.neighbour_cosines(torch.zeros(0, 3, 4, device=device), 2).shape == (0, 3, 2)
    assert ops.neighbour_cosines(torch.zeros(2, 0, 4, device=device), 2).shape == (2, 0, 2)


def test_zero_vectors_have_cosine_zero(ops, device):
    x = torch.randn(1, 6, 5, device=device)
    x[:, 3] = 0
    cosines = ops.neighbour_cosines(x, 2)[0]
    assert not cosines[3].any() and cosines[4, 0] == cosines[5, 1] == 0 and cosines[5, 0] != 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_vectors_reach_their_own_cosines_only(ops, device, value):
    x = torch.randn(1, 7, 5, device=device)
    expected = ops.neighbour_cosines(x, 2)[0]
    x[0, 3, 1] = value
    found = ops.neighbour_cosines(x, 2)[0]
    touched = torch.zeros(7, 2, dtype=torch.bool, device=device)
    touched[3] = touched[4, 0] = touched[5, 1] = True
    assert found[touched].isnan().all()
    torch.testing.assert_close(found[~touched], expected[~touched], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 19, 64])
def test_equal_vectors_give_equal_cosines(ops, device, channels):
    """Bit for bit: else rounding, and not the rule for ties, would choose the tree of a constant text."""
    cosines = ops.neighbour_cosines(torch.randn(channels, device=device).expand(2, 20, channels), 3)
    assert torch.equal(cosines[:, 3:], cosines[:1, 3:4, :1].expand(2, 17, 3))


def test_vmap_equals_a_loop(device):
    x = torch.randn(3, 2, 5, 4, device=device)
    found = torch.func.vmap(lambda each: grootvl_ops.neighbour_cosines(each, 2))(x)
    assert torch.equal(found, torch.stack([grootvl_ops.neighbour_cosines(each, 2) for each in x]))


def test_not_differentiable(device):
    assert not grootvl_ops.neighbour_cosines(torch.randn(1, 3, 2, device=device, requires_grad=True), 1).requires_grad


@pytest.mark.parametrize(
    "x, neighbours, error, message",
    [
        (torch.zeros(3, 4), 1, ValueError, r"x must be \(B, L, D\) with D > 0, got \[3, 4\]"),
        (torch.zeros(2, 3, 0), 1, ValueError, r"x must be \(B, L, D\) with D > 0, got \[2, 3, 0\]"),
        (torch.zeros(2, 3, 4), 0, ValueError, "neighbours must be at least 1, got 0"),
        (torch.zeros(2, 3, 4, dtype=torch.int32), 1, TypeError, "x must be floating point, got torch.int32"),
    ],
)
def test_wrong_arguments(x, neighbours, error, message):
    with pytest.raises(error, match=message):
        grootvl_ops.neighbour_cosines(x, neighbours)

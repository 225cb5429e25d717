"""Edge weights against torch.nn.functional in float64."""

from __future__ import annotations

import oracles
import pytest
import torch

import grootvl_ops
from grootvl_ops import METRICS

SHAPES = [(1, 1, 1, 3), (2, 1, 7, 4), (2, 9, 1, 5), (1, 2, 2, 1), (2, 5, 7, 33), (3, 8, 8, 16), (1, 3, 4, 321)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 3e-6}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_direct_formula(ops, device, metric, shape, dtype):
    features = torch.randn(shape, device=device).to(dtype)
    weights = ops.edge_weights(features, metric)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = oracles.edge_weights(features, metric)
    assert weights.shape == expected.shape
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("height, width", [(1, 1), (1, 6), (6, 1), (4, 5)])
def test_grid_edges_are_numbered_vertical_first(height, width):
    expected = torch.tensor(oracles.pixel_pairs(height, width), dtype=torch.int64).view(-1, 2)
    assert torch.equal(grootvl_ops.grid_edges(height, width), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_strides_do_not_matter(ops, device, metric):
    features = torch.randn(2, 6, 5, 7, device=device)
    expected = ops.edge_weights(features, metric)
    channels_first = features.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    spread = torch.randn(2, 12, 5, 21, device=device)
    spread[:, ::2, :, ::3] = features
    for view in (channels_first, spread[:, ::2, :, ::3], features.flip(0).flip(0)):
        torch.testing.assert_close(ops.edge_weights(view, metric), expected, rtol=1e-6, atol=1e-6)
    one_map = features[:1].expand(4, -1, -1, -1)
    torch.testing.assert_close(ops.edge_weights(one_map, metric), expected[:1].expand(4, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_empty_batch(ops, device, metric):
    assert ops.edge_weights(torch.zeros(0, 3, 4, 5, device=device), metric).shape == (0, 17)


def test_zero_vectors_have_cosine_zero(ops, device):
    features = torch.randn(1, 4, 4, 6, device=device)
    features[:, 1, 1] = 0
    weights = ops.edge_weights(features, "cosine").cpu()[0]
    for weight, (i, j) in zip(weights, oracles.pixel_pairs(4, 4), strict=True):
        if 5 in (i, j):
            assert weight == 1.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_features_reach_their_own_edges_only(ops, device, metric, value):
    features = torch.randn(1, 4, 5, 6, device=device)
    expected = ops.edge_weights(features, metric).cpu()[0]
    features[0, 2, 3, 1] = value
    weights = ops.edge_weights(features, metric).cpu()[0]
    touched = torch.tensor([13 in pair for pair in oracles.pixel_pairs(4, 5)])
    torch.testing.assert_close(weights[~touched], expected[~touched], rtol=1e-6, atol=1e-6)
    direct = oracles.edge_weights(features, metric)[0]
    torch.testing.assert_close(weights[touched], direct[touched].float(), equal_nan=True)
    assert not weights[touched].isfinite().any()


@pytest.mark.parametrize("metric", METRICS)
def test_large_and_small_half_features(ops, device, metric):
    features = torch.randn(1, 5, 5, 64, device=device).clamp(-2, 2)
    for scale in (3e4, 1e-3):  # squares leave the range of float16, not of float32
        scaled = (features * scale).half()
        weights = ops.edge_weights(scaled, metric).cpu().double()
        torch.testing.assert_close(weights, oracles.edge_weights(scaled, metric), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels", [3, 19, 64])
def test_equal_pixels_give_equal_weights(ops, device, metric, channels):
    """Bit for bit: else rounding, and not the rule for ties, would choose the tree of a constant map."""
    weights = ops.edge_weights(torch.randn(channels, device=device).expand(2, 7, 9, channels), metric)
    assert torch.equal(weights, weights[:1, :1].expand_as(weights))


@pytest.mark.parametrize("metric", METRICS)
def test_deterministic_over_runs_and_threads(ops, device, metric, restore_threads):
    features = torch.randn(3, 40, 37, 29, device=device)
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(ops.edge_weights(features, metric))
    assert all(torch.equal(runs[0], run) for run in runs)


def test_nothing_is_read_before_it_is_written(device, poisoned_memory):
    features = torch.randn(2, 6, 7, 5, device=device)
    for metric in METRICS:
        weights = grootvl_ops.edge_weights(features, metric).cpu().double()
        torch.testing.assert_close(weights, oracles.edge_weights(features, metric), rtol=3e-6, atol=3e-6)


def test_not_differentiable(device):
    features = torch.randn(1, 3, 3, 2, device=device, requires_grad=True)
    assert not grootvl_ops.edge_weights(features).requires_grad


@pytest.mark.parametrize(
    "features, metric, error, message",
    [
        (torch.zeros(3, 4, 5), "cosine", ValueError, r"\(B, H, W, C\) or \(B, T, H, W, C\), got \[3, 4, 5\]"),
        (torch.zeros(1, 0, 4, 5), "cosine", ValueError, r"at least one pixel and one channel, got \[1, 0, 4, 5\]"),
        (torch.zeros(1, 4, 0, 5), "cosine", ValueError, r"at least one pixel and one channel, got \[1, 4, 0, 5\]"),
        (torch.zeros(1, 4, 5, 0), "cosine", ValueError, r"at least one pixel and one channel, got \[1, 4, 5, 0\]"),
        (torch.zeros(1, 3, 4, 5).int(), "cosine", TypeError, r"features must be floating point, got .*int32"),
        (torch.zeros(1, 3, 4, 5).cfloat(), "cosine", TypeError, r"features must be floating point, got .*complex64"),
        (torch.zeros(1, 3, 4, 5), "chebyshev", ValueError, r"'cosine', 'euclidean' or 'manhattan', got 'chebyshev'"),
    ],
)
def test_errors(device, features, metric, error, message):
    with pytest.raises(error, match=message):
        grootvl_ops.edge_weights(features.to(device), metric)
    with pytest.raises(error, match=message):
        grootvl_ops.build_tree(features.to(device), metric)


@pytest.mark.parametrize(
    "features, metric",
    [
        (torch.zeros(3, 4, 5), "cosine"),
        (torch.zeros(1, 0, 4, 5), "cosine"),
        (torch.zeros(1, 3, 4, 5).int(), "cosine"),
        (torch.zeros(1, 3, 4, 5), "chebyshev"),
    ],
)
def test_kernels_check_what_they_are_called_with(compiled_device, features, metric):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.grootvl_ops.edge_weights(features.to(compiled_device), metric)

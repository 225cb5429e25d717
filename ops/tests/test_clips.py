"""Trees of clips, (B, T, H, W, C): grids of six neighbours."""

from __future__ import annotations

import oracles
import pytest
import torch

import grootvl_ops
from grootvl_ops import METRICS, reference

SIZES = [(1, 3, 4), (2, 3, 4), (4, 1, 1), (5, 1, 3), (3, 4, 1), (6, 7, 5)]


def voxel_pairs(frames: int, height: int, width: int) -> list[tuple[int, int]]:
    """All edges in time, then all vertical ones, then all horizontal ones, each in the order of their first ends."""
    pairs = []
    for dt, dy, dx in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        for t in range(frames - dt):
            for y in range(height - dy):
                for x in range(width - dx):
                    first = (t * height + y) * width + x
                    pairs.append((first, first + (dt * height + dy) * width + dx))
    return pairs


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_edges_are_numbered_axis_by_axis(size):
    frames, height, width = size
    assert grootvl_ops.grid_edges(height, width, frames).tolist() == [list(pair) for pair in voxel_pairs(*size)]
    if frames == 1:
        assert torch.equal(grootvl_ops.grid_edges(height, width), grootvl_ops.grid_edges(height, width, 1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weights(device, size, metric):
    features = torch.randn(2, *size, 6)
    pairs = torch.tensor(voxel_pairs(*size)).view(-1, 2)
    f, g = (features.double().flatten(1, 3)[:, ends] for ends in pairs.T)
    if metric == "cosine":
        expected = torch.exp(-torch.nn.functional.cosine_similarity(f, g, dim=-1))
    else:
        expected = torch.linalg.vector_norm(f - g, ord={"euclidean": 2, "manhattan": 1}[metric], dim=-1)
    for weights in (
        grootvl_ops.edge_weights(features.to(device), metric),
        reference.edge_weights(features.to(device), metric),
    ):
        torch.testing.assert_close(weights.double().cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("root", ["first", "last"])
@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_trees(device, size, kind, root):
    frames, height, width = size
    pairs = voxel_pairs(*size)
    weights = torch.rand(2, len(pairs)) if kind == "random" else torch.randint(0, 2, (2, len(pairs))).float()
    root = 0 if root == "first" else frames * height * width - 1
    tree = grootvl_ops.build_tree_from_grid(weights.to(device), height, width, root, frames)
    oracles.check_tree(tree, pairs, weights, root)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_features_to_trees(device, dtype):
    features = torch.randn(2, 4, 6, 5, 8).to(device, dtype)
    weights = grootvl_ops.edge_weights(features)
    oracles.check_tree(grootvl_ops.build_tree(features, root=7), voxel_pairs(4, 6, 5), weights, root=7)


def test_a_clip_of_one_frame_is_a_map(device):
    features = torch.randn(2, 6, 5, 8, device=device)
    clip, image = grootvl_ops.build_tree(features.unsqueeze(1)), grootvl_ops.build_tree(features)
    assert all(torch.equal(a, b) for a, b in zip(clip, image, strict=True))


def test_strides_do_not_matter(device):
    features = torch.randn(2, 8, 3, 6, 5, device=device)  # (B, C, T, H, W)
    view = features.permute(0, 2, 3, 4, 1)
    for metric in METRICS:
        expected = grootvl_ops.edge_weights(view.contiguous(), metric)
        torch.testing.assert_close(grootvl_ops.edge_weights(view, metric), expected)


def test_compiled(device):
    features = torch.randn(2, 3, 4, 5, 6, device=device)
    compiled = torch.compile(grootvl_ops.build_tree, fullgraph=True, backend="aot_eager")
    found, expected = compiled(features), grootvl_ops.build_tree(features)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted(device):
    features = torch.randn(2, 3, 4, 5, 6, device=device)
    found, expected = torch.jit.script(grootvl_ops.build_tree)(features), grootvl_ops.build_tree(features)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_errors(device):
    with pytest.raises(ValueError, match="at least one pixel"):
        grootvl_ops.build_tree(torch.randn(2, 0, 4, 5, 6, device=device))
    with pytest.raises(ValueError, match=r"\(B, H, W, C\) or \(B, T, H, W, C\)"):
        grootvl_ops.build_tree(torch.randn(2, 1, 3, 4, 5, 6, device=device))
    with pytest.raises(ValueError, match="root must be from 0 to 119"):
        grootvl_ops.build_tree(torch.randn(2, 6, 4, 5, 6, device=device), root=120)
    with pytest.raises(ValueError, match=r"weights must be \(B, 46\)"):
        grootvl_ops.build_tree_from_grid(torch.rand(1, 45, device=device), 3, 4, frames=2)
    with pytest.raises(ValueError, match="at least one pixel"):
        grootvl_ops.build_tree_from_grid(torch.rand(1, 45, device=device), 3, 4, frames=0)

"""A few hundred random trees through each kernel of the scan, for a library with assertions (GROOTVL_CHECKED=1)."""

from __future__ import annotations

import random

import pytest
import torch
from tree_makers import SHAPES, make_tree, shuffled, tree_of

import grootvl_ops
from grootvl_ops import DIRECTIONS, _loading


@pytest.fixture(autouse=True)
def _checked_library(cuda_kernels: str) -> None:
    if not _loading.built().get("checked"):
        pytest.skip("the compiled library has no assertions: build it with GROOTVL_CHECKED=1")


def random_tree(num_vertices: int, seed: int) -> list[int]:
    """Parents drawn from the last few vertices, so that depths range from those of a path to those of a bush."""
    generator = random.Random(seed)
    reach = generator.choice([1, 2, 5, 50, num_vertices])
    parent = [0] + [generator.randrange(max(0, vertex - reach), vertex) for vertex in range(1, num_vertices)]
    return shuffled(parent, generator)


@pytest.mark.parametrize("num_vertices", [7, 49, 300, 3000, 20_000])
def test_random_trees(num_vertices):
    """One run, several runs, and several sections; no assertion fails, and results are finite."""
    for seed in range(60 if num_vertices < 5000 else 12):
        tree = tree_of([random_tree(num_vertices, 1000 * seed + item) for item in range(2)], "cuda")
        x = torch.randn(2, num_vertices, 5, device="cuda", requires_grad=True)
        for direction in DIRECTIONS:
            h = grootvl_ops.tree_scan(x, x.sigmoid(), tree, direction)
            y = grootvl_ops.selective_scan(x, x, None, None, x[0, 0], x[..., 0], tree, direction)
            (gradient,) = torch.autograd.grad((h + y).square().sum(), x)
            assert h.isfinite().all() and gradient.isfinite().all()
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    for num_vertices in (9, 700, 20_000):
        tree = make_tree(shape, 2, num_vertices, "cuda")
        x = torch.randn(2, num_vertices, 33, device="cuda", requires_grad=True)
        for direction in DIRECTIONS:
            grootvl_ops.tree_scan(x, x.sigmoid(), tree, direction).sum().backward()
    torch.cuda.synchronize()


def test_grids():
    for size in ((2, 56, 56), (1, 200, 336)):
        tree = grootvl_ops.build_tree(torch.randn(*size, 8, device="cuda"))
        x = torch.randn(size[0], size[1] * size[2], 40, device="cuda", requires_grad=True)
        for direction in DIRECTIONS:
            grootvl_ops.tree_scan(x, x.sigmoid(), tree, direction).sum().backward()
    torch.cuda.synchronize()


def test_a_damaged_tree_is_refused():
    tree = make_tree("binary", 2, 500, "cuda")
    tree.subtree_size[1, 4] += 1
    x = torch.randn(2, 500, 5, device="cuda")
    with pytest.raises(ValueError, match="subtree_size must count"):
        grootvl_ops.tree_scan(x, x, tree)

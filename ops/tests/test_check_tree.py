"""Trees given by hand: what `check_tree`, the CPU's scans and the reference refuse."""

from __future__ import annotations

import os
import subprocess
import sys

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_makers import SHAPES, make_tree, top_down, tree_of

import grootvl_ops
from grootvl_ops import DIRECTIONS, Tree, reference


def is_tree(parent: list[int], order: list[int], size: list[int]) -> bool:
    """By definition: parents lead to a root, and the other fields are the ones that follow from them."""
    length = len(parent)
    if not all(0 <= above < length for above in parent):
        return False
    found = top_down(parent)
    if len(found) != length:  # a cycle that no root leads to
        return False
    expected = oracles.parent_to_tree(parent, found)
    return (parent, order, size) == expected


@pytest.mark.parametrize("num_vertices", [6, 40, 500])
@pytest.mark.parametrize("shape", SHAPES)
def test_trees_pass(device, shape, num_vertices):
    grootvl_ops.check_tree(make_tree(shape, 3, num_vertices, device))


def test_trees_that_are_built_pass(device):
    grootvl_ops.check_tree(grootvl_ops.build_tree(torch.randn(2, 13, 17, 5, device=device), root=30))
    grootvl_ops.check_tree(grootvl_ops.build_tree(torch.zeros(2, 13, 17, 5, device=device)))
    grootvl_ops.check_tree(grootvl_ops.path_tree(torch.randperm(50, device=device)))
    grootvl_ops.check_tree(grootvl_ops.build_tree(torch.randn(1, 1, 1, 5, device=device)))
    grootvl_ops.check_tree(Tree(*(torch.empty(0, 5, dtype=torch.int32, device=device) for _ in range(3))))


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_change_is_found(device, data):
    """Trees with some values replaced: `check_tree` raises just where the definition is broken."""
    length = data.draw(st.integers(2, 9))
    parent = [0] + [data.draw(st.integers(0, vertex - 1)) for vertex in range(1, length)]
    fields = [list(field) for field in oracles.parent_to_tree(parent, list(range(length)))]
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(st.sampled_from(fields))
        kind = data.draw(st.sampled_from(["replace", "swap"]))
        i, j = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, length - 1))
        if kind == "swap":
            field[i], field[j] = field[j], field[i]
        else:
            field[i] = data.draw(st.sampled_from([-(2**31), -1, *range(length + 2), 2**31 - 1]))
    tree = Tree(*(torch.tensor([field, field], dtype=torch.int32, device=device) for field in fields))
    roots = sum(above == vertex for vertex, above in enumerate(fields[0]))
    if roots > 1:  # a forest may list its trees in any order, of which the definition here knows one
        return
    if is_tree(*fields):
        grootvl_ops.check_tree(tree)
    else:
        with pytest.raises(ValueError, match="not a tree: .* of image 0"):
            grootvl_ops.check_tree(tree)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "parent, order",
    [
        ([0, 2, 1], [0, 1, 2]),  # a cycle beside the root
        ([1, 2, 0], [0, 1, 2]),  # no root
        ([0, 0, 1], [0, 2, 1]),  # a child before its parent
        ([0, 0, 0], [0, 1, 1]),  # a vertex twice
        ([0, 0, -1], [0, 1, 2]),
        ([0, 0, 3], [0, 1, 2]),
        ([0, 0, 0], [0, 1, -2]),
        ([0, 0, 0], [0, 1, 3]),
    ],
    ids=str,
)
def test_scans_on_the_cpu_refuse_what_is_no_tree(parent, order, direction):
    fields = [torch.tensor([field], dtype=torch.int32) for field in (parent, order, [3, 2, 1])]
    x = torch.rand(1, 3, 2)
    for scan in (torch.ops.grootvl_ops.tree_scan, reference.tree_scan):
        with pytest.raises(ValueError, match="must hold each vertex|must come before it"):
            scan(x, x, *fields, direction)
    for backward in (torch.ops.grootvl_ops.tree_scan_backward, reference.tree_scan_backward):
        with pytest.raises(ValueError, match="must hold each vertex|must come before it"):
            backward(x, x, x, *fields, direction)
    with pytest.raises(ValueError, match="must hold each vertex|must come before it"):
        grootvl_ops.selective_scan(x, x, None, None, x[0, 0], x[..., 0], Tree(*fields), direction)


def test_the_message_names_image_and_vertex(device):
    parent, order, size = (field.clone() for field in make_tree("binary", 3, 9, device))
    size[1, 4] += 1
    with pytest.raises(ValueError, match="subtree_size must count .* at vertex [0-9]+ of image 1"):
        grootvl_ops.check_tree(Tree(parent, order, size))


def test_wrong_fields(device):
    tree = make_tree("binary", 3, 9, device)
    with pytest.raises(TypeError, match="order must be int32, got torch.int64"):
        grootvl_ops.check_tree(tree._replace(order=tree.order.long()))
    with pytest.raises(ValueError, match="must all be"):
        grootvl_ops.check_tree(tree._replace(subtree_size=tree.subtree_size[:, :8]))
    with pytest.raises(ValueError, match="on one device"):
        grootvl_ops.check_tree(tree._replace(parent=tree.parent.to("meta")))


@pytest.mark.parametrize("value, refuses", [("1", True), ("0", False), (None, False)])
def test_the_variable_has_every_scan_check(device, value, refuses):
    program = f"""
import torch, grootvl_ops
tree = grootvl_ops.path_tree(torch.arange(4, device={device!r}))
tree.subtree_size[0, 2] = 1
x = torch.rand(1, 4, 2, device={device!r})
try:
    grootvl_ops.tree_scan(x, x, tree)
    print("ran")
except ValueError as error:
    print(error)
"""
    environment = {name: text for name, text in os.environ.items() if name != "GROOTVL_CHECK_TREES"}
    if value is not None:
        environment["GROOTVL_CHECK_TREES"] = value
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert ("subtree_size must count" in done.stdout) == refuses, done.stdout + done.stderr
    assert ("ran" in done.stdout) != refuses


def test_a_forest_may_list_its_trees_in_any_order(device):
    """As CUDA lists the parts of an unconnected graph: the part of the root first."""
    tree = tree_of([[0, 0, 2, 2, 2]], device)
    grootvl_ops.check_tree(tree)
    grootvl_ops.check_tree(tree._replace(order=torch.tensor([[2, 3, 4, 0, 1]], dtype=torch.int32, device=device)))
    with pytest.raises(ValueError, match="preorder"):
        grootvl_ops.check_tree(tree._replace(order=torch.tensor([[2, 0, 3, 4, 1]], dtype=torch.int32, device=device)))

"""The claims of csrc/cuda/scan/scan.cuh about runs and sections, and that scans put together from them are right.

They are tested on a model of the kernels in plain Python (plan_model.py), so that they need no GPU.
"""

from __future__ import annotations

import math
import random

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_model import Node, Piece, Plan, Stack, Sweeps, cut, make_plan, solve
from tree_makers import SHAPES, make_tree, shuffled, tree_of

import grootvl_ops
from grootvl_ops import DIRECTIONS, Tree, reference

# Lengths of runs and of sections.
LENGTHS = [(1, 4), (2, 4), (4, 32), (8, 16), (16, 1024), (1024, 1024)]
each_length = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
any_tree = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def plan_of(tree: Tree, lengths: tuple[int, int], image: int = 0) -> Plan:
    return make_plan(*(field[image].tolist() for field in tree), *lengths)


@st.composite
def drawn_trees(draw: st.DrawFn) -> Tree:
    """Trees of one vertex to 60, deep and wide ones, and forests."""
    num_vertices, forest = draw(st.integers(1, 60)), draw(st.booleans())
    reach = draw(st.integers(1, num_vertices))  # how much earlier a parent may be: small numbers make deep trees
    parent = [0]
    for vertex in range(1, num_vertices):
        parent.append(draw(st.integers(max(0, vertex - reach), vertex if forest else vertex - 1)))
    return tree_of([shuffled(parent, random.Random(num_vertices))])


def check_pieces(elements: list[Node], pieces: list[Piece], length: int, num_vertices: int) -> None:
    assert [piece.begin for piece in pieces] == [0] + [piece.end for piece in pieces[:-1]]
    assert pieces[-1].end == len(elements)
    assert len(pieces) <= 2 * (num_vertices // length) + 2
    piece_of = [p for p, piece in enumerate(pieces) for _ in piece.places]
    for p, piece in enumerate(pieces):
        # Only the last element has its parent in another piece.
        assert all(piece_of[elements[i].above] == p for i in piece.places[:-1])
        # All pieces below hang on the bottom.
        hang_on = {elements[other.end - 1].above for other in pieces[:p]}
        assert {i for i in hang_on if piece_of[i] == p} <= {piece.bottom}
        # The chain is the path from the bottom to the end.
        assert [elements[i].above for i in piece.chain[:-1]] == list(piece.chain[1:])
        if piece.chain:
            assert piece.chain[-1] == piece.end - 1
        else:  # only at the end of the postorder, of a small tree
            assert p == len(pieces) - 1
            assert elements[-1].root
            assert elements[-1].size < length


def check_plan(tree: Tree, lengths: tuple[int, int]) -> None:
    run_length, section_length = lengths
    plan = plan_of(tree, lengths)
    num_vertices = tree.parent.shape[1]
    check_pieces(plan.vertices, plan.runs, run_length, num_vertices)
    check_pieces(plan.run_nodes, plan.sections, section_length, num_vertices)
    # A section is what a run of that length would be.
    assert [plan.runs[section.end - 1].end for section in plan.sections] == [
        run.end for run in cut(plan.vertices, section_length)
    ]


def check_stack(stack: Stack, tree: Tree, lengths: tuple[int, int]) -> None:
    """Within the capacity that launch_scan.cuh asks of stack_capacity() in stack.cuh."""
    num_vertices, run_length = tree.parent.shape[1], lengths[0]
    several_runs = run_length <= num_vertices
    largest = max(run_length, num_vertices // run_length) if several_runs else num_vertices
    capacity = 3 + math.ceil(math.log2(largest))
    assert stack.highest <= capacity - 2  # an empty stack holds one, and one is to spare
    # A walk over a run whose end is light, or whose first leaf is that of a path, ends with such a pop.
    assert stack.most_unmatched <= 1


def operands(num_vertices: int, channels: int = 2) -> list[np.ndarray]:
    """x, decay and the gradient of the result."""
    generator = np.random.default_rng(num_vertices)
    x, grad = generator.standard_normal((2, num_vertices, channels))
    return [x, generator.uniform(0, 1.1, (num_vertices, channels)), grad]


def check_scans(tree: Tree, lengths: tuple[int, int]) -> None:
    num_vertices = tree.parent.shape[1]
    x, decay, grad = operands(num_vertices)
    batch = [torch.from_numpy(operand)[None] for operand in (x, decay, grad)]
    for direction in DIRECTIONS:
        sweeps = Sweeps(plan_of(tree, lengths), decay)
        found = (sweeps.scan(x, direction), *sweeps.gradients(x, grad, direction))
        expected = [
            oracles.message_gradients(*batch[:2], tree, batch[2], direction),
            (
                reference.tree_scan(*batch[:2], *tree, direction),
                *reference.tree_scan_backward(batch[2], *batch[:2], *tree, direction),
            ),
        ]
        if num_vertices <= 17:
            expected.append(oracles.dense_gradients(*batch[:2], tree, batch[2], direction))
        for results in expected:
            for name, result, target in zip(("h", "dx", "ddecay"), found, results, strict=True):
                np.testing.assert_allclose(result, target[0], rtol=1e-10, atol=1e-10, err_msg=f"{direction} {name}")
        check_stack(sweeps.stack, tree, lengths)


def check_formulas(tree: Tree, lengths: tuple[int, int]) -> None:
    """u_end = U + beta E and h_bottom = E + P + beta a_end m, whatever enters."""
    plan = plan_of(tree, lengths)
    x, decay, _ = operands(tree.parent.shape[1])
    generator = np.random.default_rng(0)
    for up in (True, False):
        vertices, runs, sections = Sweeps(plan, decay).summaries(x, up)
        for elements, of, pieces, summaries in (
            (plan.vertices, vertices, plan.runs, runs),
            (plan.run_nodes, runs, plan.sections, sections),
        ):
            for piece, summary in zip(pieces, summaries, strict=True):
                E, m = generator.standard_normal((2, x.shape[1]))
                if not up or piece.bottom is None:
                    E = np.zeros_like(E)
                values = solve(elements, of, piece, up, E, m)
                u_end = summary.U + summary.beta * E
                np.testing.assert_allclose(values.u_end[piece.end - 1], u_end, rtol=1e-10, atol=1e-10)
                if piece.bottom is not None:
                    h_bottom = E + summary.P + summary.beta * summary.a_end * m
                    np.testing.assert_allclose(values.h_bottom[piece.bottom], h_bottom, rtol=1e-10, atol=1e-10)


def check_joins(tree: Tree, lengths: tuple[int, int]) -> None:
    """E is the sum of a_end u_end over the runs that hang on a run, h_parent(end) is the h_bottom of the run above."""
    plan = plan_of(tree, lengths)
    x, decay, _ = operands(tree.parent.shape[1])
    for up in (True, False):
        sweeps = Sweeps(plan, decay)
        of_runs, of_sections = sweeps.joins(x, up)
        _, *summaries = sweeps.summaries(x, up)
        nodes_of = (plan.run_nodes, plan.section_nodes)
        for nodes, joined, of in zip(nodes_of, (of_runs, of_sections), summaries, strict=True):
            for p, node in enumerate(nodes):
                E = np.zeros(x.shape[1])
                for q, other in enumerate(nodes[:p]):
                    if up and other.above == p:
                        E += of[q].a_end * (of[q].U + of[q].beta * joined.E[q])
                np.testing.assert_allclose(joined.E[p], E, rtol=1e-10, atol=1e-10)
                h_above = np.zeros_like(E)
                if not node.root:
                    above, q = of[node.above], node.above
                    m = joined.h_above[q] - up * above.a_end * (above.U + above.beta * joined.E[q])
                    h_above = joined.E[q] + above.P + above.beta * above.a_end * m
                np.testing.assert_allclose(joined.h_above[p], h_above, rtol=1e-10, atol=1e-10)


def check_everything(tree: Tree, lengths: tuple[int, int]) -> None:
    check_plan(tree, lengths)
    check_formulas(tree, lengths)
    check_joins(tree, lengths)
    check_scans(tree, lengths)


@each_length
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, lengths):
    for num_vertices in (6, 17, 64, 110):
        check_everything(make_tree(shape, 1, num_vertices), lengths)


@each_length
@any_tree
@given(tree=drawn_trees())
def test_any_tree(tree, lengths):
    check_everything(tree, lengths)


@pytest.mark.parametrize("trees, num_vertices", [(12, 13), (40, 3), (9, 1)])
@pytest.mark.parametrize("lengths", [(1, 4), (2, 8), (4, 16), (2, 1024)], ids=str)
def test_forests_of_many_trees(trees, num_vertices, lengths):
    """The joins go through the runs of many trees, one after the other, with one stack."""
    binary = SHAPES["binary"](num_vertices)
    forest = [tree * num_vertices + above for tree in range(trees) for above in binary]
    check_everything(tree_of([shuffled(forest, random.Random(trees))]), lengths)


@pytest.mark.parametrize("height, width, root", [(9, 11, 0), (12, 12, 66), (1, 90, 40)])
@each_length
def test_spanning_trees_of_grids(height, width, root, lengths):
    check_everything(grootvl_ops.build_tree(torch.randn(1, height, width, 4), root=root), lengths)


@pytest.mark.parametrize("run_length", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("size, children", [((24, 25), 3), ((6, 8, 9), 5)], ids=["of a map", "of a clip"])
def test_no_run_of_a_grid_is_long(size, children, run_length):
    """A vertex has one neighbour that is its parent. A root has none, but all of its subtrees can be shorter than a run
    only if the tree is not longer than four runs, or six in a clip."""
    for features in (torch.randn(6, *size, 4), torch.ones(1, *size, 4)):
        for root in (0, math.prod(size) // 2 + size[-1] // 2):
            tree = grootvl_ops.build_tree(features, root=root)
            for image in range(len(features)):
                plan = plan_of(tree, (run_length, 1024), image)
                assert max(len(run.places) for run in plan.runs) <= children * run_length


def test_example_of_scan_cuh():
    """The drawing there, whose vertices are numbered from 1 in postorder."""
    above = {1: 2, 2: 4, 3: 4, 4: 5, 5: 10, 6: 7, 7: 8, 8: 9, 9: 10, 10: 11, 11: 13, 12: 13, 13: 14, 14: 14}
    plan = plan_of(tree_of([[above[vertex + 1] - 1 for vertex in range(14)]]), (4, 1024))
    assert [node.vertex + 1 for node in plan.vertices] == list(above)
    assert [[place + 1 for place in run.places] for run in plan.runs] == [
        [1, 2, 3, 4, 5],
        [6, 7, 8, 9],
        [10, 11],
        [12, 13, 14],
    ]
    assert [[place + 1 for place in run.chain] for run in plan.runs] == [[4, 5], [9], [10, 11], [13, 14]]
    assert [node.above + 1 for node in plan.run_nodes] == [3, 3, 4, 4]
    assert [node.push for node in plan.run_nodes] == [True, True, False, False]
    assert {node.vertex + 1 for node in plan.vertices if node.push} == {3, 6, 12}
    assert {node.vertex + 1 for node in plan.vertices if node.light} == {3, 9, 12}

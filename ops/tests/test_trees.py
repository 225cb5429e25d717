"""Spanning trees: which edges, which order, for any graph, and what is refused."""

from __future__ import annotations

import threading

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grootvl_ops
from grootvl_ops import METRICS, Tree

INF, NAN = float("inf"), float("nan")
SIZES = [(1, 1), (1, 2), (2, 1), (1, 9), (9, 1), (2, 2), (3, 5), (7, 7), (8, 13), (14, 14)]
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def num_edges(height: int, width: int) -> int:
    return (height - 1) * width + height * (width - 1)


def same(tree: Tree, other: Tree) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(tree, other, strict=True))


def check_grid_tree(ops, weights: torch.Tensor, height: int, width: int, root: int = 0) -> Tree:
    tree = ops.build_tree_from_grid(weights, height, width, root)
    oracles.check_tree(tree, oracles.pixel_pairs(height, width), weights, root)
    assert all(field.device == weights.device for field in tree)
    return tree


def test_the_documented_example():
    """The properties in the words of grootvl_ops.Tree, on a tree small enough to draw.

    0 - 1 - 2
        |   |      (all edges but those drawn are heavy)
    3 - 4   5
    """
    weights = torch.full((1, 7), 9.0)
    vertical, horizontal = {0: 0, 1: 1, 2: 2}, {0: 3, 1: 4, 3: 5, 4: 6}
    for edge in (vertical[1], vertical[2], horizontal[0], horizontal[1], horizontal[3]):
        weights[0, edge] = 1.0
    tree = grootvl_ops.build_tree_from_grid(weights, 2, 3)
    assert tree.parent.tolist() == [[0, 0, 1, 4, 1, 2]]
    assert tree.subtree_size.tolist() == [[6, 5, 2, 1, 2, 1]]
    assert tree.order.tolist() == [[0, 1, 2, 5, 4, 3]]
    tree = grootvl_ops.build_tree_from_grid(weights, 2, 3, root=4)
    assert tree.parent.tolist() == [[1, 4, 1, 4, 4, 2]]
    assert tree.subtree_size.tolist() == [[1, 4, 2, 1, 6, 1]]
    assert tree.order.tolist() == [[4, 3, 1, 0, 2, 5]]


@pytest.mark.parametrize("height, width", SIZES)
def test_grid_of_random_weights(ops, device, height, width):
    weights = torch.rand(3, num_edges(height, width), device=device)
    check_grid_tree(ops, weights, height, width)


@pytest.mark.parametrize("height, width", SIZES)
def test_grid_without_a_choice_but_ties(ops, device, height, width):
    check_grid_tree(ops, torch.ones(2, num_edges(height, width), device=device), height, width)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (9, 1), (4, 6)])
def test_every_root(ops, device, height, width):
    weights = torch.rand(2, num_edges(height, width), device=device)
    for root in range(height * width):
        check_grid_tree(ops, weights, height, width, root)


@EXAMPLES
@given(data=st.data())
def test_grid_of_few_distinct_weights(ops, device, data):
    height, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    numbers = st.integers(-1, data.draw(st.integers(-1, 4)))
    edges = num_edges(height, width)
    weights = torch.tensor(data.draw(st.lists(numbers, min_size=2 * edges, max_size=2 * edges)), dtype=torch.float32)
    root = data.draw(st.integers(0, height * width - 1))
    check_grid_tree(ops, weights.view(2, edges).to(device), height, width, root)


@EXAMPLES
@given(data=st.data())
def test_grid_of_any_floats(ops, device, data):
    height, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    dtype, bits = data.draw(st.sampled_from([(torch.float64, 64), (torch.float32, 32), (torch.float16, 16)]))
    edges = num_edges(height, width)
    values = data.draw(st.lists(st.floats(width=bits), min_size=edges, max_size=edges))
    weights = torch.tensor(values, dtype=dtype, device=device).view(1, edges)
    check_grid_tree(ops, weights, height, width)


@EXAMPLES
@given(data=st.data())
def test_graph_with_loops_and_parallel_edges(ops, device, data):
    num_vertices = data.draw(st.integers(1, 12))
    vertices = st.integers(0, num_vertices - 1)
    spanning = [(data.draw(st.integers(0, v - 1)), v) for v in range(1, num_vertices)]
    edges = data.draw(st.permutations(spanning + data.draw(st.lists(st.tuples(vertices, vertices), max_size=15))))
    edges = torch.tensor(edges, dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))).view(-1, 2)
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(edges), max_size=len(edges)))
    weights = torch.tensor(weights, dtype=torch.float32).view(1, -1)
    root = data.draw(vertices)
    tree = ops.build_tree_from_edges(edges.to(device), weights.to(device), num_vertices, root)
    oracles.check_tree(tree, edges.tolist(), weights, root)


@pytest.mark.parametrize("value", [NAN, INF, -INF, -0.0, -1.5, 1e-42], ids=str)
def test_grid_with_special_weights(ops, device, value):
    weights = torch.randint(-1, 2, (2, num_edges(5, 6)), device=device).float()
    weights[:, ::3] = value
    check_grid_tree(ops, weights, 5, 6)
    check_grid_tree(ops, weights.double(), 5, 6)
    check_grid_tree(ops, torch.full_like(weights, value), 5, 6)


def test_nan_is_larger_than_infinity_and_all_nan_are_equal(ops, device):
    bits = torch.tensor([0x7FC00000, -0x400000, 0x7F800000, 0x7F800001], dtype=torch.int32)  # nan, -nan, inf, nan
    weights = bits.view(torch.float32).to(device)[None]
    tree = ops.build_tree_from_grid(weights, 2, 2)  # edges 0-2, 1-3, 0-1, 2-3
    assert tree.parent.tolist() == [[0, 0, 0, 1]]


def test_zeros_of_both_signs_are_equal(ops, device):
    for dtype in (torch.float32, torch.float64, torch.float16):
        weights = torch.tensor([[0.0, -0.0, 0.0, -0.0]], dtype=dtype, device=device)
        assert ops.build_tree_from_grid(weights, 2, 2).parent.tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_weight_dtypes(ops, device, dtype):
    weights = torch.rand(2, num_edges(9, 10), device=device, dtype=torch.float64)
    check_grid_tree(ops, weights.to(dtype), 9, 10)


def test_float64_weights_are_compared_in_float64(ops, device):
    weights = 1 + torch.rand(1, num_edges(8, 8), device=device, dtype=torch.float64) * 1e-12
    assert (weights.float() == 1).all()
    check_grid_tree(ops, weights, 8, 8)


def test_not_contiguous_weights_and_edges(ops, device):
    weights = torch.rand(num_edges(5, 4), 3, device=device).T
    check_grid_tree(ops, weights, 5, 4)
    check_grid_tree(ops, torch.rand(1, num_edges(5, 4), device=device).expand(3, -1), 5, 4)
    edges = torch.tensor(oracles.pixel_pairs(5, 4), device=device)
    expected = ops.build_tree_from_grid(weights, 5, 4)
    reversed_and_strided = edges.flip(1).T.contiguous().T
    assert same(ops.build_tree_from_edges(reversed_and_strided, weights, 20), expected)
    assert same(ops.build_tree_from_edges(reversed_and_strided.expand(3, -1, -1), weights, 20), expected)


def test_empty_batch(ops, device):
    for tree in (
        ops.build_tree_from_grid(torch.zeros(0, 17, device=device), 3, 4),
        ops.build_tree_from_edges(
            torch.zeros(17, 2, dtype=torch.int64, device=device), torch.zeros(0, 17, device=device), 12
        ),
        ops.build_tree(torch.zeros(0, 3, 4, 5, device=device)),
    ):
        assert all(field.shape == (0, 12) and field.dtype == torch.int32 for field in tree)


def test_a_graph_of_one_vertex(ops, device):
    edges = torch.zeros(0, 2, dtype=torch.int64, device=device)
    loops = torch.zeros(3, 2, dtype=torch.int64, device=device)
    for graph in (edges, loops):
        tree = ops.build_tree_from_edges(graph, torch.zeros(2, len(graph), device=device), 1)
        assert tree.parent.tolist() == tree.order.tolist() == [[0], [0]]
        assert tree.subtree_size.tolist() == [[1], [1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_one_graph_or_one_for_each_item(ops, device, dtype):
    generator = np.random.default_rng(1)
    shared = np.array(oracles.pixel_pairs(4, 4))
    own = np.stack([generator.permutation(16)[shared] for _ in range(3)])
    weights = torch.randint(0, 5, (3, len(shared)), device=device).float()
    for edges in (shared, own):
        tree = ops.build_tree_from_edges(torch.tensor(edges, dtype=dtype, device=device), weights, 16, 3)
        oracles.check_tree(tree, edges, weights, 3)


def test_direction_of_edges_does_not_matter(ops, device):
    edges = torch.tensor(oracles.pixel_pairs(6, 6), device=device)
    weights = torch.randint(0, 3, (2, len(edges)), device=device).float()
    expected = ops.build_tree_from_grid(weights, 6, 6)
    turned = torch.where(torch.rand(len(edges), 1, device=device) < 0.5, edges, edges.flip(1))
    assert same(ops.build_tree_from_edges(turned, weights, 36), expected)


@pytest.mark.parametrize("root", [0, 1, 399, 400], ids="root{}".format)
def test_star(ops, device, root):
    edges = np.array([(400, leaf) for leaf in range(400)])
    weights = torch.rand(2, 400, device=device)
    tree = ops.build_tree_from_edges(torch.tensor(edges, device=device), weights, 401, root)
    oracles.check_tree(tree, edges, weights, root)


def test_complete_graph(ops, device):
    edges = np.array([(i, j) for i in range(40) for j in range(i)])
    weights = torch.randint(0, 30, (2, len(edges)), device=device).float()
    oracles.check_tree(ops.build_tree_from_edges(torch.tensor(edges, device=device), weights, 40), edges, weights)


def snake_weights(height: int, width: int) -> torch.Tensor:
    """Weights whose tree is one path that goes through the rows, forth and back."""
    weights = torch.ones(1, num_edges(height, width))
    vertical = weights[0, : (height - 1) * width].view(height - 1, width)
    vertical[:] = 2
    vertical[0::2, -1] = 1
    vertical[1::2, 0] = 1
    return weights


@pytest.mark.parametrize("height, width", [(9, 11), (56, 56)])
def test_snake(ops, device, height, width):
    tree = check_grid_tree(ops, snake_weights(height, width).to(device), height, width)
    assert (tree.subtree_size.cpu().sort().values == torch.arange(1, height * width + 1)).all()


def test_spiral_and_stairs(ops, device):
    """Weights that grow along a direction make long runs of unions in one order."""
    edges = num_edges(20, 20)
    rising = torch.arange(edges, device=device).float()
    check_grid_tree(ops, torch.stack((rising, -rising, rising % 7, (rising - edges / 2).abs())), 20, 20)


def test_path_of_100_000_vertices(ops, device):
    """As deep as a tree gets: recursion would end here."""
    num_vertices = 100_000
    names = np.random.default_rng(0).permutation(num_vertices)
    edges = np.stack((names[:-1], names[1:]), axis=1)
    weights = torch.rand(1, num_vertices - 1, device=device)
    tree = ops.build_tree_from_edges(torch.tensor(edges, device=device), weights, num_vertices, int(names[0]))
    np.testing.assert_array_equal(tree.order[0].cpu().numpy(), names)
    np.testing.assert_array_equal(tree.parent[0].cpu().numpy()[names[1:]], names[:-1])
    np.testing.assert_array_equal(tree.subtree_size[0].cpu().numpy()[names], np.arange(num_vertices, 0, -1))


@pytest.mark.parametrize("height, width", [(1000, 1000), (3, 250_000)])
def test_map_of_a_million_vertices(compiled_device, height, width):
    weights = torch.rand(1, num_edges(height, width))
    tree = grootvl_ops.build_tree_from_grid(weights.to(compiled_device), height, width)
    vertices = np.arange(height * width).reshape(height, width)
    vertical = np.stack((vertices[:-1].ravel(), vertices[1:].ravel()), axis=1)
    horizontal = np.stack((vertices[:, :-1].ravel(), vertices[:, 1:].ravel()), axis=1)
    oracles.check_tree(tree, np.concatenate((vertical, horizontal)), weights)


@pytest.mark.parametrize("kind", ["random", "ties", "snake"])
@pytest.mark.parametrize("height, width", [(56, 56), (67, 129), (200, 336)])
def test_usual_map_sizes(compiled_device, kind, height, width):
    edges = num_edges(height, width)
    weights = {
        "random": torch.rand(2, edges),
        "ties": torch.randint(0, 4, (2, edges)).float(),
        "snake": snake_weights(height, width),
    }[kind]
    check_grid_tree(grootvl_ops, weights.to(compiled_device), height, width)


@pytest.mark.parametrize("metric", METRICS)
def test_feature_maps(ops, device, metric):
    smooth = torch.nn.functional.interpolate(torch.randn(2, 6, 4, 3), size=(12, 11), mode="bilinear").permute(
        0, 2, 3, 1
    )
    for features in (torch.randn(2, 12, 11, 6), smooth, torch.full((2, 12, 11, 6), 0.3), torch.zeros(1, 12, 11, 6)):
        features = features.to(device)
        weights = ops.edge_weights(features, metric)
        tree = ops.build_tree(features, metric, root=17)
        oracles.check_tree(tree, oracles.pixel_pairs(12, 11), weights, 17)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_features_that_are_not_finite_still_give_a_tree(ops, device, metric, value):
    features = torch.randn(2, 6, 7, 3, device=device)
    features[0, 2:4, 3:5] = value
    features[1] = value
    tree = ops.build_tree(features, metric)
    oracles.check_tree(tree, oracles.pixel_pairs(6, 7), ops.edge_weights(features, metric))


def test_a_constant_map_scans_along_its_columns(ops, device):
    """With all weights equal the rule for ties takes every vertical edge, and the first row joins the columns."""
    tree = ops.build_tree(torch.ones(1, 4, 3, 5, device=device))
    assert tree.parent.view(4, 3).tolist() == [[0, 0, 1], [0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_photograph_like_map(compiled_device):
    """Few grey levels and flat regions: many ties of many sizes."""
    grid = torch.stack(torch.meshgrid(torch.arange(96.0), torch.arange(80.0), indexing="ij"), dim=-1)
    features = ((grid / 17).sin() * 3).round().to(compiled_device)[None]
    for metric in METRICS:
        weights = grootvl_ops.edge_weights(features, metric)
        check_grid_tree(grootvl_ops, weights, 96, 80)


def test_batches_are_independent(ops, device):
    weights = torch.randint(0, 9, (4, num_edges(6, 7)), device=device).float()
    whole = ops.build_tree_from_grid(weights, 6, 7)
    for item in range(4):
        alone = ops.build_tree_from_grid(weights[item : item + 1], 6, 7)
        assert same(Tree(*(field[item : item + 1] for field in whole)), alone)


def test_deterministic_over_runs_threads_and_memory(compiled_device, restore_threads, poisoned_memory):
    weights = torch.randint(0, 50, (5, num_edges(30, 40)), device=compiled_device).float()
    expected = grootvl_ops.build_tree_from_grid(weights, 30, 40)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert same(grootvl_ops.build_tree_from_grid(weights, 30, 40), expected)
    oracles.check_tree(expected, oracles.pixel_pairs(30, 40), weights)


def test_calls_from_several_threads(compiled_device):
    weights = torch.rand(8, 2, num_edges(24, 24), device=compiled_device)
    expected = [grootvl_ops.build_tree_from_grid(w, 24, 24) for w in weights]
    found = [None] * len(weights)

    def work(index: int) -> None:
        found[index] = grootvl_ops.build_tree_from_grid(weights[index], 24, 24)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(weights))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_arguments_are_left_alone(ops, device):
    weights = torch.rand(2, num_edges(5, 5), device=device)
    edges = torch.tensor(oracles.pixel_pairs(5, 5), device=device)
    weights_before, edges_before = weights.clone(), edges.clone()
    ops.build_tree_from_grid(weights, 5, 5)
    ops.build_tree_from_edges(edges, weights, 25)
    assert torch.equal(weights, weights_before)
    assert torch.equal(edges, edges_before)


def test_no_gradient_through_the_tree(device):
    weights = torch.rand(1, num_edges(3, 3), device=device, requires_grad=True)
    tree = grootvl_ops.build_tree_from_grid(weights, 3, 3)
    assert not any(field.requires_grad for field in tree)


@pytest.mark.parametrize("root", [-1, 12, 100])
def test_root_outside(device, root):
    message = rf"root must be from 0 to 11, got {root}"
    edges = torch.tensor(oracles.pixel_pairs(3, 4), device=device)
    with pytest.raises(ValueError, match=message):
        grootvl_ops.build_tree(torch.zeros(1, 3, 4, 2, device=device), root=root)
    with pytest.raises(ValueError, match=message):
        grootvl_ops.build_tree_from_grid(torch.zeros(1, 17, device=device), 3, 4, root)
    with pytest.raises(ValueError, match=message):
        grootvl_ops.build_tree_from_edges(edges, torch.zeros(1, 17, device=device), 12, root)


@pytest.mark.parametrize(
    "weights, height, width, error, message",
    [
        (torch.zeros(1, 16), 3, 4, ValueError, r"weights must be \(B, 17\) for a 3 x 4 map, got \[1, 16\]"),
        (torch.zeros(17), 3, 4, ValueError, r"weights must be \(B, 17\) for a 3 x 4 map, got \[17\]"),
        (torch.zeros(1, 1, 17), 3, 4, ValueError, r"weights must be \(B, 17\) for a 3 x 4 map, got \[1, 1, 17\]"),
        (torch.zeros(1, 0), 0, 4, ValueError, r"at least one pixel, got 0 x 4"),
        (torch.zeros(1, 0), 4, -1, ValueError, r"at least one pixel, got 4 x -1"),
        (torch.zeros(1, 17).int(), 3, 4, TypeError, r"weights must be floating point, got .*int32"),
        (torch.zeros(1, 17).bool(), 3, 4, TypeError, r"weights must be floating point, got .*bool"),
    ],
)
def test_grid_errors(device, weights, height, width, error, message):
    with pytest.raises(error, match=message):
        grootvl_ops.build_tree_from_grid(weights.to(device), height, width)


EDGES = torch.tensor([[0, 1], [1, 2], [2, 0]])


@pytest.mark.parametrize(
    "edges, weights, num_vertices, error, message",
    [
        (EDGES.float(), torch.zeros(1, 3), 3, TypeError, r"edges must be int32 or int64, got .*float32"),
        (EDGES.short(), torch.zeros(1, 3), 3, TypeError, r"edges must be int32 or int64, got .*int16"),
        (EDGES, torch.zeros(3), 3, ValueError, r"weights must be \(B, E\), got \[3\]"),
        (EDGES, torch.zeros(1, 4), 3, ValueError, r"got \[1, 3, 2\] and \[1, 4\]"),
        (EDGES.expand(3, 3, 2), torch.zeros(2, 3), 3, ValueError, r"got \[3, 3, 2\] and \[2, 3\]"),
        (torch.zeros(3, 3).long(), torch.zeros(1, 3), 3, ValueError, r"edges must be \(E, 2\) or \(B, E, 2\)"),
        (torch.zeros(3).long(), torch.zeros(1, 3), 3, ValueError, r"edges must be \(E, 2\) or \(B, E, 2\)"),
        (EDGES, torch.zeros(1, 3), 0, ValueError, r"num_vertices must be at least 1, got 0"),
        (EDGES, torch.zeros(1, 3).long(), 3, TypeError, r"weights must be floating point, got .*int64"),
    ],
)
def test_graph_errors(device, edges, weights, num_vertices, error, message):
    with pytest.raises(error, match=message):
        grootvl_ops.build_tree_from_edges(edges.to(device), weights.to(device), num_vertices)


def test_edges_and_weights_on_two_devices():
    message = "edges and weights must be on one device, got meta and cpu"
    with pytest.raises(ValueError, match=message):
        grootvl_ops.build_tree_from_edges(EDGES.to("meta"), torch.zeros(1, 3), 3)


@pytest.mark.parametrize("vertex", [-1, 4, 2**31, -(2**40)])
def test_edges_out_of_range_on_the_cpu(ops, vertex):
    edges = torch.tensor([[[0, 1], [1, 2], [2, 3]], [[0, 1], [1, 2], [2, vertex]]])
    with pytest.raises(ValueError, match=rf"edges must name vertices from 0 to 3, got .*{vertex}"):
        ops.build_tree_from_edges(edges, torch.zeros(2, 3), 4)


def test_unconnected_graph_on_the_cpu(ops):
    edges = torch.tensor([[0, 1], [2, 3], [3, 2], [4, 4]])
    message = "not connected: a tree over 5 vertices needs 4 edges, but only 2 of those given join different parts"
    with pytest.raises(ValueError, match=message):
        ops.build_tree_from_edges(edges, torch.rand(2, 4), 5)
    with pytest.raises(ValueError, match="not connected"):
        ops.build_tree_from_edges(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(1, 0), 2)
    connected = torch.tensor([[[0, 1], [1, 2]], [[0, 1], [1, 0]]])  # the first item only
    with pytest.raises(ValueError, match="not connected"):
        ops.build_tree_from_edges(connected, torch.zeros(2, 2), 3)


def test_a_failed_call_leaves_the_next_one_right(ops):
    for _ in range(3):
        with pytest.raises(ValueError):
            ops.build_tree_from_edges(torch.tensor([[0, 1], [1, 0]]), torch.rand(4, 2), 3)
    check_grid_tree(ops, torch.rand(4, num_edges(4, 4)), 4, 4)


GRID_CALLS = [
    (torch.zeros(1, 16), 3, 4, 0),
    (torch.zeros(17), 3, 4, 0),
    (torch.zeros(1, 17).half(), 3, 4, 0),
    (torch.zeros(1, 17).int(), 3, 4, 0),
    (torch.zeros(1, 17), 3, 4, 12),
    (torch.zeros(1, 17), 3, 4, -1),
    (torch.zeros(1, 17), -3, -4, 0),
    (torch.zeros(1, 0), 0, 0, 0),
    (torch.zeros(1, 17), 2**40, 2**40, 0),
    (torch.zeros(1, 17), 2**62, 4, 0),
]


@pytest.mark.parametrize("call", GRID_CALLS, ids=lambda call: f"{list(call[0].shape)}-{call[1:]}")
def test_grid_kernel_checks_what_it_is_called_with(compiled_device, call):
    weights, *sizes = call
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.grootvl_ops.grid_tree(weights.to(compiled_device), *sizes)


GRAPH_CALLS = [
    (EDGES, torch.zeros(1, 3), 3, 0),
    (EDGES[None].float(), torch.zeros(1, 3), 3, 0),
    (EDGES[None].short(), torch.zeros(1, 3), 3, 0),
    (EDGES[None], torch.zeros(1, 3).half(), 3, 0),
    (EDGES[None], torch.zeros(2, 3), 3, 0),
    (EDGES[None], torch.zeros(1, 4), 3, 0),
    (EDGES[None], torch.zeros(3), 3, 0),
    (EDGES[None, :, :1], torch.zeros(1, 3), 3, 0),
    (EDGES[None], torch.zeros(1, 3), 3, 3),
    (EDGES[None], torch.zeros(1, 3), 3, -1),
    (EDGES[None], torch.zeros(1, 3), 0, 0),
    (EDGES[None], torch.zeros(1, 3), -5, 0),
    (EDGES[None], torch.zeros(1, 3), 2**40, 0),
]


@pytest.mark.parametrize(
    "call", GRAPH_CALLS, ids=lambda call: f"{list(call[0].shape)}-{call[0].dtype}-{list(call[1].shape)}-{call[2:]}"
)
def test_graph_kernel_checks_what_it_is_called_with(compiled_device, call):
    edges, weights, *sizes = call
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.grootvl_ops.graph_tree(edges.to(compiled_device), weights.to(compiled_device), *sizes)


def test_trees_are_saved_and_loaded_with_default_arguments(device, tmp_path):
    """A NamedTuple of its own kind is no plain container: torch.load must know it."""
    tree = grootvl_ops.build_tree(torch.randn(2, 3, 4, 5, device=device))
    torch.save({"tree": tree}, tmp_path / "tree.pt")
    loaded = torch.load(tmp_path / "tree.pt")["tree"]
    assert isinstance(loaded, grootvl_ops.Tree)
    assert all(torch.equal(a, b) for a, b in zip(loaded, tree, strict=True))


def test_trees_of_inference_mode_can_be_used_in_training(device):
    with torch.inference_mode():
        tree = grootvl_ops.build_tree(torch.randn(2, 3, 4, 5, device=device))
    x = torch.rand(2, 12, 3, device=device, requires_grad=True)
    dt_bias = torch.rand(3, device=device, requires_grad=True)
    h = grootvl_ops.selective_scan(x, x, None, dt_bias, dt_bias, x[..., 0], tree)
    (grootvl_ops.tree_scan(h, x.sigmoid(), tree).sum()).backward()
    assert x.grad.isfinite().all() and dt_bias.grad.isfinite().all()

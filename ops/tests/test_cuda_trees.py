"""Edge weights and trees on CUDA, at sizes that decide which kernels run: right, and without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import oracles
import pytest
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

import grootvl_ops
from grootvl_ops import METRICS, Tree

pytestmark = pytest.mark.usefixtures("cuda_kernels")

INF, NAN = float("inf"), float("nan")
# A block of threads holds maps of up to some 9000 pixels in its shared memory, or graphs of up to some 4600 vertices
# and 16,384 edges; larger ones are shared among blocks.
SIZES = [(1, 2), (1, 33), (3000, 1), (2, 5000), (7, 7), (14, 14), (28, 28), (31, 33), (56, 56), (64, 64), (89, 101)]
LARGE_SIZES = [(96, 97), (1, 20_000), (128, 128), (200, 336), (512, 512)]


def num_edges(height: int, width: int) -> int:
    return (height - 1) * width + height * (width - 1)


def random(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, num_edges(height, width))


def constant(batch: int, height: int, width: int) -> Tensor:
    return torch.ones(batch, num_edges(height, width))


def few_values(batch: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 4, (batch, num_edges(height, width))).float()


def rising(batch: int, height: int, width: int) -> Tensor:
    """Monotone weights make the longest chains of parts that join each other."""
    edges = torch.arange(num_edges(height, width), dtype=torch.float32)
    return torch.stack([edges if item % 2 == 0 else -edges for item in range(batch)])


def smooth(batch: int, height: int, width: int) -> Tensor:
    """Distances of neighbours in waves over the map."""
    y, x = torch.meshgrid(torch.arange(height) / 9.0, torch.arange(width) / 7.0, indexing="ij")
    waves = torch.stack([torch.stack(((y + item).sin(), (x - y).cos()), dim=-1) for item in range(batch)])
    return grootvl_ops.edge_weights(waves, "euclidean")


def snake(batch: int, height: int, width: int) -> Tensor:
    """One path through the rows, forth and back."""
    vertical = torch.full((height - 1, width), 2.0)
    vertical[0::2, -1] = 1
    vertical[1::2, 0] = 1
    horizontal = torch.ones(height * (width - 1))
    return torch.cat((vertical.flatten(), horizontal)).expand(batch, -1)


def special(batch: int, height: int, width: int) -> Tensor:
    values = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-42, -1e-42, 1.0, -1.0])
    return values[torch.randint(len(values), (batch, num_edges(height, width)))]


KINDS: list[Callable[[int, int, int], Tensor]] = [random, constant, few_values, rising, smooth, snake, special]


def assert_same(tree: Tree, expected: Tree) -> None:
    for name, field, other in zip(Tree._fields, tree, expected, strict=True):
        assert field.is_cuda and field.is_contiguous() and field.dtype == torch.int32, name
        assert torch.equal(field.cpu(), other), name


def check_grid(weights: Tensor, height: int, width: int, root: int = 0) -> None:
    tree = grootvl_ops.build_tree_from_grid(weights.cuda(), height, width, root)
    assert_same(tree, grootvl_ops.build_tree_from_grid(weights, height, width, root))


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error for whatever makes the host wait for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("height, width", SIZES)
def test_maps_of_one_block(kind, height, width):
    for root in (0, height * width - 1, int(torch.randint(height * width, ()))):
        check_grid(kind(3, height, width), height, width, root)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("height, width", LARGE_SIZES)
def test_maps_of_several_blocks(kind, height, width):
    check_grid(kind(2, height, width), height, width, int(torch.randint(height * width, ())))


@pytest.mark.parametrize("height, width", [(80, 80), (81, 81), (84, 90), (90, 100), (94, 96), (95, 96), (96, 96)])
def test_maps_about_the_size_of_shared_memory(height, width):
    check_grid(random(2, height, width), height, width)


@pytest.mark.parametrize("batch, height, width", [(1, 200, 336), (150, 100, 100), (700, 7, 7), (300, 1, 9200)])
def test_more_and_fewer_maps_than_blocks(batch, height, width):
    check_grid(few_values(batch, height, width), height, width, 5)


def test_map_of_one_pixel():
    tree = grootvl_ops.build_tree_from_grid(torch.zeros(5, 0, device="cuda"), 1, 1)
    assert [field.tolist() for field in tree] == [[[0]] * 5, [[0]] * 5, [[1]] * 5]


@pytest.mark.parametrize("height, width", [(56, 56), (150, 160)])
def test_float64_weights(height, width):
    weights = 1 + torch.rand(2, num_edges(height, width), dtype=torch.float64) * 1e-12
    weights[0, ::5] = NAN
    weights[0, 1::5] = -NAN
    weights[1, ::3] = 0.0
    weights[1, 1::3] = -0.0
    check_grid(weights, height, width, 77)


def test_weights_need_not_be_contiguous():
    weights = torch.rand(num_edges(60, 50), 3, device="cuda").T
    expected = grootvl_ops.build_tree_from_grid(weights.cpu(), 60, 50)
    assert_same(grootvl_ops.build_tree_from_grid(weights, 60, 50), expected)


@pytest.mark.parametrize("height, width", [(56, 56), (150, 160)])
def test_deterministic_on_poisoned_memory(height, width, poisoned_memory):
    for kind in (random, few_values):
        weights = kind(2, height, width)
        for _ in range(3):
            check_grid(weights, height, width)


def random_graph(num_vertices: int, additional: int) -> Tensor:
    """Connected, with parallel edges and loops, its edges in no order."""
    vertices = torch.randperm(num_vertices)
    below = torch.arange(1, num_vertices)
    spanning = torch.stack((vertices[(torch.rand(num_vertices - 1) * below).long()], vertices[below]), dim=1)
    edges = torch.cat((spanning, torch.randint(num_vertices, (additional, 2))))
    return edges[torch.randperm(len(edges))]


def check_graph(edges: Tensor, weights: Tensor, num_vertices: int, root: int = 0) -> None:
    tree = grootvl_ops.build_tree_from_edges(edges.cuda(), weights.cuda(), num_vertices, root)
    assert_same(tree, grootvl_ops.build_tree_from_edges(edges, weights, num_vertices, root))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("num_vertices", [1, 2, 3, 50, 1000, 4112, 5000, 60_000])
def test_graphs(num_vertices, dtype):
    edges = torch.stack([random_graph(num_vertices, 2 * num_vertices) for _ in range(2)]).to(dtype)
    shape = edges.shape[:2]
    root = int(torch.randint(num_vertices, ()))
    check_graph(edges, torch.rand(shape), num_vertices, root)
    check_graph(edges, torch.rand(shape, dtype=torch.float64), num_vertices, root)
    check_graph(edges, torch.randint(5, shape).float(), num_vertices, root)
    check_graph(edges[0], torch.randint(5, shape).float(), num_vertices, root)


@pytest.mark.parametrize("num_vertices", [4500, 4600, 4700])
def test_graphs_about_the_size_of_shared_memory(num_vertices):
    edges = random_graph(num_vertices, 0)
    check_graph(edges, torch.rand(2, len(edges)), num_vertices, 5)


@pytest.mark.parametrize("additional", [15_000, 16_000, 90_000])
def test_graphs_of_many_edges(additional):
    edges = random_graph(1000, additional)
    check_graph(edges, torch.randint(50, (2, len(edges))).float(), 1000, 5)


@pytest.mark.parametrize("num_vertices", [40, 4000, 100_000])
def test_star(num_vertices):
    centre = 7 * num_vertices // 10
    leaves = torch.cat((torch.arange(centre), torch.arange(centre + 1, num_vertices)))
    edges = torch.stack((torch.full_like(leaves, centre), leaves), dim=1)
    for root in (0, centre, num_vertices - 1):
        check_graph(edges, torch.rand(2, num_vertices - 1), num_vertices, root)


@pytest.mark.parametrize("num_vertices", [4000, 100_000])
def test_long_path(num_vertices):
    vertices = torch.randperm(num_vertices)
    edges = torch.stack((vertices[:-1], vertices[1:]), dim=1)
    weights = torch.stack((torch.rand(num_vertices - 1), torch.arange(num_vertices - 1).float()))
    check_graph(edges, weights, num_vertices, int(vertices[num_vertices // 3]))


@pytest.mark.parametrize("num_vertices", [500, 9000])
def test_graphs_on_poisoned_memory(num_vertices, poisoned_memory):
    edges = random_graph(num_vertices, num_vertices)
    for _ in range(3):
        check_graph(edges, torch.randint(9, (2, len(edges))).float(), num_vertices, 3)


def test_edges_at_any_address():
    edges = random_graph(50, 50).int()
    weights = torch.rand(1, len(edges))
    shifted = torch.cat((torch.zeros(1, dtype=torch.int32), edges.flatten())).cuda()[1:].view(-1, 2)
    tree = grootvl_ops.build_tree_from_edges(shifted, weights.cuda(), 50)
    assert_same(tree, grootvl_ops.build_tree_from_edges(edges, weights, 50))


def test_more_graphs_than_blocks():
    edges = torch.stack([random_graph(40, 30) for _ in range(500)])
    check_graph(edges, torch.rand(edges.shape[:2]), 40, 7)


def forest(edges: Tensor, weights: Tensor, num_vertices: int, root: int) -> Tree:
    """Each part of one graph as a tree of its own; the one with `root` first, the others by their lowest vertex."""
    graph = coo_array((np.ones(len(edges)), edges.T.numpy()), shape=(num_vertices, num_vertices))
    part_of = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
    parent = torch.empty(1, num_vertices, dtype=torch.int32)
    size = torch.empty(1, num_vertices, dtype=torch.int32)
    orders = {}
    for part in range(int(part_of.max()) + 1):
        vertices = (part_of == part).nonzero().flatten()
        number = torch.zeros(num_vertices, dtype=torch.long)
        number[vertices] = torch.arange(len(vertices))
        inside = part_of[edges[:, 0]] == part
        part_root = root if part_of[root] == part else int(vertices[0])
        tree = grootvl_ops.build_tree_from_edges(
            number[edges[inside]], weights[None, inside], len(vertices), int(number[part_root])
        )
        parent[0, vertices] = vertices[tree.parent[0].long()].int()
        size[0, vertices] = tree.subtree_size[0]
        orders[-1 if part_root == root else part_root] = vertices[tree.order[0].long()].int()
    return Tree(parent, torch.cat([orders[key] for key in sorted(orders)])[None], size)


@pytest.mark.parametrize("num_vertices, edges", [(6, 0), (9, 4), (300, 200), (3000, 2500), (9000, 8000)])
def test_parts_of_an_unconnected_graph_become_trees(num_vertices, edges):
    ends = torch.randint(num_vertices, (edges, 2))
    weights = torch.randint(9, (edges,)).float()
    for root in (0, num_vertices // 2, num_vertices - 1):
        tree = grootvl_ops.build_tree_from_edges(ends.cuda(), weights[None].cuda(), num_vertices, root)
        assert_same(tree, forest(ends, weights, num_vertices, root))


@pytest.mark.parametrize(
    "num_vertices, vertex",
    [(n, vertex) for n in (500, 9000) for vertex in (-1, n, 2**31 - 1, 2**31, 2**32 + 3, -(2**40))],
)
def test_edges_out_of_range_are_left_out(num_vertices, vertex):
    edges = random_graph(num_vertices, 700)
    weights = torch.rand(1, len(edges))
    wrong, loop = torch.tensor([[vertex, 3], [3, vertex]]), torch.tensor([[3, 3], [3, 3]])
    light = torch.cat((torch.zeros(1, 2), weights), dim=1)
    tree = grootvl_ops.build_tree_from_edges(torch.cat((wrong, edges)).cuda(), light.cuda(), num_vertices)
    assert_same(tree, grootvl_ops.build_tree_from_edges(torch.cat((loop, edges)), light, num_vertices))


# What is captured in a CUDA graph and must not wait: one block, several blocks, float64, and graphs of both.
GRIDS = [(2, 56, 56, torch.float32), (2, 120, 120, torch.float32), (2, 56, 56, torch.float64)]


@pytest.mark.parametrize("batch, height, width, dtype", GRIDS)
def test_grid_in_a_cuda_graph(batch, height, width, dtype):
    weights = torch.rand(batch, num_edges(height, width), dtype=dtype, device="cuda")
    check_capture(weights, lambda w: grootvl_ops.build_tree_from_grid(w, height, width, 3))


@pytest.mark.parametrize("num_vertices", [60, 9000])
def test_graph_in_a_cuda_graph(num_vertices):
    edges = random_graph(num_vertices, num_vertices)
    on = {"cpu": edges, "cuda": edges.cuda()}
    weights = torch.rand(2, len(edges), device="cuda")
    check_capture(weights, lambda w: grootvl_ops.build_tree_from_edges(on[w.device.type], w, num_vertices, 3))


def check_capture(weights: Tensor, build: Callable[[Tensor], Tree]) -> None:
    """Replays follow the weights, and no replay relies on what an earlier one left in memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        build(weights)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree = build(weights)
    for _ in range(3):
        weights.copy_(torch.rand_like(weights))
        for field in tree:
            field.fill_(-7)
        graph.replay()
        assert_same(tree, build(weights.cpu()))


def test_features_to_tree_in_a_cuda_graph():
    features = torch.randn(4, 14, 14, 64, device="cuda", dtype=torch.bfloat16)
    check_features = grootvl_ops.build_tree(features)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree = grootvl_ops.build_tree(features)
    graph.replay()
    assert_same(tree, Tree(*(field.cpu() for field in check_features)))


def test_nothing_waits_for_the_gpu():
    edges, features = random_graph(5000, 5000).cuda(), torch.randn(2, 60, 60, 20, device="cuda")
    graph_weights = torch.rand(2, len(edges), device="cuda")
    with no_waiting():
        for metric in METRICS:
            grootvl_ops.build_tree(features, metric)
        grootvl_ops.build_tree(features.permute(0, 3, 1, 2))
        grootvl_ops.build_tree(features.double())
        grootvl_ops.build_tree(features.repeat(1, 2, 2, 1))
        grootvl_ops.build_tree_from_edges(edges, graph_weights, 5000)
        grootvl_ops.build_tree_from_edges(edges.int(), graph_weights.double(), 5000)


@pytest.mark.parametrize("height, width", [(40, 40), (110, 110)])
def test_kernels_run_on_the_current_stream(height, width):
    weights = random(2, height, width)
    expected = grootvl_ops.build_tree_from_grid(weights, height, width)
    on_gpu = torch.full(weights.shape, NAN, device="cuda")
    source = weights.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a tree built on another stream would be that of the NaN
        on_gpu.copy_(source)
        tree = grootvl_ops.build_tree_from_grid(on_gpu, height, width)
    stream.synchronize()
    assert_same(tree, expected)


def test_kernels_run_on_the_device_of_their_input():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    features = torch.randn(2, 100, 100, 8)
    edges = random_graph(100, 100)
    weights = torch.rand(2, len(edges))
    with torch.cuda.device(0):
        edge_weights = grootvl_ops.edge_weights(features.to("cuda:1"))
        assert_same(
            grootvl_ops.build_tree_from_grid(edge_weights, 100, 100),
            grootvl_ops.build_tree_from_grid(edge_weights.cpu(), 100, 100),
        )
        tree = grootvl_ops.build_tree_from_edges(edges.to("cuda:1"), weights.to("cuda:1"), 100)
    assert tree.parent.device == edge_weights.device == torch.device("cuda:1")
    assert_same(tree, grootvl_ops.build_tree_from_edges(edges, weights, 100))


def check_edge_weights(features: Tensor, metric: str) -> None:
    weights = grootvl_ops.edge_weights(features, metric)
    wide = features.dtype == torch.float64
    assert weights.dtype == (torch.float64 if wide else torch.float32)
    tolerance = 1e-12 if wide else 1e-5
    expected = oracles.edge_weights(features, metric)
    torch.testing.assert_close(weights.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 20, 24, 37, 64, 160, 320, 1001, 1280, 4096])
def test_edge_weights(channels, dtype, metric, poisoned_memory):
    for batch, height, width in ((1, 1, 1), (2, 1, 9), (2, 9, 1), (3, 7, 7), (2, 13, 10)):
        check_edge_weights(torch.randn(batch, height, width, channels, device="cuda").to(dtype), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size, channels", [(56, 160), (28, 320), (14, 640), (7, 1280), (56, 16)])
def test_edge_weights_of_many_maps(size, channels, dtype, metric):
    """Enough tiles for the other ways to share out the channels."""
    check_edge_weights(torch.randn(32, size, size, channels, device="cuda").to(dtype), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_edge_weights_of_any_layout(dtype, metric):
    data = torch.randn(2, 12, 14, 49, device="cuda").to(dtype)
    check_edge_weights(data[..., :48], metric)
    check_edge_weights(data[..., 1:], metric)
    check_edge_weights(data[:, ::2, 1::3, 8:40], metric)
    check_edge_weights(data.permute(0, 3, 1, 2), metric)
    check_edge_weights(data[:, :1].expand(-1, 5, -1, -1), metric)
    check_edge_weights(data[..., :32].contiguous()[:, 1:, :, 16:], metric)

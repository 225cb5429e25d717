"""Random cases against SciPy and float64, and random wrong arguments.

The number of cases is GROOTVL_FUZZ_CASES, by default 1000 for each test; case n of seed s is always the same.
"""

from __future__ import annotations

import os
import random

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tree_makers import shuffled, tree_of

import grootvl_ops
from grootvl_ops import DIRECTIONS, METRICS, Tree

CASES = int(os.environ.get("GROOTVL_FUZZ_CASES", "1000"))
SEED = int(os.environ.get("GROOTVL_FUZZ_SEED", "0"))
# Of the largest value; half formats round results.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 8e-3, torch.bfloat16: 5e-2}

pytestmark = pytest.mark.slow


class Case:
    """One random case: whatever it draws depends on its number alone."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(f"{SEED}/{number}")
        torch.manual_seed(self.random.getrandbits(60))

    def size(self, largest: int) -> int:
        return self.random.choice((1, 1, 2, 3, self.random.randint(1, largest)))

    def dtype(self) -> torch.dtype:
        return self.random.choice(list(TOLERANCE))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Normal values of any scale, in a layout of any kind."""
        kind = self.random.randrange(4)
        if kind == 0 and len(shape) > 1:
            return torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape) - 1, -1, -1))
        if kind == 1:
            return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
        return torch.randn(shape).to(dtype) * self.random.choice((1, 1, 1e-3, 30))

    def weights(self, batch: int, count: int) -> Tensor:
        dtype = self.random.choice((torch.float32, torch.float64, torch.float16))
        weights = torch.randn(batch, count).to(dtype)
        if self.random.random() < 0.5:  # ties
            weights = weights.sign() * self.random.choice((0.0, 1.0))
        if self.random.random() < 0.2 and weights.numel():
            chosen = torch.randint(0, weights.numel(), (1 + weights.numel() // 4,))
            special = [float("nan"), float("inf"), float("-inf"), -0.0]
            weights.view(-1)[chosen] = torch.tensor([self.random.choice(special) for _ in chosen]).to(dtype)
        return weights

    def tree(self, batch: int, length: int) -> Tree:
        parents = []
        for _ in range(batch):
            reach = self.random.choice((1, 2, 5, length))
            roots = self.random.choice((0.0, 0.0, 0.1))
            parent = [
                vertex
                if vertex == 0 or self.random.random() < roots
                else max(0, vertex - self.random.randint(1, reach))
                for vertex in range(length)
            ]
            parents.append(shuffled(parent, self.random))
        return tree_of(parents)


def check(case: Case, found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for number, (actual, target) in enumerate(zip(found, expected, strict=True)):
        assert actual.shape == target.shape, number
        if not target.numel():
            continue
        difference = (actual.double() - target.double()).abs().max()
        limit = TOLERANCE[dtype] * max(float(target.abs().max()), 1e-3)
        assert difference <= limit, f"result {number}: off by {float(difference)}, allowed {limit}"


def fuzz_grid_tree(case: Case) -> None:
    height, width, batch = case.size(9), case.size(9), case.size(3)
    weights = case.weights(batch, (height - 1) * width + height * (width - 1))
    root = case.random.randrange(height * width)
    tree = grootvl_ops.build_tree_from_grid(weights, height, width, root)
    oracles.check_tree(tree, oracles.pixel_pairs(height, width), weights, root)
    grootvl_ops.check_tree(tree)


def fuzz_graph_tree(case: Case) -> None:
    length, batch = case.size(25), case.size(3)
    tree = [(vertex, case.random.randrange(vertex)) for vertex in range(1, length)]
    extra = [(case.random.randrange(length), case.random.randrange(length)) for _ in range(case.random.randrange(20))]
    edges = tree + extra
    case.random.shuffle(edges)
    weights = case.weights(batch, len(edges))
    root = case.random.randrange(length)
    table = torch.tensor(edges, dtype=case.random.choice((torch.int32, torch.int64))).view(-1, 2)
    oracles.check_tree(grootvl_ops.build_tree_from_edges(table, weights, length, root), edges, weights, root)


def fuzz_edge_weights(case: Case) -> None:
    dtype, metric = case.dtype(), case.random.choice(METRICS)
    features = case.randn(case.size(2), case.size(7), case.size(7), case.size(20), dtype=dtype)
    found = grootvl_ops.edge_weights(features, metric)
    exact = torch.float64 if dtype == torch.float64 else torch.float32  # half formats are read exactly
    check(case, [found], [oracles.edge_weights(features, metric)], exact)


def fuzz_neighbour_cosines(case: Case) -> None:
    dtype, neighbours = case.dtype(), case.size(5)
    x = case.randn(case.size(2), case.size(9), case.size(20), dtype=dtype)
    found = grootvl_ops.neighbour_cosines(x, neighbours)
    exact = torch.float64 if dtype == torch.float64 else torch.float32  # half formats are read exactly
    check(case, [found], [oracles.neighbour_cosines(x, neighbours)], exact)


def fuzz_path_tree(case: Case) -> None:
    order = torch.stack([torch.randperm(1 + case.random.randrange(20))] * case.size(2))
    tree = grootvl_ops.path_tree(order)
    parents = [[0] * len(row) for row in order]
    for parent, row in zip(parents, order.tolist(), strict=True):
        for above, vertex in zip([row[0], *row], row, strict=False):
            parent[vertex] = above
    assert all(torch.equal(a, b) for a, b in zip(tree, tree_of(parents), strict=True))


def fuzz_tree_scan(case: Case) -> None:
    dtype, direction = case.dtype(), case.random.choice(DIRECTIONS)
    shape = case.size(3), case.size(30), case.size(20)
    x, grad = case.randn(*shape, dtype=dtype), case.randn(*shape, dtype=dtype)
    decay = case.random.choice((torch.rand, torch.ones, torch.zeros))(shape).to(dtype)
    tree = case.tree(*shape[:2])
    x, decay = x.requires_grad_(), decay.requires_grad_()
    h = grootvl_ops.tree_scan(x, decay, tree, direction)
    found = [h.detach(), *torch.autograd.grad(h, (x, decay), grad)]
    check(case, found, list(oracles.message_gradients(x, decay, tree, grad, direction)), dtype)


def fuzz_selective_scan(case: Case) -> None:
    """Values only: the gradients are those of its parts, which the tests of the selective scan compare."""
    dtype, direction = case.dtype(), case.random.choice(DIRECTIONS)
    batch, length, channels, rank, states = (case.size(n) for n in (3, 25, 12, 4, 3))
    tree = case.tree(batch, length)
    x = torch.randn(batch, length, channels).to(dtype)
    dt = torch.randn(batch, length, rank).to(dtype)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    dt_weight, dt_bias = torch.randn(channels, rank).to(parameter), torch.randn(channels).to(parameter)
    A_log = torch.randn(channels, states).to(parameter)
    B, C = (torch.randn(batch, length, states).to(dtype) for _ in range(2))
    found = grootvl_ops.selective_scan(x, dt, dt_weight, dt_bias, A_log, B, tree, direction, C)
    delta = F.softplus(dt.double() @ dt_weight.double().T + dt_bias.double())
    y = torch.zeros(batch, length, channels, dtype=torch.float64)
    for n in range(states):
        decay = torch.exp(-A_log[:, n].double().exp() * delta)
        u = delta * B[..., n : n + 1].double() * x.double()
        y += C[..., n : n + 1].double() * oracles.message_gradients(u, decay, tree, u, direction)[0]
    check(case, [found], [y], dtype)


def fuzz_gated_norm(case: Case) -> None:
    dtype, eps = case.dtype(), case.random.choice((1e-5, 1e-3))
    shape = case.size(3), case.size(20), 1 + case.size(40)
    maps = [torch.randn(shape).to(dtype) for _ in range(3)] + [torch.randn(shape[:2]).to(dtype)]
    vectors = [torch.randn(shape[2]).to(torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(5)]
    found = grootvl_ops.gated_norm(*maps, *vectors, eps)
    h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias = (operand.double() for operand in maps + vectors)
    inner = F.layer_norm(h, shape[2:], h_weight, h_bias, eps)
    outer = F.layer_norm(C.unsqueeze(-1) * inner + D_skip * x, shape[2:], out_weight, out_bias, eps)
    check(case, [found], [outer * F.silu(z)], torch.bfloat16 if shape[2] < 4 and dtype != torch.float64 else dtype)


def fuzz_layer_norm(case: Case) -> None:
    dtype = case.dtype()
    shape = (*[case.size(5) for _ in range(case.random.randrange(4))], 1 + case.size(60))
    x, weight, bias = case.randn(*shape, dtype=dtype), torch.randn(shape[-1]), torch.randn(shape[-1])
    found = grootvl_ops.layer_norm(x, weight, bias)
    expected = F.layer_norm(x.double(), shape[-1:], weight.double(), bias.double())
    check(case, [found], [expected], dtype if dtype != torch.float64 else torch.float32)


KINDS = [
    *[fuzz_grid_tree, fuzz_graph_tree, fuzz_tree_scan] * 2,
    fuzz_edge_weights,
    fuzz_neighbour_cosines,
    fuzz_path_tree,
    fuzz_selective_scan,
    fuzz_gated_norm,
    fuzz_layer_norm,
]


def test_random_cases_equal_scipy_and_float64() -> None:
    for number in range(CASES):
        function = KINDS[number % len(KINDS)]
        try:
            function(Case(number))
        except AssertionError as error:
            raise AssertionError(f"case {number} of seed {SEED}, {function.__name__}: {error}") from error


def valid_call(case: Case) -> tuple:
    """A function and right arguments for it."""
    tree = case.tree(2, 6)
    x = torch.randn(2, 6, 4)
    calls = [
        (grootvl_ops.edge_weights, [torch.randn(2, 3, 4, 5), "cosine"]),
        (grootvl_ops.neighbour_cosines, [x, 3]),
        (grootvl_ops.build_tree, [torch.randn(2, 3, 4, 5), "euclidean", 0]),
        (grootvl_ops.build_tree_from_grid, [torch.randn(2, 17), 3, 4, 0]),
        (grootvl_ops.build_tree_from_edges, [torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.rand(2, 3), 3, 0]),
        (grootvl_ops.path_tree, [torch.randperm(6)]),
        (grootvl_ops.check_tree, [tree]),
        (grootvl_ops.tree_scan, [x, torch.rand(2, 6, 4), tree, "both"]),
        (
            grootvl_ops.selective_scan,
            [x, x[..., :2], torch.randn(4, 2), torch.randn(4), torch.randn(4, 3), x[..., :3], tree, "up", x[..., 1:]],
        ),
        (grootvl_ops.gated_norm, [x, x, x, x[..., 0], *[torch.randn(4)] * 5, 1e-5]),
        (grootvl_ops.layer_norm, [x, torch.randn(4), torch.randn(4), 1e-5]),
        (grootvl_ops.add_layer_norm, [x, x + 1, torch.randn(4), torch.randn(4), 1e-5]),
    ]
    return case.random.choice(calls)


def spoiled(case: Case, argument: object) -> object:
    """Something else of the same type."""
    if isinstance(argument, Tree):
        fields = list(argument)
        place = case.random.randrange(3)
        fields[place] = spoiled(case, fields[place])
        return Tree(*fields)
    if isinstance(argument, str):
        return case.random.choice(["", "x", "BOTH", "cosine ", "\0", "down" * 1000])
    if isinstance(argument, float):
        return case.random.choice([0.0, -1.0, float("nan"), float("inf")])
    if isinstance(argument, int):
        return case.random.choice([-1, 0, 2, 7, 2**31, -(2**31) - 1, 2**62])
    shape = list(argument.shape)
    kind = case.random.randrange(9)
    if kind == 0:
        return argument.to(case.random.choice([torch.int64, torch.int32, torch.bool, torch.complex64, torch.float16]))
    if kind == 1:
        return argument.unsqueeze(case.random.randrange(len(shape) + 1))
    if kind == 2:
        return argument[0]
    if kind == 3:
        shape[case.random.randrange(len(shape))] = case.random.choice([0, 1, 13])
        return torch.ones(shape, dtype=argument.dtype)
    if kind == 4:
        return argument.to("meta")
    if kind == 5:
        return argument.to_sparse()
    if kind == 6:
        return torch.tensor(1).to(argument.dtype)
    if kind == 7 and argument.is_floating_point():
        return torch.full_like(argument, case.random.choice([float("nan"), float("inf"), -1e30, 0.0]))
    if kind == 7:  # vertices out of range, cycles, sizes that do not add up
        high = case.random.choice([len(shape) + 5, 2**31 - 1])
        return torch.randint(-high, high, shape).to(argument.dtype)
    if argument.is_floating_point():
        return argument.clone().requires_grad_()
    return torch.randint(0, max(shape[-1], 1), shape).to(argument.dtype)


def test_random_wrong_arguments_raise_and_never_crash() -> None:
    raised = 0
    for number in range(CASES):
        case = Case(number)
        function, arguments = valid_call(case)
        function(*arguments)
        for place in case.random.sample(range(len(arguments)), case.random.choice((1, min(2, len(arguments))))):
            arguments[place] = spoiled(case, arguments[place])
        try:
            function(*arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            assert str(error), f"case {number} of seed {SEED}: {function.__name__} raised without a message"
            raised += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {SEED}: {function.__name__}: {error!r}") from error
    assert raised > CASES / 3, "most of the arguments must be wrong, or the test tries nothing"

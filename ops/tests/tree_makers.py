"""Trees of chosen shapes for the tests of the scan, made without the operations that are tested."""

from __future__ import annotations

import random

import oracles
import torch

from grootvl_ops import Tree


def tree_of(parents: list[list[int]], device: str = "cpu") -> Tree:
    """A batch of trees from each vertex's parent. Roots are their own parents."""
    fields = [oracles.parent_to_tree(parent, top_down(parent)) for parent in parents]
    parent, order, size = torch.tensor(fields, dtype=torch.int32, device=device).view(len(parents), 3, -1).unbind(1)
    return Tree(parent.contiguous(), order.contiguous(), size.contiguous())


def top_down(parent: list[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for vertex, above in enumerate(parent):
        if vertex != above:
            children.setdefault(above, []).append(vertex)
    found = [vertex for vertex, above in enumerate(parent) if vertex == above]
    for vertex in found:  # grows while it is walked
        found.extend(children.get(vertex, ()))
    return found


def shuffled(parent: list[int], generator: random.Random) -> list[int]:
    """The same tree with its vertices renumbered at random."""
    names = list(range(len(parent)))
    generator.shuffle(names)
    renumbered = [0] * len(parent)
    for vertex, above in enumerate(parent):
        renumbered[names[vertex]] = names[above]
    return renumbered


def path(num_vertices: int) -> list[int]:
    """As a snake over a constant map: one long branch from the root."""
    return [max(vertex - 1, 0) for vertex in range(num_vertices)]


def two_arms(num_vertices: int) -> list[int]:
    """A path rooted in its middle."""
    middle = num_vertices // 2
    return [vertex - 1 if vertex > middle else min(vertex + 1, middle) for vertex in range(num_vertices)]


def star(num_vertices: int) -> list[int]:
    return [0] * num_vertices


def star_from_a_leaf(num_vertices: int) -> list[int]:
    return [0, 0] + [1] * (num_vertices - 2) if num_vertices > 1 else [0]


def comb(num_vertices: int) -> list[int]:
    """A path with a leaf at each vertex: each vertex has a large and a small subtree."""
    return [0] + [vertex - 1 if vertex % 2 else max(vertex - 2, 0) for vertex in range(1, num_vertices)]


def binary(num_vertices: int) -> list[int]:
    return [max(vertex - 1, 0) // 2 for vertex in range(num_vertices)]


def scattered(num_vertices: int) -> list[int]:
    """Each vertex below any earlier one."""
    generator = random.Random(num_vertices)
    return [0] + [generator.randrange(vertex) for vertex in range(1, num_vertices)]


def forest(num_vertices: int) -> list[int]:
    """Three trees over one set of vertices, as an unconnected graph gives them on CUDA."""
    first, second = num_vertices // 3, num_vertices // 2
    parent = scattered(num_vertices)
    parent[first:second] = [first + above for above in binary(second - first)]
    parent[second:] = [second + above for above in path(num_vertices - second)]
    return parent


SHAPES = {make.__name__: make for make in (path, two_arms, star, star_from_a_leaf, comb, binary, scattered, forest)}


def make_tree(shape: str, batch: int, num_vertices: int, device: str = "cpu") -> Tree:
    """A batch of trees of one shape, each with its own numbering, and so with its own root."""
    parent = SHAPES[shape](num_vertices)
    return tree_of([shuffled(parent, random.Random(item)) for item in range(batch)], device)

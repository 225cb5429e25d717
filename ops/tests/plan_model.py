"""How the CUDA kernels divide a scan, in plain and slow Python: runs, sections, summaries, joins and walks.

The definitions are those of csrc/cuda/scan/scan.cuh, for one tree and all of its channels. What the kernels do for
speed alone is left out: tiles, prefetching, and copies that fill up a tile.

*Elements* are what a walk goes over, in postorder: the vertices of a run, the runs of a section, or all sections. All
three follow the same equations, since a vertex is a run whose E is the sum over its children: U = P = x, beta = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

Array = np.ndarray  # (D,) of an element, (L, D) of all vertices


@dataclass(frozen=True)
class Node:
    """A vertex, or a run or section, which its last vertex stands for."""

    vertex: int
    size: int  # of the vertex's subtree
    size_above: int  # of its parent's subtree
    above: int  # place of the element that the parent is in; of a root its own
    push: bool  # of a vertex: a leaf that begins a path that ends at a light vertex; of a run: no run is below it
    light: bool  # has a sibling before it in the postorder
    root: bool


@dataclass(frozen=True)
class Piece:
    """A run of vertices, or a section of runs."""

    begin: int  # place of its first element
    end: int  # one past the place of its last
    chain: tuple[int, ...]  # places of its elements whose subtrees are at least as large as a piece should be

    @property
    def bottom(self) -> int | None:
        """The element that the pieces below hang on. A piece of small trees has none."""
        return self.chain[0] if self.chain else None

    @property
    def places(self) -> range:
        return range(self.begin, self.end)


class Summary(NamedTuple):
    """What an element makes of what enters it: u_end = U + beta E and h_bottom = E + P + beta a_end m."""

    U: Array
    P: Array
    beta: Array
    a_end: Array


@dataclass
class Values:
    """Of each element of a piece, by its place."""

    E: dict[int, Array] = field(default_factory=dict)  # what enters it from below
    u_end: dict[int, Array] = field(default_factory=dict)
    h_above: dict[int, Array] = field(default_factory=dict)  # h of the end's parent; 0 at a root
    h_bottom: dict[int, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    vertices: list[Node]
    runs: list[Piece]
    run_nodes: list[Node]
    sections: list[Piece]
    section_nodes: list[Node]


def make_plan(
    parent: Sequence[int], order: Sequence[int], subtree_size: Sequence[int], run_length: int, section_length: int
) -> Plan:
    """The plan of one tree, for runs of about `run_length` vertices and sections of about `section_length`, a multiple.

    There is one run, or one section, if its length is larger than the tree.
    """
    vertices = vertex_nodes(parent, order, subtree_size)
    runs = cut(vertices, run_length)
    run_nodes = piece_nodes(vertices, runs)
    sections = cut(run_nodes, section_length)
    return Plan(vertices, runs, run_nodes, sections, piece_nodes(run_nodes, sections))


def vertex_nodes(parent: Sequence[int], order: Sequence[int], subtree_size: Sequence[int]) -> list[Node]:
    """The vertices in postorder."""
    postorder = list(reversed(order))
    place = {vertex: i for i, vertex in enumerate(postorder)}
    first_child: dict[int, int] = {}
    for vertex in postorder:
        if parent[vertex] != vertex:
            first_child.setdefault(parent[vertex], vertex)

    def is_light(vertex: int) -> bool:
        return parent[vertex] != vertex and first_child[parent[vertex]] != vertex

    def path_is_light(leaf: int) -> bool:
        top = leaf
        while parent[top] != top and not is_light(top):
            top = parent[top]
        return is_light(top)

    return [
        Node(
            vertex,
            subtree_size[vertex],
            subtree_size[parent[vertex]],
            place[parent[vertex]],
            push=subtree_size[vertex] == 1 and path_is_light(vertex),
            light=is_light(vertex),
            root=parent[vertex] == vertex,
        )
        for vertex in postorder
    ]


def cut(elements: list[Node], length: int) -> list[Piece]:
    """Cuts vertices into runs, or runs into sections."""
    pieces: list[Piece] = []
    for i, node in enumerate(elements):
        large = node.size >= length and (node.root or node.size // length != node.size_above // length)
        if large or i == len(elements) - 1:
            begin = pieces[-1].end if pieces else 0
            chain = tuple(place for place in range(begin, i + 1) if elements[place].size >= length)
            pieces.append(Piece(begin, i + 1, chain))
    return pieces


def piece_nodes(elements: list[Node], pieces: list[Piece]) -> list[Node]:
    """The pieces as elements."""
    piece_of = [p for p, piece in enumerate(pieces) for _ in piece.places]
    ends = [elements[piece.end - 1] for piece in pieces]
    above = [p if end.root else piece_of[end.above] for p, end in enumerate(ends)]
    return [replace(end, above=above[p], push=p not in above[:p]) for p, end in enumerate(ends)]


def solve(elements: list[Node], of: list[Summary], piece: Piece, up: bool, E: Array, m: Array) -> Values:
    """The two sweeps over a piece from their definition. `up`: not a sweep down alone."""
    values, last = Values(), piece.end - 1
    values.E = {i: E if i == piece.bottom else np.zeros_like(E) for i in piece.places}
    for i in piece.places:
        values.u_end[i] = of[i].U + of[i].beta * values.E[i]
        if up and i != last and not elements[i].root:
            values.E[elements[i].above] = values.E[elements[i].above] + of[i].a_end * values.u_end[i]
    for i in reversed(piece.places):
        own_share = of[i].a_end * values.u_end[i] if up else np.zeros_like(E)
        if elements[i].root:
            values.h_above[i] = np.zeros_like(m)
        else:
            values.h_above[i] = m + own_share if i == last else values.h_bottom[elements[i].above]
        from_above = values.h_above[i] - own_share
        values.h_bottom[i] = values.E[i] + of[i].P + of[i].beta * of[i].a_end * from_above
    return values


def summarise(elements: list[Node], of: list[Summary], piece: Piece, up: bool) -> Summary:
    """A run's summary from its vertices, or a section's from its runs."""
    last = piece.end - 1
    nothing = np.zeros_like(of[last].U)
    values = solve(elements, of, piece, up, E=nothing, m=nothing)
    beta = np.ones_like(nothing)
    for i in piece.chain:
        beta = beta * of[i].beta * (of[i].a_end if i != last else 1)
    P = nothing if piece.bottom is None else values.h_bottom[piece.bottom]
    return Summary(values.u_end[last], P, beta, of[last].a_end)


class Stack:
    """The sums that are pending. A pop that no push belongs to gives NaN, since no result may depend on it."""

    def __init__(self) -> None:
        self.pending: list[Array] = []
        self.highest = 0  # number of sums that were pending at a time
        self.unmatched = 0  # pops that no push belongs to, since the last clear
        self.most_unmatched = 0

    def push(self, value: Array) -> None:
        assert not self.unmatched, "a push after an unmatched pop"
        self.pending.append(value)
        self.highest = max(self.highest, len(self.pending))

    def pop(self) -> Array | float:
        if self.pending:
            return self.pending.pop()
        self.unmatched += 1
        self.most_unmatched = max(self.most_unmatched, self.unmatched)
        return np.nan

    def clear(self) -> None:
        self.pending.clear()
        self.unmatched = 0


def walk(
    elements: list[Node], of: list[Summary], piece: Piece, up: bool, E: Array, h_above: Array, stack: Stack
) -> Values:
    """The two sweeps over a piece as the kernels make them: with a running sum and a stack, without any parent.

    E enters the piece from below, `h_above` is h of the parent of its end.
    """
    values, nothing = Values(), np.zeros_like(E)
    stack.clear()
    running_sum = E
    for i in piece.places:
        node = elements[i]
        if node.push:
            stack.push(running_sum)
        values.E[i] = nothing if node.push else running_sum
        values.u_end[i] = of[i].U + of[i].beta * values.E[i]
        running_sum = of[i].a_end * values.u_end[i] if up else nothing
        if node.light:
            running_sum = running_sum + stack.pop()
        if node.root:
            stack.clear()
    stack.clear()
    h = h_above
    for i in reversed(piece.places):
        node = elements[i]
        if node.root:
            h = nothing
            stack.clear()
        if node.light:
            stack.push(h)
        values.h_above[i] = h
        m = h - of[i].a_end * values.u_end[i] if up else h
        h = values.h_bottom[i] = values.E[i] + of[i].P + of[i].beta * of[i].a_end * m
        if node.push:
            h = stack.pop()
    return values


class Swept(NamedTuple):
    """Of each vertex, (L, D)."""

    u: Array
    h: Array
    h_above: Array  # h of its parent; 0 at a root


@dataclass(frozen=True)
class Sweeps:
    """A scan along one tree, put together from sections and runs."""

    plan: Plan
    decay: Array  # (L, D)
    stack: Stack = field(default_factory=Stack)

    def summaries(self, x: Array, up: bool) -> tuple[list[Summary], list[Summary], list[Summary]]:
        """Of vertices, runs and sections."""
        plan = self.plan
        vertices = []
        for node in plan.vertices:
            a = np.zeros_like(x[node.vertex]) if node.root else self.decay[node.vertex]
            vertices.append(Summary(x[node.vertex], x[node.vertex], np.ones_like(a), a))
        runs = [summarise(plan.vertices, vertices, run, up) for run in plan.runs]
        return vertices, runs, [summarise(plan.run_nodes, runs, section, up) for section in plan.sections]

    def joins(self, x: Array, up: bool) -> tuple[Values, Values]:
        """What enters the runs, and the sections."""
        plan, nothing = self.plan, np.zeros(x.shape[1])
        _, runs, sections = self.summaries(x, up)
        whole = Piece(0, len(plan.sections), ())
        of_sections = walk(plan.section_nodes, sections, whole, up, nothing, nothing, self.stack)
        of_runs = Values()
        for s, section in enumerate(plan.sections):
            E, h_above = of_sections.E[s], of_sections.h_above[s]
            of_section = walk(plan.run_nodes, runs, section, up, E, h_above, self.stack)
            of_runs.E.update(of_section.E)
            of_runs.h_above.update(of_section.h_above)
        return of_runs, of_sections

    def sweep(self, x: Array, up: bool) -> Swept:
        """Up and down; or, if not `up`, down alone."""
        plan, swept = self.plan, Swept(*(np.full_like(x, np.nan) for _ in Swept._fields))
        vertices, _, _ = self.summaries(x, up)
        of_runs, _ = self.joins(x, up)
        for r, run in enumerate(plan.runs):
            values = walk(plan.vertices, vertices, run, up, of_runs.E[r], of_runs.h_above[r], self.stack)
            for i in run.places:
                vertex = plan.vertices[i].vertex
                swept.u[vertex] = values.u_end[i]
                swept.h[vertex] = values.h_bottom[i]
                swept.h_above[vertex] = values.h_above[i]
        return swept

    def scan(self, x: Array, direction: str) -> Array:
        """The result of `tree_scan`."""
        swept = self.sweep(x, up=direction != "down")
        return swept.u if direction == "up" else swept.h

    def gradients(self, x: Array, grad: Array, direction: str) -> tuple[Array, Array]:
        """For x and the decay, from the gradient of the result."""
        of_x = self.sweep(x, up=direction != "down")
        of_grad = self.sweep(grad, up=direction != "up")
        if direction == "up":
            dx, ddecay = of_grad.h, of_x.u * of_grad.h_above
        elif direction == "down":
            dx, ddecay = of_grad.u, of_grad.u * of_x.h_above
        else:
            dx = of_grad.h
            ddecay = of_grad.u * (of_x.h_above - self.decay * of_x.u) + of_x.u * (
                of_grad.h_above - self.decay * of_grad.u
            )
        roots = [node.vertex for node in self.plan.vertices if node.root]
        ddecay[roots] = 0
        return dx, ddecay

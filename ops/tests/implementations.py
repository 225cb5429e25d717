"""The two implementations under test behind one face: the registered operations, and the plain PyTorch reference."""

from __future__ import annotations

import torch
from torch import Tensor

import grootvl_ops
from grootvl_ops import Tree, reference


class Operations:
    """What users call. On compiled kernels where there are some for the device."""

    edge_weights = staticmethod(grootvl_ops.edge_weights)
    neighbour_cosines = staticmethod(grootvl_ops.neighbour_cosines)
    build_tree = staticmethod(grootvl_ops.build_tree)
    build_tree_from_grid = staticmethod(grootvl_ops.build_tree_from_grid)
    build_tree_from_edges = staticmethod(grootvl_ops.build_tree_from_edges)
    tree_scan = staticmethod(grootvl_ops.tree_scan)

    @staticmethod
    def gradients(
        x: Tensor, decay: Tensor, tree: Tree, grad: Tensor, direction: str = "both"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The scan's result and its gradients for x and decay."""
        # Views keep their strides, which `clone` would not.
        x, decay = x.detach().requires_grad_(), decay.detach().requires_grad_()
        h = grootvl_ops.tree_scan(x, decay, tree, direction)
        return (h.detach(), *torch.autograd.grad(h, (x, decay), grad))


class Reference:
    """The functions of `grootvl_ops.reference`, called directly."""

    edge_weights = staticmethod(reference.edge_weights)
    neighbour_cosines = staticmethod(reference.neighbour_cosines)

    @staticmethod
    def build_tree(features: Tensor, metric: str = "cosine", root: int = 0) -> Tree:
        weights = reference.edge_weights(features, metric)
        return Tree(*reference.grid_tree(weights, features.shape[1], features.shape[2], root))

    @staticmethod
    def build_tree_from_grid(weights: Tensor, height: int, width: int, root: int = 0) -> Tree:
        return Tree(*reference.grid_tree(weights, height, width, root))

    @staticmethod
    def build_tree_from_edges(edges: Tensor, weights: Tensor, num_vertices: int, root: int = 0) -> Tree:
        edges = edges.expand(len(weights), -1, -1)
        return Tree(*reference.graph_tree(edges, weights, num_vertices, root))

    @staticmethod
    def tree_scan(x: Tensor, decay: Tensor, tree: Tree, direction: str = "both") -> Tensor:
        return reference.tree_scan(x, decay, *tree, direction)

    @staticmethod
    def gradients(
        x: Tensor, decay: Tensor, tree: Tree, grad: Tensor, direction: str = "both"
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = reference.tree_scan(x, decay, *tree, direction)
        return (h, *reference.tree_scan_backward(grad, x, decay, *tree, direction))

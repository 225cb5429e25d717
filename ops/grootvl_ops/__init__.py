"""Minimum spanning trees of feature maps, and scans along them: compiled operations for PyTorch.

    tree = grootvl_ops.build_tree(features)            # (B, H, W, C) -> Tree over L = H * W vertices
    h = grootvl_ops.tree_scan(x, decay, tree)          # (B, L, D), (B, L, D) -> (B, L, D)

The operations come from GrootVL / MambaTree (arXiv 2406.02395). They run on compiled kernels for CPU and CUDA where the
package was installed with a compiler, and on `grootvl_ops.reference` elsewhere; `backend()` tells which.

* `trees`: which tree. From the features of a map, from any graph, or along a path.
* `scans`: what is scanned, and in which direction.
* `norms`, `convolutions`, `mlps`: the normalisations around a scan, the convolution before it, and the MLP after it.
* `mixers`: all that is before the choice of a tree in one operation, and all that is after it in another.
* `blocks`: residual blocks of a mixer and an MLP in one operation.
"""

from importlib.metadata import PackageNotFoundError, version

from ._loading import backend
from .blocks import BlockParameters, tree_blocks
from .convolutions import depthwise_conv_silu
from .mixers import mixer_input, mixer_output
from .mlps import gelu_mlp
from .norms import add_layer_norm, gated_norm, layer_norm
from .scans import DIRECTIONS, merged_scan, selective_scan, tree_scan
from .trees import (
    METRICS,
    Tree,
    build_tree,
    build_tree_from_edges,
    build_tree_from_grid,
    check_tree,
    edge_weights,
    grid_edges,
    neighbour_cosines,
    path_tree,
)

__all__ = [
    "DIRECTIONS",
    "METRICS",
    "BlockParameters",
    "Tree",
    "add_layer_norm",
    "backend",
    "build_tree",
    "build_tree_from_edges",
    "build_tree_from_grid",
    "check_tree",
    "depthwise_conv_silu",
    "edge_weights",
    "gated_norm",
    "gelu_mlp",
    "grid_edges",
    "layer_norm",
    "merged_scan",
    "mixer_input",
    "mixer_output",
    "neighbour_cosines",
    "path_tree",
    "selective_scan",
    "tree_blocks",
    "tree_scan",
]

try:
    __version__ = version("grootvl-ops")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

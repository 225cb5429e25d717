"""The operations in plain PyTorch: short, obvious, for any device.

This package is the definition that the compiled kernels are tested against, and what runs where there are no compiled
kernels. Symbols are those of the GrootVL paper (arXiv 2406.02395): an input ``x`` (the paper's discretised input, xi),
a decay ``a`` for each vertex, which belongs to the edge between that vertex and its parent, and the tree itself.

Shapes: batch B, vertices L (L = H * W on a map, row-major), edges E, channels D, states N.
"""

from .convolutions import depthwise_conv_silu, depthwise_conv_silu_backward, depthwise_conv_silu_backward_into
from .mlps import bias_backward, cast_weights, cast_weights_into, gelu_mlp, gelu_mlp_backward, gelu_mlp_fused_backward
from .norms import (
    add_layer_norm,
    add_layer_norm_backward,
    gated_norm,
    gated_norm_backward,
    gated_norm_backward_into,
    layer_norm,
    layer_norm_backward,
)
from .scans import (
    DIRECTIONS,
    accumulation_dtype,
    down_sweep,
    merged_scan,
    merged_scan_backward,
    rerooting_sweep,
    selective_scan,
    selective_scan_backward,
    stepped_scan,
    stepped_scan_backward,
    tree_scan,
    tree_scan_backward,
    up_sweep,
)
from .trees import (
    METRICS,
    edge_weights,
    graph_tree,
    grid_edges,
    grid_tree,
    kruskal,
    neighbour_cosines,
    path_tree,
    root_tree,
)

__all__ = [
    "DIRECTIONS",
    "METRICS",
    "accumulation_dtype",
    "add_layer_norm",
    "add_layer_norm_backward",
    "bias_backward",
    "cast_weights",
    "cast_weights_into",
    "depthwise_conv_silu",
    "depthwise_conv_silu_backward",
    "depthwise_conv_silu_backward_into",
    "down_sweep",
    "edge_weights",
    "gated_norm",
    "gated_norm_backward",
    "gated_norm_backward_into",
    "gelu_mlp",
    "gelu_mlp_backward",
    "gelu_mlp_fused_backward",
    "graph_tree",
    "grid_edges",
    "grid_tree",
    "kruskal",
    "layer_norm",
    "layer_norm_backward",
    "merged_scan",
    "merged_scan_backward",
    "neighbour_cosines",
    "path_tree",
    "rerooting_sweep",
    "root_tree",
    "selective_scan",
    "selective_scan_backward",
    "stepped_scan",
    "stepped_scan_backward",
    "tree_scan",
    "tree_scan_backward",
    "up_sweep",
]

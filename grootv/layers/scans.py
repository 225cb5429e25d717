"""Along which trees, and in which direction, a map is scanned.

Each function takes a map (B, H, W, C) and returns what a mixer scans: a list of trees over the L = H W pixels, each
with a direction of `grootvl_ops.selective_scan`. The mixer sums the results. A new scan is a new function here.
"""

import torch
from torch import Tensor

import grootvl_ops
from grootvl_ops import Tree

__all__ = ["spanning_tree"]

# A traced call would keep the map size that it was traced with; scripted inside a trace, it takes any.
_build_tree = torch.jit.script_if_tracing(grootvl_ops.build_tree)


def spanning_tree(features: Tensor, metric: str = "cosine", direction: str = "both") -> list[tuple[Tree, str]]:
    """One scan, along the minimum spanning tree of the map (paper, section 3.2). Its root is the first pixel.

    Args:
        features: (B, H, W, C), floating point. No gradient passes through the choice of a tree.
        metric: Dissimilarity of neighbouring pixels: "cosine", "euclidean" or "manhattan".
        direction: "both": every pixel aggregates the whole map; "up": the subtree below it; "down": the path from the
            root to it.
    """
    return [(_build_tree(features, metric), direction)]

"""Layers of GrootV for use in any network: state space mixers along trees and paths, their base class, scans and norms.

All work on channels-last maps (B, H, W, C).
"""

from .norms import LayerNorm
from .path_ssm import PathSSM
from .scans import bidirectional, cross, cross_paths, raster, spanning_tree
from .selective_ssm import SelectiveSSM
from .ss2d import SS2D
from .tree_ssm import TreeSSM

__all__ = [
    "SS2D",
    "LayerNorm",
    "PathSSM",
    "SelectiveSSM",
    "TreeSSM",
    "bidirectional",
    "cross",
    "cross_paths",
    "raster",
    "spanning_tree",
]

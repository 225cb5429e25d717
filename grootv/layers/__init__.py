"""Layers of GrootV for use in any network: the tree state space mixer, its base class, scans and norms.

All work on channels-last maps (B, H, W, C).
"""

from .norms import LayerNorm
from .scans import spanning_tree
from .selective_ssm import SelectiveSSM
from .tree_ssm import TreeSSM

__all__ = ["LayerNorm", "SelectiveSSM", "TreeSSM", "spanning_tree"]

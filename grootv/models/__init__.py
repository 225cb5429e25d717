"""The GrootV models and their parts."""

from .grootv import (
    GrootV,
    checkpoint_filter_fn,
    grootv_base,
    grootv_nano,
    grootv_small,
    grootv_tiny,
)
from .tree_ssm import TreeSSM

__all__ = [
    "GrootV",
    "TreeSSM",
    "checkpoint_filter_fn",
    "grootv_base",
    "grootv_nano",
    "grootv_small",
    "grootv_tiny",
]

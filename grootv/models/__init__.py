"""The GrootV models and their parts."""

from grootv.layers import TreeSSM

from .card import model_card
from .grootv import (
    GrootV,
    checkpoint_filter_fn,
    grootv_base,
    grootv_nano,
    grootv_small,
    grootv_tiny,
)
from .safe_loading import guard_timm

__all__ = [
    "GrootV",
    "TreeSSM",
    "checkpoint_filter_fn",
    "grootv_base",
    "grootv_nano",
    "grootv_small",
    "grootv_tiny",
    "model_card",
]

guard_timm()

"""The GrootV and VMamba models and their parts."""

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
from .vmamba import (
    VMamba,
    vmamba_base_s1l20,
    vmamba_base_s2l15,
    vmamba_nano,
    vmamba_small_s1l20,
    vmamba_small_s2l15,
    vmamba_tiny_s1l8,
    vmamba_tiny_s2l5,
)

__all__ = [
    "GrootV",
    "TreeSSM",
    "VMamba",
    "checkpoint_filter_fn",
    "grootv_base",
    "grootv_nano",
    "grootv_small",
    "grootv_tiny",
    "model_card",
    "vmamba_base_s1l20",
    "vmamba_base_s2l15",
    "vmamba_nano",
    "vmamba_small_s1l20",
    "vmamba_small_s2l15",
    "vmamba_tiny_s1l8",
    "vmamba_tiny_s2l5",
]

guard_timm()

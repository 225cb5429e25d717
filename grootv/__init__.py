"""GrootV, the vision backbone of GrootVL / MambaTree (arXiv 2406.02395), for timm and plain PyTorch.

Importing this package registers `grootv_nano`, `grootv_tiny`, `grootv_small` and `grootv_base` in timm:

    import grootv, timm
    model = timm.create_model("grootv_tiny", num_classes=10)
"""

from importlib.metadata import PackageNotFoundError, version

from .models import GrootV, TreeSSM

__all__ = ["GrootV", "TreeSSM"]

try:
    __version__ = version("grootv")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

"""Vision backbones for timm and plain PyTorch: GrootV of GrootVL / MambaTree (arXiv 2406.02395), and VMamba
(arXiv 2401.10166).

Importing this package registers their sizes, `grootv_*` and `vmamba_*`, in timm:

    import grootv, timm
    model = timm.create_model("grootv_tiny", num_classes=10)
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

if find_spec("grootvl_ops") is None:
    raise ModuleNotFoundError(
        "grootv needs the package grootvl_ops, its operations, which is not installed. Run in the folder of grootv's "
        "source code: pip install ./ops .",
        name="grootvl_ops",
    )

from . import flops
from .models import GrootV, TreeSSM, VMamba, model_card

__all__ = ["GrootV", "TreeSSM", "VMamba", "flops", "model_card"]

try:
    __version__ = version("grootv")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

"""Training, evaluation and dense prediction with OpenMMLab's tools.

Three packages: `runtime` is what runs of every task use, `classification` trains any timm model as a classifier, and
`dense` is for detection and segmentation.

Configs load this package by `custom_imports = dict(imports=["grootv.openmmlab"], allow_failed_imports=False)`, which
registers its parts in mmengine's registries. `import grootv` alone imports nothing of it.
"""

try:
    import mmengine.hooks  # noqa: F401  needs OpenCV, which mmengine does not declare
except ImportError as error:
    raise ImportError(
        f"grootv.openmmlab needs mmengine and OpenCV ({error}): pip install 'grootv[train]' "
        "(or: pip install onedl-mmengine opencv-python-headless)"
    ) from error

import grootv  # noqa: F401  registers the models in timm

from . import classification, dense, runtime
from .dense.mmcv_ops import install_mmcv_ops
from .dense.requirements import base_configs

__all__ = ["base_configs", "classification", "dense", "install_mmcv_ops", "runtime"]

install_mmcv_ops()

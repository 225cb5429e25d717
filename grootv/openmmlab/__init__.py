"""Training, evaluation and dense prediction with OpenMMLab's tools.

Configs load this package by `custom_imports = dict(imports=["grootv.openmmlab"], allow_failed_imports=False)`, which
registers its parts in mmengine's registries. `import grootv` alone imports nothing of it.
"""

try:
    import mmengine.hooks  # noqa: F401  its first part that needs OpenCV, which it does not declare
except ImportError as error:
    raise ImportError(
        f"grootv.openmmlab needs mmengine and OpenCV ({error}): pip install 'grootv[train]' "
        "(or: pip install onedl-mmengine opencv-python-headless)"
    ) from error

import grootv  # noqa: F401  registers the models in timm

from . import backbone, checkpoint, classifier, data_files, datasets, distributed, hooks, metrics, optim, runner
from .mmcv_ops import install_mmcv_ops
from .requirements import base_configs

__all__ = [
    "backbone",
    "base_configs",
    "checkpoint",
    "classifier",
    "data_files",
    "datasets",
    "distributed",
    "hooks",
    "metrics",
    "optim",
    "runner",
]

install_mmcv_ops()

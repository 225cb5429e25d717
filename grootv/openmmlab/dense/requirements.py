"""Find the OpenMMLab packages, and say what to do if they are missing or do not work."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

from .mmcv_ops import build_command

INSTALL_COMMAND = 'pip install "grootv[openmmlab]"'
_DISTRIBUTIONS = {"mmcv": "onedl-mmcv", "mmdet": "onedl-mmdetection", "mmseg": "onedl-mmsegmentation"}


def require(package: str) -> None:
    """Import `package`, "mmdet" or "mmseg", and the mmcv under it.

    Raises:
        ImportError: one of them is missing, does not import, or mmcv's compiled operations do not load. The message
            names the distribution and the command that installs it.
    """
    for name in ("mmcv", package):
        if find_spec(name) is None:
            raise ImportError(f"{name} is not installed ({_DISTRIBUTIONS[name]}): {INSTALL_COMMAND}")
        try:
            importlib.import_module(name)
        except Exception as error:  # mmdet and mmseg assert the version of mmcv
            raise ImportError(
                f"{name} is installed but does not import ({error}). Versions that work together: {INSTALL_COMMAND}"
            ) from error
    try:
        importlib.import_module("mmcv._ext")
    except ImportError as error:
        raise ImportError(
            f"mmcv's compiled operations do not load ({error}), probably because they were compiled for another "
            f"torch. To compile them again: {build_command()}"
        ) from error


def base_configs(package: str, *names: str) -> list[str]:
    """Paths of configs that come with an installed `package`, for the `_base_` of a config.

    mmengine's own "mmseg::..." looks for a distribution named mmsegmentation and does not find the maintained one.

    Args:
        package: "mmdet" or "mmseg".
        names: paths below the package's `configs`, such as "_base_/default_runtime.py".

    Raises:
        ImportError: see `require`.
        FileNotFoundError: the package has no such config.
    """
    require(package)
    folder = Path(importlib.import_module(package).__file__).parent / ".mim" / "configs"
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{package} comes without the config {path}")
    return [str(path) for path in paths]

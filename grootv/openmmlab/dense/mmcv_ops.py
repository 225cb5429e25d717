"""A replacement for mmcv's compiled operations where they are missing.

Pip usually installs mmcv without its compiled module `mmcv._ext`. Importing `mmcv.ops`, which mmdet does, then fails.
Mask R-CNN and most detectors use two of its operations, NMS and RoIAlign, and torchvision has both.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import NoReturn

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from mmengine.logging import print_log
from torch import Tensor


def build_command() -> str:
    """The command that compiles mmcv's operations: of the original line if it is installed, else of the maintained."""
    name = source = "onedl-mmcv"
    for original in ("mmcv", "mmcv-lite"):
        with suppress(PackageNotFoundError):
            name, source = "mmcv", f"mmcv=={version(original)}"
    return f"pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall --no-binary {name} {source}"


def install_mmcv_ops() -> bool:
    """Register the replacement as `mmcv._ext` if mmcv is installed without its compiled module.

    Modules of mmdet that were imported before have found no `mmcv.ops` and do not use it; the log then warns.

    Returns:
        Whether the replacement is in use.
    """
    if "mmcv._ext" not in sys.modules:
        mmcv = importlib.util.find_spec("mmcv")
        if mmcv is None or PathFinder.find_spec("mmcv._ext", mmcv.submodule_search_locations) is not None:
            return False
        sys.modules["mmcv._ext"] = _Replacement("mmcv._ext", __doc__)
        if "mmdet.structures" in sys.modules:
            print_log(
                "mmdet was imported before grootv.openmmlab, so it does not use torchvision's operations in place of "
                "mmcv's missing ones: import grootv.openmmlab first.",
                logger="current",
                level=logging.WARNING,
            )
    return isinstance(sys.modules["mmcv._ext"], _Replacement)


class _Replacement(ModuleType):
    """Has every operation: NMS and RoIAlign work, all others raise an error that says what they need."""

    def __init__(self, name: str, doc: str | None) -> None:
        super().__init__(name, doc)
        self.__spec__ = ModuleSpec(name, None)
        self.nms = nms
        self.roi_align_forward = roi_align_forward
        self.roi_align_backward = roi_align_backward

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise RuntimeError(
                f"mmcv is installed without its compiled operations, and torchvision has no replacement for "
                f"{name}. To compile them (about ten minutes): {build_command()}"
            )

        return missing


@cache
def _warn_once() -> None:
    print_log(
        "mmcv is installed without its compiled operations: torchvision's nms and roi_align replace them.",
        logger="current",
        level=logging.WARNING,
    )


def _at_least_float32(x: Tensor) -> Tensor:
    """torchvision's kernels do not take every half precision on every device."""
    return x if x.dtype == torch.float64 else x.float()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices (K,) of the boxes to keep, in order of decreasing score.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: a box that overlaps one of higher score by more than this is removed.
        offset: width is x2 - x1 + offset, height likewise.
    """
    _warn_once()
    boxes = _at_least_float32(boxes)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torch.ops.torchvision.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average-pool the regions `rois` (K, 5) of `input` (B, C, H, W) into `output` (K, C, height, width).

    Raises:
        RuntimeError: `pool_mode` is 0, max-pooling, which torchvision does not have.
    """
    _warn_once()
    if pool_mode == 0:
        raise RuntimeError(
            f"RoIAlign with max-pooling needs mmcv's compiled operations; to compile them: {build_command()}"
        )
    input = _at_least_float32(input)
    output.copy_(
        torch.ops.torchvision.roi_align(
            input, rois.to(input.dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient for `roi_align_forward`'s input into `grad_input` (B, C, H, W)."""
    grad_output = _at_least_float32(grad_output)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output,
            rois.to(grad_output.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )

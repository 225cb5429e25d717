"""A stand-in for mmcv's compiled operations where they are missing.

Pip usually installs mmcv without its compiled module `mmcv._ext`, and then `mmcv.ops`, which mmdet imports, does not
import. Of its operations Mask R-CNN and most detectors use two, NMS and RoIAlign, and torchvision has both.
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
    """The command that compiles mmcv's operations: of the maintained line, or of the original one if that is there."""
    name = source = "onedl-mmcv"
    for original in ("mmcv", "mmcv-lite"):
        with suppress(PackageNotFoundError):
            name, source = "mmcv", f"mmcv=={version(original)}"
    return f"pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall --no-binary {name} {source}"


def install_mmcv_ops() -> bool:
    """Register the stand-in as `mmcv._ext` if mmcv is installed without its compiled module.

    It comes too late for modules of mmdet that are imported already: those have noticed that `mmcv.ops` does not
    import, and the log says so.

    Returns:
        Whether the stand-in serves.
    """
    if "mmcv._ext" not in sys.modules:
        mmcv = importlib.util.find_spec("mmcv")
        if mmcv is None or PathFinder.find_spec("mmcv._ext", mmcv.submodule_search_locations) is not None:
            return False
        sys.modules["mmcv._ext"] = _StandIn("mmcv._ext", __doc__)
        if "mmdet.structures" in sys.modules:
            print_log(
                "mmdet was imported before grootv.openmmlab, without mmcv's operations, and will not find those of "
                "torchvision in their place: import grootv.openmmlab first.",
                logger="current",
                level=logging.WARNING,
            )
    return isinstance(sys.modules["mmcv._ext"], _StandIn)


class _StandIn(ModuleType):
    """Has every operation: two that work, all others say what they need when they are called."""

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
                f"mmcv is installed without its compiled operations, and {name} is one that torchvision cannot stand "
                f"in for. To compile them (some ten minutes): {build_command()}"
            )

        return missing


@cache
def _say_once() -> None:
    print_log(
        "mmcv is installed without its compiled operations: torchvision's nms and roi_align serve instead.",
        logger="current",
        level=logging.WARNING,
    )


def _at_least_float32(x: Tensor) -> Tensor:
    """torchvision's kernels do not take every half precision on every device."""
    return x if x.dtype == torch.float64 else x.float()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices (K,) of the boxes that stay, by falling score.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: Boxes overlapping a better one by more than this go.
        offset: Width is x2 - x1 + offset, height likewise.
    """
    _say_once()
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
        RuntimeError: max-pooling (`pool_mode` 0) was asked for.
    """
    _say_once()
    if pool_mode == 0:
        raise RuntimeError(
            f"RoIAlign with max-pooling needs mmcv's compiled operations; to get them: {build_command()}"
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

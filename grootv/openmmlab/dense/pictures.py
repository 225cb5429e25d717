"""Pictures of predictions beside the truth, of detectors and segmentors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from PIL import Image


@HOOKS.register_module()
class PredictionPicturesHook(Hook):
    """Draw each image of the test data with its annotations on the left and its predictions on the right.

    Args:
        folder: where the pictures go, under the names of the images.
        min_score: predicted objects with lower scores are left out.
    """

    def __init__(self, folder: str | Path, min_score: float = 0.5) -> None:
        self.folder = Path(folder)
        self.min_score = min_score

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Draw the images of a batch."""
        from grootv.visualization import plot_detections, plot_segmentation

        self.folder.mkdir(parents=True, exist_ok=True)
        classes = runner.test_dataloader.dataset.metainfo["classes"]
        for sample in outputs or ():
            with Image.open(sample.img_path) as file:
                image = np.asarray(file.convert("RGB"))
            if "pred_sem_seg" in sample:
                maps = (sample.gt_sem_seg.data, sample.pred_sem_seg.data)
                figure = plot_segmentation(image, *(labels.squeeze(0).cpu().numpy() for labels in maps), classes)
            else:
                shown = sample.pred_instances[sample.pred_instances.scores >= self.min_score]
                figure = plot_detections(image, as_arrays(sample.gt_instances), as_arrays(shown), classes)
            figure.savefig(self.folder / f"{Path(sample.img_path).stem}.png")


def as_arrays(instances: Any) -> dict[str, np.ndarray]:
    """mmdet's instances as `grootv.visualization.plot_detections` takes them."""
    arrays = {"boxes": instances.bboxes, "labels": instances.labels}
    arrays |= {name: instances[name] for name in ("scores", "masks") if name in instances}
    return {name: _as_array(value) for name, value in arrays.items()}


def _as_array(value: Any) -> np.ndarray:
    if hasattr(value, "to_ndarray"):  # annotated masks, as bitmaps or polygons
        return value.to_ndarray().astype(bool)
    return torch.as_tensor(getattr(value, "tensor", value)).numpy(force=True)

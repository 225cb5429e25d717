"""A metric for segmentation configs. Needs mmseg."""

from __future__ import annotations

from .requirements import require

require("mmseg")

import numpy as np  # noqa: E402
from mmseg.evaluation import IoUMetric  # noqa: E402
from mmseg.registry import METRICS  # noqa: E402


@METRICS.register_module()
class ObjectIoUMetric(IoUMetric):
    """mmseg's `IoUMetric`, and `mIoU_objects`: the mean over all classes but the first, which is the background.

    A background that fills most of every image has an IoU near 1, which raises the mean over few classes.
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics in percent, from the areas of intersection and union by class that `process` collected by image."""
        metrics = super().compute_metrics(results)
        intersection, union = (sum(areas).numpy()[1:] for areas in list(zip(*results, strict=True))[:2])
        with np.errstate(invalid="ignore"):  # a class that is in no label and no prediction
            metrics["mIoU_objects"] = round(100 * float(np.nanmean(intersection / union)), 2)
        return metrics

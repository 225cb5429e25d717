"""What segmentation configs may need besides the backbone. Needs mmseg."""

from __future__ import annotations

from .requirements import require

require("mmseg")

import numpy as np  # noqa: E402
from mmseg.evaluation import IoUMetric  # noqa: E402
from mmseg.registry import METRICS  # noqa: E402


@METRICS.register_module()
class ObjectIoUMetric(IoUMetric):
    """mmseg's `IoUMetric`, and `mIoU_objects`: the mean over all classes but the first, which is the background.

    A background that fills most of every image has an IoU near 1 and lifts the mean of few classes.
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics in per cent of what `process` gathered: areas of intersection and union by class, for each image."""
        metrics = super().compute_metrics(results)
        intersection, union = (sum(areas).numpy()[1:] for areas in list(zip(*results, strict=True))[:2])
        with np.errstate(invalid="ignore"):  # a class that neither image nor prediction has
            metrics["mIoU_objects"] = round(100 * float(np.nanmean(intersection / union)), 2)
        return metrics

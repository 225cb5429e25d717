"""The mean over objects, without the background."""

import pytest

pytest.importorskip("mmengine")
pytest.importorskip("mmseg", reason="mmseg is not installed")

import torch

from grootv.openmmlab.dense.segmentation import ObjectIoUMetric


def test_the_background_does_not_count() -> None:
    """Two images of four pixels each, and classes 0 (background), 1, 2 and 3, which neither image has."""
    labels = [torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 2, 2, 255]])]  # 255 is not evaluated
    predictions = [torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 2, 1]])]
    metric = ObjectIoUMetric(iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": ("background", "one", "two", "three")}
    samples = [
        {"pred_sem_seg": {"data": prediction}, "gt_sem_seg": {"data": label}}
        for prediction, label in zip(predictions, labels, strict=True)
    ]
    metric.process({}, samples)
    result = metric.evaluate(len(samples))
    # Class 1: 2 of 3 pixels; class 2: 1 of 2; background: 2 of 4.
    assert result["mIoU_objects"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2, abs=0.01)
    assert result["mIoU"] == pytest.approx(100 * (2 / 4 + 2 / 3 + 1 / 2) / 3, abs=0.01)

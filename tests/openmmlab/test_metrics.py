"""Classification metrics."""

import pytest

pytest.importorskip("mmengine")

import torch
from mmengine.registry import METRICS

from grootv.openmmlab.classification.metrics import TopKAccuracy


def predictions(scores: torch.Tensor, targets: list[int], indices: list[int]) -> list[dict]:
    return [{"scores": s, "target": t, "index": i} for s, t, i in zip(scores, targets, indices, strict=True)]


def test_accuracy_counts_every_image_once() -> None:
    torch.manual_seed(0)
    scores = torch.rand(40, 10)
    targets = torch.randint(0, 10, (40,))
    metric = METRICS.build({"type": "TopKAccuracy", "topk": (1, 5)})
    indices = list(range(40))
    metric.process({}, predictions(scores, targets.tolist(), indices))
    metric.process({}, predictions(scores[:3], targets[:3].tolist(), indices[:3]))  # padding of a sampler
    metric.process({}, predictions(scores[:1], [-1], [40]))  # a damaged image
    top = scores.topk(5).indices
    result = metric.evaluate(7)
    assert result["accuracy/top1"] == pytest.approx(100 * (top[:, 0] == targets).double().mean().item())
    assert result["accuracy/top5"] == pytest.approx(100 * (top == targets[:, None]).any(1).double().mean().item())


def test_equal_scores_do_not_count_as_right() -> None:
    metric = TopKAccuracy(topk=(1,))
    metric.process({}, predictions(torch.full((4, 4), 0.25), [0, 1, 2, 3], [0, 1, 2, 3]))
    assert metric.evaluate(4) == {"accuracy/top1": 25.0}

"""Classification metrics."""

from collections.abc import Sequence
from itertools import chain

import torch
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class TopKAccuracy(BaseMetric):
    """Percentage of images whose class is among the k of highest score.

    It is exact in distributed evaluation: samplers repeat some images to give all processes the same number, and each
    image counts once, by its index in the data set. Images with target -1 (damaged) do not count.

    Args:
        topk: values of k; each gives a metric `accuracy/top{k}`. A k above the number of classes counts as that number.
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5), **kwargs) -> None:
        super().__init__(**kwargs)
        self.topk = tuple(topk)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Record the rank of the true class of each prediction.

        Raises:
            FloatingPointError: scores are NaN or infinite, which have no rank.
        """
        scores = torch.stack([sample["scores"] for sample in data_samples])
        bad = (~scores.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise FloatingPointError(
                f"the scores are not finite for {len(bad)} of the {len(scores)} images of a batch, the first "
                f"image {data_samples[bad[0]]['index']} of the data set"
            )
        targets = torch.tensor([sample["target"] for sample in data_samples])
        # Of classes with equal scores the one with the lower number ranks first, as in a stable sort.
        own = scores.gather(1, targets.clamp_min(0)[:, None])
        lower = torch.arange(scores.shape[1]) < targets[:, None]
        ranks = ((scores > own) | ((scores == own) & lower)).sum(1)
        self.results.extend(
            (sample["index"], sample["target"], rank) for sample, rank in zip(data_samples, ranks.tolist(), strict=True)
        )

    def evaluate(self, size: int) -> dict[str, float]:
        """Gather the results of all processes and compute the metrics; the same in every process."""
        gathered = list(chain.from_iterable(all_gather_object(self.results)))
        self.results.clear()
        return {f"{self.prefix}/{name}": value for name, value in self.compute_metrics(gathered).items()}

    def compute_metrics(self, results: list[tuple[int, int, int]]) -> dict[str, float]:
        """Accuracies in percent from (index, target, rank of the target)."""
        indexed = {index: (target, rank) for index, target, rank in results if index >= 0}
        streamed = [(target, rank) for index, target, rank in results if index < 0]
        ranks = torch.tensor([rank for target, rank in chain(indexed.values(), streamed) if target >= 0])
        if not len(ranks):
            raise ValueError("no image with a known class was evaluated")
        return {f"top{k}": 100 * (ranks < k).double().mean().item() for k in self.topk}

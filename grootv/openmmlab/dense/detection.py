"""Test-time augmentation for detection configs. Needs mmdet."""

from __future__ import annotations

from .requirements import require

require("mmdet")

import torch  # noqa: E402
from mmcv.ops import batched_nms  # noqa: E402
from mmdet.models import DetTTAModel  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402


@MODELS.register_module()
class InstanceTTAModel(DetTTAModel):
    """mmdet's test-time augmentation, also for instance segmentation.

    One NMS selects among the detections of all sizes and flips of an image; each selected detection keeps its mask.

    Args:
        tta_cfg: `dict(nms=..., max_per_img=...)`.
    """

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        """Merge the predictions for one image, each at its original size."""
        if "masks" not in data_samples[0].pred_instances:
            return super()._merge_single_sample(data_samples)
        instances = [sample.pred_instances for sample in data_samples]
        boxes, scores = self.merge_aug_bboxes(
            [each.bboxes for each in instances],
            [each.scores for each in instances],
            [sample.metainfo for sample in data_samples],
        )
        labels = torch.cat([each.labels for each in instances])
        masks = torch.cat([_unflip(sample) for sample in data_samples])
        _, kept = batched_nms(boxes, scores, labels, self.tta_cfg.nms)
        kept = kept[: self.tta_cfg.max_per_img]
        merged = data_samples[0]
        merged.pred_instances = InstanceData(
            bboxes=boxes[kept], scores=scores[kept], labels=labels[kept], masks=masks[kept]
        )
        return merged


def _unflip(sample: DetDataSample) -> torch.Tensor:
    masks = sample.pred_instances.masks
    if not sample.flip:
        return masks
    dims = {"horizontal": [2], "vertical": [1], "diagonal": [1, 2]}[sample.flip_direction]
    return masks.flip(dims)

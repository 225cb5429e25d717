"""Any timm model as an mmengine model for image classification."""

import sys
from collections.abc import Sequence

import timm
import torch
from mmengine.dist import get_world_size
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from grootv.models.checkpoint import unwrap

from ..runtime.distributed import synchronise_batch_norm

for _loss in (
    BinaryCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
    nn.CrossEntropyLoss,
):
    MODELS.register_module(module=_loss)


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """What is done to a batch of images on the model's device: normalising, random erasing, MixUp and CutMix.

    Args:
        mean, std: of the colour channels, of values in [0, 1].
        random_erasing: arguments of timm's `RandomErasing`, used in training only.
        mixup: arguments of timm's `Mixup` (MixUp and CutMix), used in training only. The targets become
            (B, num_classes) probabilities, with its label smoothing.
        non_blocking: copy to the device without waiting, for pinned memory.

    Takes and returns a dict with `inputs`, (B, C, H, W) uint8 in and float32 out, `targets`, (B,) int64, and whatever
    else the dataset gave.
    """

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        random_erasing: dict | None = None,
        mixup: dict | None = None,
        non_blocking: bool = True,
    ) -> None:
        super().__init__(non_blocking)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.random_erasing = RandomErasing(**random_erasing) if random_erasing else None
        self.mixup = Mixup(**mixup) if mixup else None

    def forward(self, data: dict, training: bool = False) -> dict:
        """Bring a batch to the device and into the form that the model takes."""
        data = self.cast_data(data)
        inputs = (data["inputs"].float() - self.mean) / self.std
        if training:
            if self.random_erasing is not None:
                self.random_erasing.device = inputs.device
                inputs = self.random_erasing(inputs)
            if self.mixup is not None:
                if len(inputs) % 2:
                    raise ValueError(
                        f"MixUp and CutMix pair the images of a batch, so its size must be even, "
                        f"got {len(inputs)}: set an even train_dataloader.batch_size and drop_last=True"
                    )
                inputs, data["targets"] = self.mixup(inputs, data["targets"])
        data["inputs"] = inputs
        return data


@MODELS.register_module()
class TimmClassifier(BaseModel):
    """A timm model with its loss.

    Args:
        backbone: arguments of `timm.create_model`: `model_name`, `num_classes`, `drop_path_rate`, `pretrained`,
            `pretrained_cfg_overlay=dict(file=...)`, and the model's own.
        loss: config of the loss, one of timm's or `CrossEntropyLoss`; default: `SoftTargetCrossEntropy` under MixUp,
            `CrossEntropyLoss` otherwise.
        sync_bn: in distributed training, compute batch statistics over all processes.
        data_preprocessor: config of the preprocessor; default :class:`ImagePreprocessor`.

    Modes of `forward`: "loss" gives `{"loss": scalar}`, "tensor" the logits (B, num_classes), "predict" one dict per
    image with `scores` (num_classes,), `target` and `index`.
    """

    def __init__(
        self,
        backbone: dict,
        loss: dict | None = None,
        sync_bn: bool = True,
        data_preprocessor: dict | nn.Module | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor or {"type": "ImagePreprocessor"})
        self.backbone = timm.create_model(**backbone)
        if sync_bn and get_world_size() > 1:
            self.backbone = synchronise_batch_norm(self.backbone)
        self.num_classes: int = self.backbone.num_classes
        mixup = getattr(self.data_preprocessor, "mixup", None)
        if mixup is not None and mixup.num_classes != self.num_classes:
            raise ValueError(
                f"data_preprocessor.mixup.num_classes is {mixup.num_classes}, "
                f"but the model has {self.num_classes} classes"
            )
        self.loss = MODELS.build(loss or {"type": "CrossEntropyLoss" if mixup is None else "SoftTargetCrossEntropy"})

    def init_weights(self) -> None:
        """Leave the weights as timm made or loaded them, where mmengine would initialise some models again."""

    def forward(
        self, inputs: Tensor, targets: Tensor | None = None, indices: Tensor | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict]:
        """Logits, loss or predictions of `inputs` (B, C, H, W)."""
        logits = self.backbone(inputs)
        if mode == "tensor":
            return logits
        logits = logits.float()
        if mode == "loss":
            return {"loss": self.loss(logits, targets)}
        if mode == "predict":
            scores, targets, indices = logits.softmax(1).cpu(), targets.tolist(), indices.tolist()
            return [
                {"scores": score, "target": target, "index": index}
                for score, target, index in zip(scores, targets, indices, strict=True)
            ]
        raise ValueError(f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")

    def convert_checkpoint(self, checkpoint: dict) -> dict[str, Tensor]:
        """State of this model from a checkpoint of the backbone alone: a released one, or timm's.

        The `checkpoint_filter_fn` that timm's model files carry does the conversion. A checkpoint of this class's own
        runs is returned as it is.
        """
        state_dict = unwrap(checkpoint)
        if any(name.removeprefix("module.").startswith("backbone.") for name in state_dict):
            return state_dict
        filter_fn = getattr(sys.modules[type(self.backbone).__module__], "checkpoint_filter_fn", None)
        if filter_fn is not None:
            state_dict = filter_fn(checkpoint, self.backbone)
        return {f"backbone.{name}": value for name, value in state_dict.items()}

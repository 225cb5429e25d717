"""GrootV and VMamba as backbones for mmdetection, mmsegmentation and every other project on mmengine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from grootv.layers import LayerNorm
from grootv.models.backbone import to_nchw, to_nhwc
from grootv.models.checkpoint import (
    backbone_weights,
    belongs_to,
    checkpoint_filter_fn,
    find_wrapper,
    fit_axes,
    official_to_own,
)


class DenseBackbone(BaseModule):
    """The feature extraction of a family of timm's models behind OpenMMLab's contract for backbones.

    Its subclasses are registered in mmengine's root registry, from which those of mmdet, mmseg and the others inherit.
    A detector or segmentor with such a backbone also loads checkpoints in which the backbone's parameters have their
    official names.

    Args:
        arch: size of a model of the family in timm's registry, without the family's name.
        out_indices: Stages to return, increasing, of 0 to 3 (strides 4, 8, 16, 32). Stages after the last one are not
            made, nor is the classifier.
        frozen_stages: -1 trains everything; 0 freezes the stem, n > 0 the stem and the first n stages.
        norm_eval: Keep all norms in evaluation mode during training. They are LayerNorms, which compute the same in
            both modes: the argument is there for configs that set it for any backbone.
        with_cp: Recompute each block in the backward pass instead of keeping its activations.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0 in the first.
        in_channels: Channels of the input image.
        init_cfg: None for random weights, or `dict(type="Pretrained", checkpoint=PATH_OR_URL, prefix=None)`: a released
            checkpoint, one of timm or of this project's own training runs (their averaged weights where they have
            some). The prefix of the backbone's names, such as "backbone.", is found if it is not given.
        pretrained: Must be None. Old configs name a checkpoint here; the error shows the `init_cfg` that replaces it.
        **kwargs: Further arguments of the family's model.

    Raises:
        ValueError: an unknown `arch`, `out_indices` or `frozen_stages` out of range, another type of `init_cfg`, or
            `pretrained` is given.
    """

    family: str
    """What the names of the family's models in timm's registry begin with."""

    def __init__(
        self,
        arch: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.1,
        in_channels: int = 3,
        init_cfg: dict[str, Any] | None = None,
        pretrained: None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg)
        sizes = [name.removeprefix(self.family) for name in timm.list_models(f"{self.family}*")]
        if arch not in sizes:
            raise ValueError(f"arch must be one of {sizes}, got {arch!r}")
        if init_cfg is not None and init_cfg.get("type") != "Pretrained":
            raise ValueError(f'init_cfg must be None or dict(type="Pretrained", checkpoint=...), got {init_cfg}')
        if pretrained is not None:
            raise ValueError(
                f"pretrained must be None, got {pretrained!r}; name the checkpoint by "
                f'init_cfg=dict(type="Pretrained", checkpoint={pretrained!r}) of the backbone'
            )
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        name = f"{self.family}{arch}"
        self.model = timm.create_model(name, in_chans=in_channels, drop_path_rate=drop_path_rate, **kwargs)

        num_stages = len(self.model.stages)
        indices = self.out_indices
        if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= num_stages:
            raise ValueError(f"out_indices must be increasing numbers of 0 to {num_stages - 1}, got {indices}")
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f"frozen_stages must be from -1 (none) to {num_stages}, got {frozen_stages}")
        self.out_channels = tuple(self.model.feature_info[i]["num_chs"] for i in indices)
        self.model.prune_intermediate_layers(list(indices), prune_norm=False, prune_head=True)
        del self.model.num_classes  # mmdet's NumClassCheckHook compares every module's with the data
        self.model.set_grad_checkpointing(with_cp)
        self._add_norms()
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_convert_official_names)

    def _add_norms(self) -> None:
        """For families whose stages leave the norm of their feature to dense tasks."""

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.model.stem, *self.model.stages[: self.frozen_stages]]

    def train(self, mode: bool = True) -> DenseBackbone:
        """Set training mode, but for what `frozen_stages` and `norm_eval` keep in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, (_BatchNorm, nn.LayerNorm)):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Normed feature maps (B, C, H / stride, W / stride), rounded up, of the stages in `out_indices`.

        Args:
            x: (B, in_channels, H, W) images of any size.
        """
        features = self._features(x)
        # mmcv's compiled RoIAlign reads memory as NCHW whatever the strides say, and convolutions pass strides on.
        return tuple(feature.contiguous() for feature in features)

    def _features(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(x, indices=list(self.out_indices), intermediates_only=True)

    def init_weights(self) -> None:
        """Load the checkpoint that `init_cfg` names; without one, keep what construction made."""
        if self._is_init:
            return
        if self.init_cfg is not None:
            self.load_pretrained(self.init_cfg["checkpoint"], self.init_cfg.get("prefix"))
        self._is_init = True

    def load_pretrained(self, checkpoint: str, prefix: str | None = None) -> None:
        """Load backbone weights from a file or URL, and nothing but all of them.

        Args:
            checkpoint: As of mmengine's `CheckpointLoader`.
            prefix: What stands before the backbone's names in the file; None finds it.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: the file is damaged, or holds something else than plain data.
            ValueError: no GrootV or VMamba weights in it, or several and no `prefix` to choose by.
            RuntimeError: parameters are missing, left over (besides heads and stages that `out_indices` does not
                need) or of another shape. The message has their names.
        """
        content = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
        try:
            weights = backbone_weights(content, prefix)
            num_stages = len(self.model.stages)
            weights = {name: value for name, value in weights.items() if belongs_to(name, num_stages)}
            self.model.load_state_dict(checkpoint_filter_fn(weights, self.model))
        except (RuntimeError, ValueError) as error:
            raise type(error)(f"{checkpoint}: {error}") from error
        wrapper = find_wrapper(content)
        print_log(f"Loaded the backbone from {wrapper or 'the weights'} of {checkpoint}.", logger="current")


def _convert_official_names(backbone: DenseBackbone, state_dict: dict[str, Any], prefix: str, *others: object) -> None:
    """Before a whole detector or segmentor loads: the backbone's official names in `state_dict` become its own."""
    names = [name for name in state_dict if name.startswith(prefix)]
    if any(name.startswith(f"{prefix}model.") for name in names):
        return
    expected = backbone.model.state_dict()
    for name in names:
        value, own = state_dict.pop(name), official_to_own(name.removeprefix(prefix))
        state_dict[f"{prefix}model.{own}"] = fit_axes(own, value, expected[own].shape) if own in expected else value


@MODELS.register_module()
class GrootV(DenseBackbone):
    """GrootV for dense tasks. `arch` is "nano", "tiny", "small" or "base"; the other arguments, shapes and errors are
    those of `DenseBackbone`, with further ones of `grootv.models.GrootV`, such as `tree_per="stage"`."""

    family = "grootv_"

    def __init__(self, arch: str = "tiny", **kwargs: Any) -> None:
        super().__init__(arch, **kwargs)


@MODELS.register_module()
class VMamba(DenseBackbone):
    """VMamba for dense tasks, with a LayerNorm for each feature, as published. `arch` is the size, such as "tiny_s1l8";
    the other arguments, shapes and errors are those of `DenseBackbone`, with further ones of
    `grootv.models.VMamba`. A checkpoint of a classifier leaves these norms as they are: weight 1 and bias 0."""

    family = "vmamba_"

    def __init__(self, arch: str = "tiny_s1l8", **kwargs: Any) -> None:
        super().__init__(arch, **kwargs)

    def _add_norms(self) -> None:
        like = next(self.model.parameters())
        for i, channels in zip(self.out_indices, self.out_channels, strict=True):
            norm = LayerNorm(channels, eps=1e-5, device=like.device, dtype=like.dtype)
            self.model.add_module(f"outnorm{i}", norm)

    def _frozen_modules(self) -> list[nn.Module]:
        frozen = (i for i in self.out_indices if i < self.frozen_stages)
        return [*super()._frozen_modules(), *(self.model.get_submodule(f"outnorm{i}") for i in frozen)]

    def _features(self, x: Tensor) -> list[Tensor]:
        norms = [self.model.get_submodule(f"outnorm{i}") for i in self.out_indices]
        return [to_nchw(norm(to_nhwc(feature))) for norm, feature in zip(norms, super()._features(x), strict=True)]

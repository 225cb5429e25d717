"""VMamba: a hierarchical vision backbone that scans its feature maps row by row, column by column, and both backwards.

Paper: VMamba: Visual State Space Model (NeurIPS 2024), https://arxiv.org/abs/2401.10166

The models are those that its authors released weights of in 2024. `sXlY` in a name: X inner channels of a mixer per
channel, and Y blocks in the third stage. `timm.create_model("vmamba_tiny_s1l8", pretrained=True)` fetches the released
file from the authors.
"""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from grootv.layers import SS2D, LayerNorm

from .backbone import (
    HierarchicalBackbone,
    Layer,
    MapHead,
    Stage,
    create_backbone,
    find_norm_layer,
    imagenet_cfg,
    to_nchw,
    to_nhwc,
)
from .checkpoint import checkpoint_filter_fn
from .released import RELEASES

__all__ = ["VMamba", "checkpoint_filter_fn"]

_LAYER_NORM = partial(LayerNorm, eps=1e-5)


class VMambaHead(MapHead):
    """Norm of the map before pooling and classifier, on (B, C, H, W)."""

    map_layers = ("norm",)

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        norm_layer: Layer = _LAYER_NORM,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(in_dim, num_classes, pool_type, drop_rate, **dd)
        self.norm = norm_layer(in_dim, **dd)

    def forward_map(self, x: Tensor) -> Tensor:
        return to_nchw(self.norm(to_nhwc(x)))


class VMamba(HierarchicalBackbone):
    """VMamba backbone and classifier.

    The feature of a stage is what its blocks give, without a norm. Dense tasks add a norm for each feature
    (`grootv.openmmlab.dense.backbone.VMamba`).

    Args:
        in_chans: Channels of the input image.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: timm's name of the pooling, "" for none.
        output_stride: Pixels of the image, in height and width, for each pixel of the last stage's map: 32, or 16, 8 or
            4 for finer maps by convolutions of stride one, which are dilated, as the mixers' are.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        mlp_ratio: Hidden channels of a block's MLP per channel.
        expand: Inner channels of the mixer, an `SS2D`, per channel.
        d_state: States of each inner channel of the mixer.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth; grows linearly from 0 in the first block to this in the last.
        norm_layer: Class or timm's name of the norms over the last dimension of channels-last maps. The mixers' norms
            stay.
        act_layer: Class or timm's name of the activation in stem and MLPs.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: dims and depths of different length; numbers out of range; a pooling, norm or activation that timm
            does not know; an unknown output_stride.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 8, 2),
        mlp_ratio: float = 4.0,
        expand: int = 1,
        d_state: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Layer | str = _LAYER_NORM,
        act_layer: Layer | str = nn.GELU,
        device=None,
        dtype=None,
    ) -> None:
        norm_layer = find_norm_layer(norm_layer)
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            output_stride,
            dims,
            depths,
            mlp_ratio,
            drop_rate,
            drop_path_rate,
            mixer=partial(SS2D, expand=expand, d_state=d_state),
            stage=partial(Stage, downsample_bias=True, feature_norm=False),
            head=partial(VMambaHead, norm_layer=norm_layer),
            norm_layer=norm_layer,
            act_layer=act_layer,
            device=device,
            dtype=dtype,
        )


def _cfg(release: str | None = None) -> dict[str, Any]:
    return imagenet_cfg(
        url=RELEASES[release].url if release else "",
        paper_ids="arXiv:2401.10166",
        paper_name="VMamba: Visual State Space Model",
    )


_RELEASED = [name for name, release in RELEASES.items() if release.family == "VMamba"]
default_cfgs = generate_default_cfgs({"vmamba_nano": _cfg(), **{name: _cfg(name) for name in _RELEASED}})


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-Nano, a size of this project for tests and comparisons, with the channels and depths of GrootV-Nano."""
    model_args = {"dims": (32, 64, 128, 256), "depths": (1, 1, 4, 1), "expand": 2}
    return create_backbone(VMamba, "vmamba_nano", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-Tiny with 8 blocks in stage 3: 30 M parameters, 4.9 GFLOPs at 224 x 224."""
    model_args = {"dims": (96, 192, 384, 768), "depths": (2, 2, 8, 2), "expand": 1}
    return create_backbone(VMamba, "vmamba_tiny_s1l8", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-Small with 20 blocks in stage 3: 49 M parameters, 8.6 GFLOPs at 224 x 224."""
    model_args = {"dims": (96, 192, 384, 768), "depths": (2, 2, 20, 2), "expand": 1}
    return create_backbone(VMamba, "vmamba_small_s1l20", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-Base with 20 blocks in stage 3: 87 M parameters, 15.2 GFLOPs at 224 x 224."""
    model_args = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 20, 2), "expand": 1}
    return create_backbone(VMamba, "vmamba_base_s1l20", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-Tiny with two inner channels per channel: 31 M parameters, 4.9 GFLOPs at 224 x 224."""
    model_args = {"dims": (96, 192, 384, 768), "depths": (2, 2, 5, 2), "expand": 2}
    return create_backbone(VMamba, "vmamba_tiny_s2l5", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-Small with two inner channels per channel: 50 M parameters, 8.7 GFLOPs at 224 x 224."""
    model_args = {"dims": (96, 192, 384, 768), "depths": (2, 2, 15, 2), "expand": 2}
    return create_backbone(VMamba, "vmamba_small_s2l15", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-Base with two inner channels per channel: 89 M parameters, 15.4 GFLOPs at 224 x 224."""
    model_args = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 15, 2), "expand": 2}
    return create_backbone(VMamba, "vmamba_base_s2l15", pretrained, **{**model_args, **kwargs})

"""GrootV: a hierarchical vision backbone that scans its feature maps along minimum spanning trees.

Paper: GrootVL: Tree Topology is All You Need in State Space Model (MambaTree, NeurIPS 2024),
https://arxiv.org/abs/2406.02395

The project hosts no weights: released checkpoints load with
`timm.create_model("grootv_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=PATH))`.
"""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from grootv.layers import LayerNorm, PathSSM, TreeSSM
from grootv.layers.path_ssm import PATH_SCANS

from .backbone import HierarchicalBackbone, Layer, MapHead, Stage, create_backbone, find_act_layer, imagenet_cfg
from .checkpoint import checkpoint_filter_fn

__all__ = ["GrootV", "checkpoint_filter_fn"]

TREE_PER = ("block", "stage")
SCANS = ("tree", *PATH_SCANS)


class GrootVHead(MapHead):
    """1x1 convolution to 1.5 times the channels, norm and activation before pooling and classifier, on (B, C, H, W)."""

    map_layers = ("conv", "norm", "act")

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        norm_layer: Layer = nn.BatchNorm2d,
        act_layer: Layer = nn.GELU,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_dim = in_dim * 3 // 2
        super().__init__(hidden_dim, num_classes, pool_type, drop_rate, **dd)
        self.conv = nn.Conv2d(in_dim, hidden_dim, 1, bias=False, **dd)
        self.norm = norm_layer(hidden_dim, **dd)
        self.act = act_layer()

    def forward_map(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class GrootV(HierarchicalBackbone):
    """GrootV backbone and classifier.

    Args:
        in_chans: Channels of the input image.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: timm's name of the pooling, "" for none.
        output_stride: Pixels of the image, in height and width, for each pixel of the last stage's map: 32, or 16, 8 or
            4 for finer maps by convolutions of stride one, which are dilated, as the mixers' are. Another mixer than
            `TreeSSM` must then take `dilation`.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        mlp_ratio: Hidden channels of a block's MLP per channel.
        scan: What mixers scan along: a minimum spanning tree ("tree", a `TreeSSM`) or paths of pixels ("raster",
            "bidirectional", "cross", a `PathSSM`), with the same parameters.
        metric, root: Of the tree.
        d_state: States of each inner channel of a mixer.
        mixer: Another mixer: what makes it from `dim`, `device` and `dtype`, such as `partial(TreeSSM, expand=1)` or a
            class of modules from (B, H, W, dim) to (B, H, W, dim). It brings its own initialisation, in
            `reset_parameters`.
        tree_per: One tree for each "block", or one for each "stage", built by its first block.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth; grows linearly from 0 in the first block to this in the last.
        norm_layer: Class or timm's name of the norms over the last dimension of channels-last maps. The head's
            BatchNorm and the mixers' norms stay.
        act_layer: Class or timm's name of the activation in stem, MLPs and head.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: dims and depths of different length; numbers out of range; a pooling, norm or activation that timm
            does not know; an unknown scan, metric, root, tree_per or output_stride; scan, metric, root or d_state
            beside a mixer, or metric or root beside paths, which would not see them; one tree for each stage, but a
            mixer that takes no tree.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        dims: tuple[int, ...] = (80, 160, 320, 640),
        depths: tuple[int, ...] = (2, 2, 9, 2),
        mlp_ratio: float = 4.0,
        scan: str = "tree",
        metric: str = "cosine",
        root: str = "all",
        tree_per: str = "block",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        d_state: int = 1,
        mixer: Layer | None = None,
        norm_layer: Layer | str = LayerNorm,
        act_layer: Layer | str = nn.GELU,
        device=None,
        dtype=None,
    ) -> None:
        if tree_per not in TREE_PER:
            raise ValueError(f"tree_per must be one of {TREE_PER}, got {tree_per!r}")
        if scan not in SCANS:
            raise ValueError(f"scan must be one of {SCANS}, got {scan!r}")
        if mixer is not None:
            if (scan, metric, root, d_state) != ("tree", "cosine", "all", 1):
                raise ValueError(
                    f"scan, metric, root and d_state have no effect on mixer={mixer}: "
                    "give them to the mixer, as in partial(TreeSSM, metric='euclidean')"
                )
        elif scan == "tree":
            mixer = partial(TreeSSM, metric=metric, root=root, d_state=d_state)
        elif (metric, root) != ("cosine", "all"):
            raise ValueError(f"metric and root choose a tree and have no effect on scan={scan!r}")
        else:
            mixer = partial(PathSSM, scan=scan, d_state=d_state)
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
            mixer,
            stage=partial(Stage, tree_per=tree_per),
            head=partial(GrootVHead, act_layer=find_act_layer(act_layer)),
            norm_layer=norm_layer,
            act_layer=act_layer,
            device=device,
            dtype=dtype,
        )


_cfg = partial(
    imagenet_cfg,
    paper_ids="arXiv:2406.02395",
    paper_name="GrootVL: Tree Topology is All You Need in State Space Model",
)

# No weights are hosted for these models. The configurations are those of the released ImageNet-1K checkpoints, which
# load from a file.
default_cfgs = generate_default_cfgs(
    {"grootv_nano": _cfg(), "grootv_tiny": _cfg(), "grootv_small": _cfg(), "grootv_base": _cfg()}
)


@register_model
def grootv_nano(pretrained: bool = False, **kwargs: Any) -> GrootV:
    """GrootV-Nano, a size of this project for tests, demonstrations and small devices: 3 M parameters."""
    model_args = {"dims": (32, 64, 128, 256), "depths": (1, 1, 4, 1)}
    return create_backbone(GrootV, "grootv_nano", pretrained, **{**model_args, **kwargs})


@register_model
def grootv_tiny(pretrained: bool = False, **kwargs: Any) -> GrootV:
    """GrootV-Tiny: 30 M parameters, 4.8 GFLOPs at 224 x 224."""
    model_args = {"dims": (80, 160, 320, 640), "depths": (2, 2, 9, 2)}
    return create_backbone(GrootV, "grootv_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def grootv_small(pretrained: bool = False, **kwargs: Any) -> GrootV:
    """GrootV-Small: 51 M parameters, 8.5 GFLOPs at 224 x 224."""
    model_args = {"dims": (96, 192, 384, 768), "depths": (2, 2, 13, 2)}
    return create_backbone(GrootV, "grootv_small", pretrained, **{**model_args, **kwargs})


@register_model
def grootv_base(pretrained: bool = False, **kwargs: Any) -> GrootV:
    """GrootV-Base: 91 M parameters, 15.1 GFLOPs at 224 x 224."""
    model_args = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 13, 2)}
    return create_backbone(GrootV, "grootv_base", pretrained, **{**model_args, **kwargs})

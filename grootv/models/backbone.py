"""What the families of models share: stem, blocks, stages, and everything that timm asks of a model.

Every map that leaves a stem, block, downsampling or stage is (B, C, H, W) with the memory of `torch.channels_last`, as
ConvNeXt's are. Mixers, MLPs and norms see the same memory as (B, H, W, C): between the two are views, and no copy.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final, cast

import torch
import torch.utils.checkpoint
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    SelectAdaptivePool2d,
    get_act_layer,
    get_norm_layer,
    trunc_normal_,
)
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from grootv.layers import LayerNorm, TreeSSM
from grootv.layers.bypass import only_runs
from grootv.layers.convolution import convolution_of_patches, multiplies_patches
from grootv.layers.mlp import Mlp
from grootv.layers.norms import add_and_norm, norm_for_product
from grootvl_ops import Tree

from .checkpoint import checkpoint_filter_fn, official_to_own
from .joined_blocks import run_joined
from .released import require_weights

__all__ = [
    "Block",
    "HierarchicalBackbone",
    "Layer",
    "MapHead",
    "Stage",
    "create_backbone",
    "find_act_layer",
    "find_norm_layer",
    "imagenet_cfg",
    "to_nchw",
    "to_nhwc",
]

Layer = Callable[..., nn.Module]
"""What makes a layer: a class, or a function with the same arguments."""

checkpoint: Callable[..., Any] = torch.utils.checkpoint.checkpoint  # which PyTorch gives no type


def to_nhwc(x: Tensor) -> Tensor:
    """(B, C, H, W) as a (B, H, W, C) view."""
    return x.permute(0, 2, 3, 1)


def to_nchw(x: Tensor) -> Tensor:
    """(B, H, W, C) as a (B, C, H, W) view."""
    return x.permute(0, 3, 1, 2)


def check_images(x: Tensor) -> None:
    """Raise an error that says what to do if `x` are not images (B, C, H, W) of floating point."""
    if x.dim() != 4:
        advice = "; add the batch dimension by unsqueeze(0)" if x.dim() == 3 else ""
        raise ValueError(f"images must be (B, C, H, W), got {list(x.shape)}{advice}")
    if not x.is_floating_point():
        raise TypeError(
            f"images must be floating point, got {x.dtype}: scale them to [0, 1], subtract the mean and divide by the "
            "standard deviation of timm.data.resolve_model_data_config(model), as timm.data.create_transform does"
        )


torch.fx.wrap("check_images")


class Stem(nn.Module):
    """Two 3x3 convolutions of stride two, each with a norm: (B, C_in, H, W) to (B, C, H / 4, W / 4)."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        norm_layer: Layer = LayerNorm,
        act_layer: Layer = nn.GELU,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = norm_for_product(norm_layer, dim // 2, **dd)
        self.act = act_layer()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        # Convolutions keep the memory format of their input: no map is transposed after this one.
        x = to_nchw(to_nhwc(x).contiguous())
        x = self.act(to_nchw(self.norm1(to_nhwc(self.conv1(x)))))
        return to_nchw(self.norm2(to_nhwc(self.conv2(x))))


class Downsample(nn.Module):
    """3x3 convolution and a norm: (B, C_in, H, W) to (B, C, H / 2, W / 2), or with a stride of one to (B, C, H, W)."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        norm_layer: Layer = LayerNorm,
        stride: int = 2,
        dilation: int = 1,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=stride, padding=dilation, dilation=dilation, bias=bias, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (scripting leaves out only what stands alone under this)
            if multiplies_patches(self.conv, x):
                return to_nchw(self.norm(convolution_of_patches(self.conv, x)))
        return to_nchw(self.norm(to_nhwc(self.conv(x))))


class Block(nn.Module):
    """Pre-norm residual block: a mixer, then an MLP.

    Args:
        dim: Channels.
        mlp_ratio: Hidden channels of the MLP per channel.
        drop_path: Probability with which an image skips the mixer, and the MLP, in training.
        mixer: Makes the mixer of (B, H, W, dim) maps from `dim`, `device` and `dtype`: a `TreeSSM`, or any other.
        norm_layer: Makes the norms over the last dimension of channels-last maps.
        act_layer: Makes the activation of the MLP.
        device, dtype: Where and as what the parameters are made.
    """

    takes_tree: Final[bool]

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        mixer: Layer = TreeSSM,
        norm_layer: Layer = LayerNorm,
        act_layer: Layer = nn.GELU,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_for_product(norm_layer, dim, **dd)
        self.mixer = mixer(dim, **dd)
        self.takes_tree = {"tree", "built"} <= inspect.signature(self.mixer.forward).parameters.keys()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_for_product(norm_layer, dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, tree: Tree | None = None, built: list[Tree] | None = None) -> Tensor:
        """(B, C, H, W) to (B, C, H, W), along `tree` or a tree that is appended to `built` (see `TreeSSM`)."""
        x = to_nhwc(x)
        x, normed = self.mix(x, self.norm1(x), tree, built)
        return to_nchw(x + self.drop_path2(self.mlp(normed)))

    def mix(self, x: Tensor, normed: Tensor, tree: Tree | None, built: list[Tree] | None) -> tuple[Tensor, Tensor]:
        """The map after the mixer, and what the MLP reads of it, both (B, H, W, C), from the map before the mixer, and
        what the mixer reads of that."""
        mixed = self.mixer(normed, tree=tree, built=built) if self.takes_tree else self.mixer(normed)
        if not torch.jit.is_scripting():  # TorchScript passes no modules
            return add_and_norm(self.norm2, self.drop_path1, x, mixed)
        x = x + self.drop_path1(mixed)
        return x, self.norm2(x)


def tree_list(x: Tensor) -> list[Tree]:
    """An empty list. A symbolic trace keeps calls with a tensor, and so a list that one returns as one object."""
    return []


torch.fx.wrap("tree_list")


def _call_and_keep_tree(block: Block, x: Tensor) -> tuple[Tensor, Tree]:
    """What `block` returns, and the tree that it built: a checkpoint may not change a list outside of it."""
    built = tree_list(x)
    x = block(x, None, built)
    return x, built[0]


class Stage(nn.Module):
    """Downsampling (but in the first stage), blocks, and a norm: the output is the stage's feature, (B, C, H, W).

    Args:
        in_dim, dim: Channels of the input and output.
        depth: Blocks.
        downsample: Whether the stage begins with a convolution, to `dim` channels.
        stride: Of that convolution.
        dilation: Of that convolution, and of the mixers, which get theirs as `dilation` if it is not one.
        mlp_ratio, mixer, norm_layer, act_layer: As of `Block`.
        drop_path: For each block.
        tree_per: One tree for each "block", or one for the "stage", built by its first block.
        downsample_bias: Whether that convolution has a bias.
        feature_norm: Whether the stage ends with a norm.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: one tree for the stage, but a mixer that takes no tree.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        downsample: bool,
        mlp_ratio: float,
        drop_path: list[float],
        mixer: Layer = TreeSSM,
        tree_per: str = "block",
        norm_layer: Layer = LayerNorm,
        act_layer: Layer = nn.GELU,
        stride: int = 2,
        dilation: tuple[int, int] = (1, 1),
        downsample_bias: bool = False,
        feature_norm: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dilation[1] != 1:
            mixer = partial(mixer, dilation=dilation[1])
        self.grad_checkpointing = False
        self.share_tree = tree_per == "stage"
        self.downsample = (
            Downsample(in_dim, dim, norm_layer, stride, dilation[0], downsample_bias, **dd)
            if downsample
            else nn.Identity()
        )
        self.blocks = nn.ModuleList(
            Block(dim, mlp_ratio, drop_path[i], mixer, norm_layer, act_layer, **dd) for i in range(depth)
        )
        self.norm = norm_layer(dim, **dd) if feature_norm else nn.Identity()
        for block in self.blocks:
            if self.share_tree and not block.takes_tree:
                name = type(block.mixer).__name__
                raise ValueError(f"tree_per='stage' needs a mixer that takes `tree` and `built`; {name} does not")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), the map of the stage before, to the map of this stage."""
        x = self.downsample(x)
        if not torch.jit.is_scripting():  # noqa: SIM102 (scripting leaves out only what stands alone under this)
            # A symbolic trace keeps what each block returns.
            across = not (self.grad_checkpointing or isinstance(x, torch.fx.Proxy))
            if across and all(only_runs(block, Block) for block in self.blocks):
                return self._forward_across_blocks(x)
        tree: Tree | None = None
        built: list[Tree] | None = tree_list(x) if self.share_tree else None
        for block in self.blocks:
            if not self.grad_checkpointing or torch.jit.is_scripting():
                x = block(x, tree, built)
                tree = None if built is None else built[0]
            elif self.share_tree and tree is None:
                x, tree = checkpoint(_call_and_keep_tree, block, x, use_reentrant=False)
            else:
                x = checkpoint(block, x, tree, use_reentrant=False)
        return to_nchw(self.norm(to_nhwc(x)))

    def _forward_across_blocks(self, x: Tensor) -> Tensor:
        """The same for blocks that need not be called: what ends a block, and the norm that follows, is one step."""
        x = to_nhwc(x)
        blocks = list(cast(Iterable[Block], self.blocks))
        norms = [*(block.norm1 for block in blocks), self.norm]
        normed, tree, built = norms[0](x), None, tree_list(x) if self.share_tree else None
        joined = run_joined(blocks, norms, x, normed, self.share_tree)
        if joined is not None:
            return to_nchw(joined)
        for block, next_norm in zip(blocks, norms[1:], strict=True):
            x, normed = block.mix(x, normed, tree, built)
            tree = None if built is None else built[0]
            x, normed = add_and_norm(next_norm, block.drop_path2, x, block.mlp(normed))
        return to_nchw(normed)


class MapHead(nn.Module):
    """Pooling and classifier, after layers on the (B, C, H, W) map, which subclasses make and apply in `forward_map`.

    timm's `ClassifierHead` with parameters made anywhere, which timm's own does from release 1.0.21 on.

    Args:
        in_features: Channels that the pooling sees.
        num_classes: Classes; 0 for none.
        pool_type: timm's name of the pooling; "" for none.
        drop_rate: Dropout before the classifier.
        device, dtype: Where and as what the parameters are made.
    """

    map_layers: tuple[str, ...] = ()
    """The names of the layers before the pooling."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def forward_map(self, x: Tensor) -> Tensor:
        """What the layers before the pooling give, (B, C, H, W)."""
        raise NotImplementedError

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        """New classifier; `reset_other` also removes the layers before the pooling, which then sees `in_features`."""
        if reset_other:
            for name in self.map_layers:
                setattr(self, name, nn.Identity())
            self.in_features = in_features or self.in_features
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.num_features = self.in_features * self.global_pool.feat_mult()
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()
        )
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) to logits (B, classes), or with `pre_logits` to the features before the last layer."""
        x = self.drop(self.global_pool(self.forward_map(x)))
        return x if pre_logits else self.fc(x)


def _find_layer(argument: str, find: Callable, layer: Layer | str) -> Layer:
    try:
        return find(layer)
    except (KeyError, AssertionError, AttributeError) as error:
        raise ValueError(f"timm knows no {argument} {layer!r}") from error


def find_norm_layer(layer: Layer | str) -> Layer:
    """A class of norms, or that of timm's name; ValueError for a name that timm does not know.

    What is returned takes `device` and `dtype`, also where the class does not: own classes, timm's before 1.0.21.
    """
    norm_layer = _find_layer("norm_layer", get_norm_layer, layer)
    parameters = inspect.signature(norm_layer).parameters.values()
    if any(parameter.name == "device" or parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return norm_layer
    return lambda dim, device=None, dtype=None: norm_layer(dim).to(device=device, dtype=dtype)


def find_act_layer(layer: Layer | str) -> Layer:
    """A class of activations, or that of timm's name; ValueError for a name that timm does not know."""
    return _find_layer("act_layer", get_act_layer, layer)


class HierarchicalBackbone(nn.Module):
    """Stem, stages of blocks at half the resolution of the one before, and a classifier: what the families share.

    Args:
        in_chans, num_classes, global_pool, output_stride, dims, depths, mlp_ratio, drop_rate, drop_path_rate: As of
            the families' models.
        mixer: Makes the mixers of all blocks, see `Block`.
        stage: `Stage`, with the arguments in which the family differs.
        head: Makes the classifier, a `MapHead`, from channels, classes, pooling and dropout.
        norm_layer, act_layer: Classes or timm's names of the norms over the last dimension of channels-last maps, and
            of the activation in stem and MLPs.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: dims and depths of different length; numbers out of range; a pooling, norm or activation that timm
            does not know; an unknown output_stride.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        output_stride: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        mlp_ratio: float,
        drop_rate: float,
        drop_path_rate: float,
        mixer: Layer,
        stage: Layer,
        head: Callable[..., "MapHead"],
        norm_layer: Layer | str,
        act_layer: Layer | str,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if len(dims) != len(depths):
            raise ValueError(f"dims and depths must name as many stages, got {tuple(dims)} and {tuple(depths)}")
        if min(dims, default=0) < 1 or min(depths) < 0:
            raise ValueError(f"dims must be at least 1 and depths at least 0, got {tuple(dims)} and {tuple(depths)}")
        for name, value, lowest in (("in_chans", in_chans, 1), ("num_classes", num_classes, 0)):
            if value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if not 0 < mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must be positive, got {mlp_ratio}")
        for name, value in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {value}")
        if output_stride not in (4, 8, 16, 32):
            raise ValueError(f"output_stride must be 4, 8, 16 or 32, got {output_stride}")
        norm_layer = find_norm_layer(norm_layer)
        act_layer = find_act_layer(act_layer)
        _find_layer("global_pool", lambda name: SelectAdaptivePool2d(pool_type=name), global_pool)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.feature_info = []

        self.stem = Stem(in_chans, dims[0], norm_layer, act_layer, **dd)
        drop_path = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        stages = []
        reduction, dilation = 4, 1
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            stride = 2 if i > 0 and reduction < output_stride else 1
            reduction *= stride
            first_dilation = dilation
            if i > 0 and stride == 1:
                dilation *= 2
            stages.append(
                stage(
                    dims[max(i - 1, 0)],
                    dim,
                    depth,
                    downsample=i > 0,
                    mlp_ratio=mlp_ratio,
                    drop_path=drop_path[i].tolist(),
                    mixer=mixer,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    stride=stride,
                    dilation=(first_dilation, dilation),
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.stages: nn.Sequential = nn.Sequential(*stages)
        self.num_features = dims[-1]
        self.head = head(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self._init_linear_layers()

    def _init_linear_layers(self) -> None:
        # Convolutions and norms keep PyTorch's initialisation, mixers their own.
        mlps = [block.mlp for block in self.modules() if isinstance(block, Block)]
        for layer in (layer for parent in (*mlps, self.head) for layer in parent.children()):
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    @torch.jit.ignore()
    def init_weights(self) -> None:
        """Initialise all parameters and buffers anew, such as after `to_empty` on a model made on the meta device."""
        for module in reversed(list(self.modules())):  # parents after their children, whose defaults they replace
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        self._init_linear_layers()

    @torch.jit.ignore()
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay, besides norms and biases: those that mixers name."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if module is not self
            for name in getattr(module, "no_weight_decay", set)()
        }

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
            ],
        }

    @torch.jit.ignore()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore()
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes of the new one; 0 for none.
            global_pool: New pooling; None keeps the present one.
            reset_other: Also remove the head's layers before the pooling.
        """
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head.reset(
            num_classes, global_pool, reset_other, in_features=self.num_features, device=like.device, dtype=like.dtype
        )
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Forward features, and the features of the stages.

        Args:
            x: (B, C_in, H, W) images.
            indices: Stages to take: the last n for an int, all for None.
            norm: No effect: as published, a GrootV stage norms its feature, and a VMamba stage does not.
            stop_early: Leave out the stages after the last one taken.
            output_fmt: Layout of the intermediates: "NCHW" for (B, C, H, W), or "NHWC" for (B, H, W, C). Both are the
                same memory, that of the latter.
            intermediates_only: Return the intermediates alone.

        Returns:
            The (B, C, H, W) output of the last stage that ran, and the list of intermediates.
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be one of NCHW or NHWC."
        intermediates: list[Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)

        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108 (TorchScript cannot slice modules)
            stages = self.stages
        else:
            stages = cast(nn.Sequential, self.stages[: max_index + 1])
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x if output_fmt == "NCHW" else to_nhwc(x))
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers that the stages taken by `indices` (see `forward_intermediates`) do not need."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = cast(nn.Sequential, self.stages[: max_index + 1])
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "", reset_other=True)
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) images to the last stage's (B, C, H / output_stride, W / output_stride) map."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage's map to (B, num_classes) logits, or with `pre_logits` to what the classifier reads."""
        return self.head(x, pre_logits=pre_logits)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of `nn.Module`; the parameters may also have their official names, as in released files."""
        if any(official_to_own(name) != name for name in state_dict):
            state_dict = checkpoint_filter_fn(dict(state_dict), self)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes), or without classes to pooled features."""
        return self.forward_head(self.forward_features(x))


def create_backbone(model_cls: type[HierarchicalBackbone], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """`timm.create_model` of a family: as of `build_model_with_cfg`, with errors that name the weights' source.

    Returns:
        A `model_cls`, or with `features_only=True` timm's extractor around one.
    """
    source = None
    if pretrained:
        source = require_weights(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    try:
        return build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
            **kwargs,
        )
    except RuntimeError as error:
        if source is None or source in str(error):
            raise
        raise RuntimeError(f"{source}: {error}") from error


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """The timm configuration of a model of these families that was trained on ImageNet-1K at 224 pixels."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        **kwargs,
    }

"""The part that selective state space mixers have in common: all but the choice of trees and directions."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

import grootvl_ops
from grootvl_ops import Tree
from grootvl_ops.reference import accumulation_dtype

from .bypass import in_inference, in_training, is_plain
from .convolution import fuses_convolution, silu_of_sequence, takes_sequence
from .linear import (
    as_product_reads,
    call_linear,
    has_only_weight,
    linear_of_whole_words,
    multiplies_whole_words,
    product_dtype,
    whole_words,
)
from .norms import PromotedLayerNorm
from .tracing import TraceLeaf

__all__ = ["SelectiveSSM", "check_map", "check_sizes", "init_parameters"]


def check_sizes(**sizes: int) -> None:
    """Raise ValueError, with its name, for a size less than 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_map(x: Tensor, dim: int) -> None:
    """Raise ValueError for an input of a mixer that is not (B, H, W, dim)."""
    if x.dim() != 4 or x.size(3) != dim:
        raise ValueError(f"x must be (B, H, W, {dim}), got {list(x.shape)}")


@torch.no_grad()
def init_parameters(mixer: Any, dt_weight: Tensor, dt_bias: Tensor) -> None:
    """Initialise a state space mixer whose step size is softplus(dt_weight dt + dt_bias).

    Step sizes start log-uniform in [1e-3, 1e-1], and the rates of decay exp(A_log) as 1 ... N.
    """
    trunc_normal_(mixer.in_proj.weight, std=0.02)
    trunc_normal_(mixer.out_proj.weight, std=0.02)
    mixer.A_log.copy_(torch.arange(1.0, mixer.d_state + 1).log().expand_as(mixer.A_log))
    nn.init.ones_(mixer.D_skip)
    nn.init.uniform_(dt_weight, -(mixer.dt_rank**-0.5), mixer.dt_rank**-0.5)
    dt = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1))
    dt = dt.exp_().clamp_(min=1e-4)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def _fuses_norms(h_norm: Any, out_norm: Any, device: torch.device) -> bool:
    """Whether one operation may take the weights of both norms in place of calls."""
    plain = is_plain(h_norm, PromotedLayerNorm, device) and is_plain(out_norm, PromotedLayerNorm, device)
    return plain and h_norm.eps == out_norm.eps


class SelectiveSSM(TraceLeaf):
    """Selective state space model on channels-last maps (paper, section 3.2 and Algorithm 1), along trees.

    A subclass overrides `scans`, which says along which trees and in which directions. From the input come a map x, by
    a depthwise convolution, and a gate z. With D = expand dim inner channels, N states a channel, and the step size
    delta (D values a pixel), input weights B and output weights C (N values a pixel) projected from x,

        h_n = sum over the scans of tree_scan(delta B_n x, exp(-exp(A_log_n) delta)),  n = 1 ... N
        y = C LN(h_1) + D_skip x                for N = 1, as published
        y = LN(sum_n C_n h_n) + D_skip x        for N > 1
        output = out_proj(LN(y) SiLU(z)).

    Discretisation, scan and both norms are computed in float32 (float64 for float64 maps), also under autocast and in
    modules that were cast to a half precision. They are two operations of `grootvl_ops`, which take the weights of
    `dt_proj`, `h_norm` and `out_norm`. A third one computes convolution and activation, in inference and on CUDA. In
    compiled training, features and gate are two products with halves of the weight of `in_proj`. In eager mode on CUDA,
    one operation (`grootvl_ops.mixer_input`) computes everything before the choice of the trees, and for one scan and
    N = 1 another (`mixer_output`) everything after it; in half precision one (`tree_blocks`) computes all blocks of a
    GrootV stage. Where a call of one of these modules does more than apply its weights (hooks, adapters, pruning,
    parametrizations), the module is called, with the same result; under autocast `dt_proj` then rounds to autocast's
    dtype, as any linear layer that is called does.

    Args:
        dim: Channels of the input and output.
        expand: Inner channels per input channel.
        d_state: N.
        dilation: Of the depthwise convolution, for maps that are finer than those that the weights were trained on.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: dim, expand, d_state or dilation less than 1.
    """

    # TorchScript asks for these once, when it compiles the module, and leaves out the branches that they exclude.
    __constants__ = ["splits_input", "fuses_conv", "fuses_step", "fuses_norms"]
    __jit_unused_properties__ = ["splits_input", "fuses_conv", "fuses_step", "fuses_norms"]

    def __init__(self, dim: int, expand: int = 2, d_state: int = 1, dilation: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        check_sizes(dim=dim, expand=expand, d_state=d_state, dilation=dilation)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner_dim = expand * dim
        self.dim = dim
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)

        self.in_proj = nn.Linear(dim, 2 * inner_dim, bias=False, **dd)
        self.conv = nn.Conv2d(
            inner_dim, inner_dim, 3, padding=dilation, dilation=dilation, groups=inner_dim, bias=False, **dd
        )
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(inner_dim, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, inner_dim, **dd)
        self.A_log = nn.Parameter(torch.empty((inner_dim,) if d_state == 1 else (inner_dim, d_state), **dd))
        self.D_skip = nn.Parameter(torch.empty(inner_dim, **dd))
        self.h_norm = PromotedLayerNorm(inner_dim, **dd)
        self.out_norm = PromotedLayerNorm(inner_dim, **dd)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters; convolution, x_proj and norms keep the default of their kind."""
        init_parameters(self, self.dt_proj.weight, self.dt_proj.bias)

    @torch.jit.ignore()
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay (timm's convention)."""
        return {"D_skip"}

    @torch.jit.ignore()
    def also_weight_decay(self) -> set[str]:
        """Names of the parameters of one dimension that take weight decay, which others of one dimension do not.

        In the published code they have two dimensions, (D, 1) and (1, D), and decay by its rule.
        """
        return {"A_log", "dt_proj.bias"}

    def scans(self, guide: Tensor) -> list[tuple[Tree, str]]:
        """The trees and directions of the scans, for subclasses to say; see `grootv.layers.scans`.

        Args:
            guide: (B, H, W, any channels), what trees may depend on.

        Returns:
            Trees over the H W pixels, each with "both", "up" or "down". What the scans give is summed.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say along which trees it scans")

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Mix a map.

        Args:
            x: (B, H, W, dim).
            guide: (B, H, W, any channels), on which trees are built; None for the mixer's own features.

        Returns:
            (B, H, W, dim).

        Raises:
            ValueError: x or guide of another shape.
        """
        features, z = self.expand_sequence(x)
        # The scan reads a sequence, so that in compiled graphs trees alone read a view with four dimensions.
        scans = self.scans(self.check_guide(guide, features.view(x.size(0), x.size(1), x.size(2), features.size(2))))
        return self.scan_sequence(features, z, scans).view(x.shape)

    def expand_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From the input (B, H, W, dim) to the features that are scanned and the gate before its activation, both
        (B, H, W, D)."""
        features, z = self.expand_sequence(x)
        B, H, W, _ = x.shape
        return features.view(B, H, W, features.size(2)), z.unflatten(1, (H, W))

    def expand_sequence(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`expand_input` with the L = H W pixels in a row, (B, L, D) each."""
        check_map(x, self.dim)
        if not torch.jit.is_scripting():  # noqa: SIM102 (scripting leaves out only what stands alone under this)
            if has_only_weight(self.in_proj, x) and self.fuses_conv:
                return grootvl_ops.mixer_input(x, self.in_proj.weight, self.conv.weight, self.conv.dilation[0])
            if in_inference() and self.fuses_conv:
                features, z = call_linear(self.in_proj, x).chunk(2, dim=-1)  # the kernels read halves where they are
                features = grootvl_ops.depthwise_conv_silu(features, self.conv.weight, self.conv.dilation[0])
                return features.flatten(1, 2), z.flatten(1, 2)
        if self.splits_input:  # halves of one product would be copied, and their gradients joined
            weight = self.in_proj.weight
            if not torch.jit.is_scripting():
                weight = as_product_reads(weight, x)
            of_features, of_gate = weight.chunk(2)
            features, z = F.linear(x, of_features), F.linear(x, of_gate)
        else:
            features, z = self.in_proj(x).chunk(2, dim=-1)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if x.is_cuda and in_training() and self.fuses_conv:
                features = grootvl_ops.depthwise_conv_silu(features, self.conv.weight, self.conv.dilation[0])
                return features.flatten(1, 2), z.flatten(1, 2)
        features = self.conv(features.permute(0, 3, 1, 2))
        if not torch.jit.is_scripting():  # noqa: SIM102
            if takes_sequence(self.act):
                return silu_of_sequence(features), z.flatten(1, 2)
        return self.act(features).permute(0, 2, 3, 1).flatten(1, 2), z.flatten(1, 2)

    def check_guide(self, guide: Tensor | None, features: Tensor) -> Tensor:
        """What trees are built on: `guide`, of as many pixels as `features`, or without one the features."""
        if guide is None:
            return features
        B, H, W, _ = features.shape
        if guide.dim() != 4 or guide.shape[:3] != features.shape[:3]:
            raise ValueError(f"guide must be ({B}, {H}, {W}, any number of channels), got {list(guide.shape)}")
        return guide

    def scan_and_project(self, features: Tensor, z: Tensor, scans: list[tuple[Tree, str]]) -> Tensor:
        """From features and gate, (B, H, W, D) each, to the output (B, H, W, dim)."""
        B, H, W, _ = features.shape
        return self.scan_sequence(features.flatten(1, 2), z.flatten(1, 2), scans).view(B, H, W, self.dim)

    def scan_sequence(self, x: Tensor, z: Tensor, scans: list[tuple[Tree, str]]) -> Tensor:
        """`scan_and_project` of maps whose L pixels are in a row, (B, L, D) each, to (B, L, dim)."""
        if not torch.jit.is_scripting():
            if len(scans) == 1 and self.runs_after_tree(x):
                step, h_norm, out_norm = self.dt_proj, self.h_norm, self.out_norm
                return grootvl_ops.mixer_output(
                    x, z, self.x_proj.weight, step.weight, step.bias, self.A_log, self.D_skip,
                    h_norm.weight, h_norm.bias, out_norm.weight, out_norm.bias, self.out_proj.weight,
                    *scans[0], h_norm.eps,
                )  # fmt: skip
            if multiplies_whole_words(self.x_proj, x) and self.fuses_step:
                rank = whole_words(self.dt_rank)
                of_step, of_others = self.x_proj.weight.split([self.dt_rank, 2 * self.d_state])
                weight = torch.cat((F.pad(of_step, (0, 0, 0, rank - self.dt_rank)), of_others))
                projected = linear_of_whole_words(x, weight)[..., : len(weight)]
                y = self.selective_scan(x, z, projected, scans, rank)
            else:
                y = self.selective_scan(x, z, call_linear(self.x_proj, x), scans)
            return call_linear(self.out_proj, y)
        return self.out_proj(self.selective_scan(x, z, self.x_proj(x), scans))

    def selective_scan(
        self, x: Tensor, z: Tensor, projected: Tensor, scans: list[tuple[Tree, str]], rank: int | None = None
    ) -> Tensor:
        """Everything between the projections: discretisation, scan, norms, skip and gate.

        Args:
            x: (B, L, D), what is scanned.
            z: (B, L, D), the gate before its activation.
            projected: (B, L, R + 2 N), for every pixel the step size of low rank R, B and C.
            scans: trees over the L pixels and directions.
            rank: R, where zeros follow the `dt_rank` values of the step size.

        Returns:
            (B, L, D) of x's dtype.
        """
        rank = self.dt_rank if rank is None else rank
        dt, B, C = projected.split([rank, self.d_state, self.d_state], dim=-1)
        if self.fuses_step:
            dt_weight, dt_bias = self.dt_proj.weight, self.dt_proj.bias
            if rank > self.dt_rank:
                dt_weight = F.pad(dt_weight, (0, rank - self.dt_rank))
        else:
            dt, dt_weight, dt_bias = self.dt_proj(dt).to(x.dtype), None, None
        weights: Tensor | None = None
        if self.d_state == 1:  # C is applied after the norm
            B, scale = B.squeeze(-1), C.squeeze(-1)
        else:
            weights, scale = C, torch.ones_like(C[..., 0])
        h: Tensor | None = None
        for tree, direction in scans:
            part = grootvl_ops.selective_scan(x, dt, dt_weight, dt_bias, self.A_log, B, tree, direction, weights)
            h = part if h is None else h + part
        if h is None:
            raise ValueError("scans must return at least one tree")
        return self.norm_and_gate(h, x, z, scale)

    def norm_and_gate(self, h: Tensor, x: Tensor, z: Tensor, C: Tensor) -> Tensor:
        """out_norm(C h_norm(h) + D_skip x) SiLU(z) of h, x and z (B, L, D) and C (B, L)."""
        if self.fuses_norms:
            return grootvl_ops.gated_norm(
                h, x, z, C, self.D_skip,
                self.h_norm.weight, self.h_norm.bias, self.out_norm.weight, self.out_norm.bias, self.h_norm.eps,
            )  # fmt: skip
        dtype = accumulation_dtype(h.dtype)
        y = C.to(dtype).unsqueeze(-1) * self.h_norm(h.to(dtype)) + self.D_skip.to(dtype) * x.to(dtype)
        return (self.out_norm(y) * F.silu(z.to(dtype))).to(h.dtype)

    @torch.jit.unused
    def runs_after_tree(self, x: Tensor) -> bool:
        """Whether `grootvl_ops.mixer_output` may compute everything from x, (B, L, D), on, for a single scan."""
        return (
            has_only_weight(self.x_proj, x)
            and has_only_weight(self.out_proj, x)
            and product_dtype(x) == x.dtype
            and self.has_one_state_and_weights()
        )

    @torch.jit.unused
    def has_one_state_and_weights(self) -> bool:
        """Whether an operation for one state may take the weights of `dt_proj` and of both norms in place of calls."""
        # From the dictionaries, because this is asked of every block: nn.Module finds an attribute by a search that
        # takes longer than all the rest.
        layers: Any = self._modules
        A_log: Any = self._parameters["A_log"]
        device, step = A_log.device, layers["dt_proj"]
        return (
            self.d_state == 1
            and is_plain(step, nn.Linear, device)
            and step._parameters["bias"] is not None
            and _fuses_norms(layers["h_norm"], layers["out_norm"], device)
        )

    @property
    def splits_input(self) -> bool:
        """Whether features and gate are products with halves of the weight of `in_proj`; otherwise it is called."""
        return is_plain(self.in_proj, nn.Linear, self.A_log.device) and self.in_proj.bias is None

    @property
    def fuses_conv(self) -> bool:
        """Whether one operation takes the weight of `conv`; otherwise `conv` and `act` are called."""
        return fuses_convolution(self.conv, self.act, self.A_log.device)

    @property
    def fuses_step(self) -> bool:
        """Whether the scan takes the weights of `dt_proj`; otherwise it is called."""
        return is_plain(self.dt_proj, nn.Linear, self.A_log.device)

    @property
    def fuses_norms(self) -> bool:
        """Whether one operation takes the weights of `h_norm` and `out_norm`; otherwise they are called."""
        return _fuses_norms(self.h_norm, self.out_norm, self.A_log.device)

"""The SS2D mixer of VMamba: a selective state space model along four paths, each with its own parameters.

Paper: VMamba, arXiv 2401.10166, section 4.2, in the form of the published networks `vssm1`: no gate, and a sum over the
directions before the norm.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

import grootvl_ops
from grootvl_ops import Tree
from grootvl_ops.reference import accumulation_dtype

from .bypass import in_inference, in_training
from .convolution import fuses_convolution, silu_of_sequence, takes_sequence
from .linear import call_linear
from .norms import LayerNorm, norm_for_product
from .scans import cross_paths
from .selective_ssm import check_map, check_sizes, init_parameters
from .tracing import TraceLeaf

__all__ = ["SS2D"]

NUM_DIRECTIONS = 4


class SS2D(TraceLeaf):
    """State space model on channels-last maps along the four paths of a cross scan.

    With D = expand dim inner channels and N states a channel, u = SiLU(conv(in_proj(x))) and in each direction k, of
    which step size, B and C are projected from u and h_t follows its path,

        delta = softplus(dt_weight_k dt_k + dt_bias_k)
        h_n,t = exp(-exp(A_log_k,n) delta_t) h_n,t-1 + delta_t B_k,n,t u_t,     n = 1 ... N
        y = sum over k of (sum over n of C_k,n h_n) + D_skip_k u,  each at its own pixel
        output = out_proj(LN(y)).

    All directions read one map: a path says which pixel comes next, and nothing is reordered. One operation computes
    all of them if N is 1. Discretisation, states, the sum over the directions and the norm are computed in float32
    (float64 for float64 maps), also under autocast and in modules that were cast to a half precision.

    Args:
        dim: Channels of the input and output.
        expand: Inner channels per input channel.
        d_state: N; published: 1.
        dilation: Of the depthwise convolution, for maps that are finer than those that the weights were trained on.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: dim, expand, d_state or dilation less than 1.
    """

    def __init__(self, dim: int, expand: int = 1, d_state: int = 1, dilation: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        check_sizes(dim=dim, expand=expand, d_state=d_state, dilation=dilation)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner_dim = expand * dim
        self.dim = dim
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)

        self.in_proj = nn.Linear(dim, inner_dim, bias=False, **dd)
        self.conv = nn.Conv2d(
            inner_dim, inner_dim, 3, padding=dilation, dilation=dilation, groups=inner_dim, bias=False, **dd
        )
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(inner_dim, NUM_DIRECTIONS * (self.dt_rank + 2 * d_state), bias=False, **dd)
        channels = (NUM_DIRECTIONS, inner_dim)
        self.dt_weight = nn.Parameter(torch.empty(*channels, self.dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(channels, **dd))
        self.A_log = nn.Parameter(torch.empty(channels if d_state == 1 else (*channels, d_state), **dd))
        self.D_skip = nn.Parameter(torch.empty(channels, **dd))
        self.out_norm = norm_for_product(LayerNorm, inner_dim, eps=1e-5, **dd)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters; convolution, x_proj and norm keep the default of their kind."""
        init_parameters(self, self.dt_weight, self.dt_bias)

    @torch.jit.ignore()
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay (timm's convention): in the published code `Ds` has one
        dimension, and the other parameters of the scan have two or more and decay."""
        return {"D_skip"}

    def paths(self, features: Tensor) -> Tree:
        """The paths of the scans, one for each group of parameters, as one tree with fields (4, L). All are scanned
        "down", from the first pixel to the last.

        Args:
            features: (B, H, W, D), the map that is scanned.
        """
        return cross_paths(features)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map, (B, H, W, dim) to (B, H, W, dim).

        Raises:
            ValueError: x of another shape.
        """
        features = self.scanned_features(x)
        B, H, W, D = features.shape
        u = features.reshape(B, H * W, D)
        if not torch.jit.is_scripting():
            y = self.out_norm(self.selective_scan(u, call_linear(self.x_proj, u), self.paths(features)))
            return call_linear(self.out_proj, y.to(u.dtype)).view(B, H, W, self.dim)
        y = self.out_norm(self.selective_scan(u, self.x_proj(u), self.paths(features)))
        return self.out_proj(y.to(u.dtype)).view(B, H, W, self.dim)

    def scanned_features(self, x: Tensor) -> Tensor:
        """From the input (B, H, W, dim) to the features that are scanned, (B, H, W, D)."""
        check_map(x, self.dim)
        if not torch.jit.is_scripting():  # noqa: SIM102 (scripting leaves out only what stands alone under this)
            runs = in_inference() or (x.is_cuda and in_training())
            if runs and fuses_convolution(self.conv, self.act, x.device):
                weight, dilation = self.conv.weight, self.conv.dilation[0]
                return grootvl_ops.depthwise_conv_silu(call_linear(self.in_proj, x), weight, dilation)
        features = self.conv(self.in_proj(x).permute(0, 3, 1, 2))
        if not torch.jit.is_scripting():  # noqa: SIM102
            if takes_sequence(self.act):
                return silu_of_sequence(features).unflatten(1, x.shape[1:3])
        return self.act(features).permute(0, 2, 3, 1)

    def selective_scan(self, u: Tensor, projected: Tensor, paths: Tree) -> Tensor:
        """The sum over the directions, skips included.

        Args:
            u: (B, L, D), what is scanned.
            projected: (B, L, K (R + 2 N)), for every pixel and direction the step size of low rank R, B and C.
            paths: K trees over the L pixels, with fields (K, L), which are scanned "down".

        Returns:
            (B, L, D), float32 (float64 for float64 maps): the sum of four scans need not fit into half precision.
        """
        dtype = accumulation_dtype(u.dtype)
        # One split, whose gradient is one concatenation.
        by_direction = projected.unflatten(-1, (self.A_log.size(0), self.dt_rank + 2 * self.d_state))
        dt, B, C = by_direction.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        D_skip = self.D_skip.to(dtype).sum(0)
        if self.d_state == 1:
            parameters = (self.dt_weight, self.dt_bias, self.A_log)
            return grootvl_ops.merged_scan(
                u, dt, *parameters, B.squeeze(-1), C.squeeze(-1), paths, "down", D_skip, dtype
            )
        y = u * D_skip
        for k in range(self.A_log.size(0)):
            path = Tree(paths.parent[k : k + 1], paths.order[k : k + 1], paths.subtree_size[k : k + 1])
            of_group = (dt[:, :, k], self.dt_weight[k], self.dt_bias[k], self.A_log[k], B[:, :, k])
            # In place, this addition is one kernel, also under autocast, whatever the dtypes.
            y.add_(grootvl_ops.selective_scan(u, *of_group, path, "down", C[:, :, k]))
        return y

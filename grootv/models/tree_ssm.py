"""The TreeSSM mixer: a selective state space model that scans along a minimum spanning tree of its own input.

Paper: GrootVL / MambaTree, arXiv 2406.02395, section 3.2.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

import grootvl_ops
from grootvl_ops import Tree

from .layer_norm import can_fuse

ROOTS = ("all", "first")

# A traced call would keep the map size that it was traced with; scripted inside a trace, it takes any.
_build_tree = torch.jit.script_if_tracing(grootvl_ops.build_tree)


class PromotedLayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, whatever the dtype of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


@register_notrace_module  # its shape checks and tree cannot be followed symbolically
class TreeSSM(nn.Module):
    """Tree state space model on channels-last maps (paper, section 3.2 and Algorithm 1), with a state of size one.

    From the input come a map x, by a depthwise convolution, and a gate z. The minimum spanning tree of the pixels is
    built on x. With the step size Delta, input and output weights B and C projected from x,

        a = exp(-exp(A_log) Delta),  xi = Delta B x,  h = tree_scan(xi, a),
        output = out_proj(LN(C LN(h) + D_skip x) SiLU(z)).

    Discretisation, scan and both norms run in float32 (float64 for float64 modules), also under autocast and in
    modules that were cast to a half precision. On CUDA they are two fused kernels, which read and write the maps in the
    precision they have; setting `fused` to False takes the plain path there too.

    Args:
        dim: Channels of the input and output.
        expand: Inner channels per input channel.
        metric: Dissimilarity of neighbouring pixels, "cosine", "euclidean" or "manhattan".
        root: "all": every pixel aggregates the whole map, as if it were the root; "first": the only root is the first
            pixel, so that every pixel aggregates the subtree below it.

    Raises:
        ValueError: an unknown metric or root.
    """

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        metric: str = "cosine",
        root: str = "all",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if metric not in grootvl_ops.METRICS:
            raise ValueError(f"metric must be one of {grootvl_ops.METRICS}, got {metric!r}")
        if root not in ROOTS:
            raise ValueError(f"root must be one of {ROOTS}, got {root!r}")
        dd = {"device": device, "dtype": dtype}
        inner_dim = expand * dim
        self.metric = metric
        self.root = root
        self.dt_rank = math.ceil(dim / 16)
        self.fused = can_fuse(inner_dim)

        self.in_proj = nn.Linear(dim, 2 * inner_dim, bias=False, **dd)
        self.conv = nn.Conv2d(inner_dim, inner_dim, 3, padding=1, groups=inner_dim, bias=False, **dd)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(inner_dim, self.dt_rank + 2, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, inner_dim, **dd)
        self.A_log = nn.Parameter(torch.empty(inner_dim, **dd))
        self.D_skip = nn.Parameter(torch.empty(inner_dim, **dd))
        self.h_norm = PromotedLayerNorm(inner_dim, **dd)
        self.out_norm = PromotedLayerNorm(inner_dim, **dd)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters of the state space model; its projections keep the default of their kind."""
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D_skip)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        # Step sizes start log-uniform in [1e-3, 1e-1]; dt + log(1 - exp(-dt)) is the inverse of softplus.
        dt = torch.empty_like(self.dt_proj.bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1))
        dt = dt.exp_().clamp_(min=1e-4)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay (timm's convention)."""
        return {"D_skip"}

    @torch.jit.ignore
    def also_weight_decay(self) -> set[str]:
        """Names of the parameters of one dimension that take weight decay, which others of one dimension do not.

        In the published code they have two dimensions, (D, 1) and (1, D), and decay by its rule.
        """
        return {"A_log", "dt_proj.bias"}

    def forward(self, x: Tensor, tree: Tree | None = None) -> tuple[Tensor, Tree]:
        """Mix a (B, H, W, C) map along `tree`, or along a new tree built on it.

        Returns:
            The mixed (B, H, W, C) map, and the tree that was used.
        """
        B, H, W, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.act(x)
        if tree is None:
            tree = _build_tree(x, self.metric)
        x = x.reshape(B, H * W, -1)
        z = z.reshape(B, H * W, -1)
        y = self.selective_scan(x, z, self.x_proj(x), tree)
        return self.out_proj(y).view(B, H, W, -1), tree

    def selective_scan(self, x: Tensor, z: Tensor, projected: Tensor, tree: Tree) -> Tensor:
        """Everything between the projections: discretisation, scan, norms, skip and gate.

        Args:
            x: (B, L, D), what is scanned.
            z: (B, L, D), the gate before its activation.
            projected: (B, L, R + 2), for every pixel the low-rank step size, B and C.
            tree: over the L pixels.

        Returns:
            (B, L, D) of z's dtype.
        """
        if self.fused and x.is_cuda:
            return self._fused_scan_and_norm(x, z, projected, tree)
        if torch.jit.is_scripting():  # TorchScript cannot switch autocast off for a device it learns at run time
            y = self._scan_and_norm(x, projected, tree)
        else:
            autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
            with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
                y = self._scan_and_norm(x, projected, tree)
        return y.to(z.dtype) * self.act(z)

    def _fused_scan_and_norm(self, x: Tensor, z: Tensor, projected: Tensor, tree: Tree) -> Tensor:
        dt, B, C = projected.split([self.dt_rank, 1, 1], dim=-1)
        h = grootvl_ops.selective_scan(
            x, dt, self.dt_proj.weight, self.dt_proj.bias, self.A_log, B.squeeze(-1), tree, self.root == "first"
        )
        return grootvl_ops.gated_norm(
            h, x, z, C.squeeze(-1), self.D_skip,
            self.h_norm.weight, self.h_norm.bias, self.out_norm.weight, self.out_norm.bias, self.h_norm.eps,
        )  # fmt: skip

    def _scan_and_norm(self, x: Tensor, projected: Tensor, tree: Tree) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.to(dtype)
        dt, B, C = projected.to(dtype).split([self.dt_rank, 1, 1], dim=-1)
        delta = F.softplus(F.linear(dt, self.dt_proj.weight.to(dtype), self.dt_proj.bias.to(dtype)))
        decay = torch.exp(delta * -self.A_log.to(dtype).exp())
        h = grootvl_ops.tree_scan(delta * (B * x), decay, tree, self.root == "first")
        y = torch.addcmul(C * self.h_norm(h), self.D_skip.to(dtype), x)
        return self.out_norm(y)

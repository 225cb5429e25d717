"""The MLP of a residual block."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import grootvl_ops

from .linear import call_linear, linear_gelu, linear_runs_gelu, runs_gelu_mlp

__all__ = ["Mlp"]


class Mlp(nn.Module):
    """Two linear layers around an activation, on (..., C)."""

    def __init__(
        self, dim: int, hidden_dim: int, act_layer: Callable[..., nn.Module] = nn.GELU, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (scripting leaves out only what stands alone under this)
            if runs_gelu_mlp(self.fc1, self.act, self.fc2, x):
                return grootvl_ops.gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            if linear_runs_gelu(self.fc1, self.act, x):
                return call_linear(self.fc2, linear_gelu(self.fc1, self.act, x))
        return self.fc2(self.act(self.fc1(x)))

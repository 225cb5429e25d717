"""What the backward pass of an MLP computes between its products, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scans import accumulation_dtype


def gelu_mlp_backward(dhidden: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For what a GELU takes and the gradient of what it gives, (rows, hidden) each: what it gives, and the gradient of
    what it takes, by the approximation with tanh, and the sum of the latter over the rows."""
    dtype = accumulation_dtype(before.dtype)
    values = before.to(dtype)
    dbefore = torch.ops.aten.gelu_backward(dhidden.to(dtype), values, approximate="tanh")
    return F.gelu(values, approximate="tanh").to(before.dtype), dbefore.to(before.dtype), dbefore.sum(0)

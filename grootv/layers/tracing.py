"""Symbolic traces: `torch.fx.symbolic_trace`, torchvision's and timm's feature extractors, FX quantisation."""

from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = ["TraceLeaf"]


class TraceLeaf(nn.Module):
    """Base of modules that every symbolic trace keeps as one call, as it keeps PyTorch's own layers.

    For a forward pass that asks for sizes, devices or trees, which a trace does not have.
    """

    def __call__(self, *args, **kwargs):
        for argument in args:
            if isinstance(argument, torch.fx.Proxy):
                tracer: Any = argument.tracer
                return tracer.call_module(self, partial(self._keep, tracer), args, kwargs)
        return super().__call__(*args, **kwargs)

    def _keep(self, tracer: torch.fx.Tracer, *args, **kwargs) -> torch.fx.Proxy:
        """What a tracer that would follow the forward pass gets instead."""
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

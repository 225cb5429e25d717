"""When a fused operation may take a submodule's weights instead of calling the submodule."""

import torch
from torch import Tensor, nn

__all__ = ["is_plain"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in _HOOKS]


def is_plain(module: nn.Module, kind: type[nn.Module], device: torch.device) -> bool:
    """Whether a call of `module` would do nothing but what `kind` does with its `weight` and `bias`.

    Otherwise something else takes part in a call, and the module has to be called: a subclass (adapters, quantisation,
    parametrizations), a replaced `forward` (offloading), hooks (pruning, weight norm, sharding, observers), or a weight
    that is a tensor of another kind (quantised or distributed) or on another device.

    Args:
        module: A submodule with `weight` and `bias` if it is a `kind`.
        kind: The class that it must be an instance of, itself and no subclass.
        device: Where its weight must be.
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if any(getattr(module, hooks) for hooks in _HOOKS) or any(_GLOBAL_HOOKS):
        return False
    weight: Tensor | None = module.weight
    return weight is not None and weight.device == device and not hasattr(weight, "__tensor_flatten__")

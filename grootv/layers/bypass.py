"""When a fused operation may take a submodule's weights instead of calling the submodule."""

import torch
from torch import nn
from torch.autograd import forward_ad

__all__ = ["autocasts", "in_eager_mode", "in_inference", "in_training", "is_plain", "only_runs"]

# The hooks of all modules.
_PRE_HOOKS, _HOOKS, _BACKWARD_PRE_HOOKS, _BACKWARD_HOOKS = (
    getattr(torch.nn.modules.module, f"_global_{hooks}")
    for hooks in ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
)


def in_inference() -> bool:
    """Whether nothing can be differentiated, so that an operation without derivatives may compute it."""
    return not (torch.is_grad_enabled() or _is_transformed())


def in_training() -> bool:
    """Whether gradients are recorded, and for a backward pass alone, which is all that fused operations know."""
    return torch.is_grad_enabled() and not _is_transformed()


def in_eager_mode() -> bool:
    """Whether each operation runs where it is called, and no mode of PyTorch watches (counters, tracers): a compiler
    fuses PyTorch's own operations, and modes know them."""
    return not (
        torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    )


def _is_transformed() -> bool:
    return (
        torch.jit.is_tracing()  # a traced call is traced once more without gradients: the two must be the same
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def autocasts(device_type: str, dtype: torch.dtype) -> bool:
    """Whether autocast is active on such a device and converts tensors of `dtype`."""
    return dtype != torch.float64 and device_type != "meta" and torch.is_autocast_enabled(device_type)


def only_runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` would do nothing but run the `forward` of `kind`, itself and no subclass."""
    if type(module) is not kind or "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return False
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return False
    return not (_PRE_HOOKS or _HOOKS or _BACKWARD_PRE_HOOKS or _BACKWARD_HOOKS)


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
    if not only_runs(module, kind):
        return False
    weight = module.__dict__["_parameters"].get("weight")  # nn.Module finds it by a search that takes longer
    if type(weight) is not nn.Parameter and (weight is None or hasattr(type(weight), "__tensor_flatten__")):
        return False
    return weight.device == device

"""Registration of the operations with torch.library: the compiled library, or the reference where there is none.

The compiled library defines the operations, their CPU (and CUDA) kernels and their gradients. Here stand shapes for
tracing, autocast, the reference as the kernel of last resort, for a device that the library has no kernels for, and the
gradients once more, for where there is no library.
"""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import reference

SCHEMAS = (
    "edge_weights(Tensor features, str metric) -> Tensor",
    "grid_tree(Tensor weights, SymInt height, SymInt width, SymInt root) -> (Tensor, Tensor, Tensor)",
    "graph_tree(Tensor edges, Tensor weights, SymInt num_vertices, SymInt root) -> (Tensor, Tensor, Tensor)",
    "tree_scan(Tensor x, Tensor decay, Tensor parent, Tensor order, Tensor subtree_size, bool up_only=False) -> Tensor",
    "tree_scan_backward(Tensor grad, Tensor x, Tensor decay, Tensor parent, Tensor order, Tensor subtree_size, "
    "bool up_only=False) -> (Tensor, Tensor)",
    "selective_scan(Tensor x, Tensor dt, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor B, Tensor parent, "
    "Tensor order, Tensor subtree_size, bool up_only=False) -> Tensor",
    "selective_scan_backward(Tensor grad, Tensor x, Tensor dt, Tensor dt_weight, Tensor dt_bias, Tensor A_log, "
    "Tensor B, Tensor parent, Tensor order, Tensor subtree_size, bool up_only=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gated_norm(Tensor h, Tensor x, Tensor z, Tensor C, Tensor D_skip, Tensor h_weight, Tensor h_bias, "
    "Tensor out_weight, Tensor out_bias, float eps) -> (Tensor, Tensor)",
    "gated_norm_backward(Tensor grad, Tensor h, Tensor x, Tensor z, Tensor C, Tensor D_skip, Tensor h_weight, "
    "Tensor h_bias, Tensor out_weight, Tensor out_bias, Tensor statistics) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType? dtype=None) -> (Tensor, Tensor)",
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor statistics) -> (Tensor, Tensor)",
)
REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation ./ops"
PACKAGE = Path(__file__).parent


def built() -> dict[str, str | None]:
    """What the compiled library was built with (torch, CUDA, architectures, compiler); empty where there is none."""
    try:
        record = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):  # none, or a damaged one
        return {}
    return record if isinstance(record, dict) and library_file() else {}


def library_file() -> Path | None:
    """The compiled library beside this file, or None."""
    return next((file for pattern in ("_C*.so", "_C*.pyd") for file in sorted(PACKAGE.glob(pattern))), None)


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def load() -> str | None:
    """Load the compiled library. Returns None, or in one sentence why there is none and what mends it."""
    file = library_file()
    if file is None:
        return f"grootvl_ops was installed without its compiled library (no C++ compiler?); mend it with `{REBUILD}`"
    torch_built = built().get("torch", "an unknown version")
    if _release(torch_built) != _release(torch.__version__):
        return (
            f"the compiled library {file.name} was built against torch {torch_built}, but torch {torch.__version__} is "
            f"installed; mend it with `{REBUILD}`"
        )
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"the compiled library {file.name} could not be loaded ({error}); mend it with `{REBUILD}`"
    return None


problem = load()
_library = torch.library.Library("grootvl_ops", "FRAGMENT")
if problem is not None:
    for schema in SCHEMAS:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

_warned: set[str] = set()


def has_kernels(device_type: str) -> bool:
    """Whether the compiled library serves tensors on this type of device ("cpu", "cuda", ...)."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("grootvl_ops::tree_scan", key)


def warn_reference(device_type: str) -> None:
    """Say once per type of device that the slow reference serves it."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    reason = problem or f"the compiled library has no kernels for {device_type} tensors (built for: {built()})"
    warnings.warn(f"grootvl_ops runs its slow reference for {device_type} tensors: {reason}", stacklevel=3)


def _register_reference(name: str) -> None:
    function = getattr(reference, name)

    def kernel(*args, **kwargs):
        warn_reference(args[0].device.type)
        return function(*args, **kwargs)

    # Chosen by the dispatcher only for devices that have no kernel of their own.
    _library.impl(name, kernel, "CompositeExplicitAutograd")


for _name in ("edge_weights", "grid_tree", "graph_tree", "tree_scan", "tree_scan_backward"):
    _register_reference(_name)


def _register_composite(name: str, function) -> None:
    """A few operations of PyTorch around the tree scan: fused kernels exist for CUDA only."""

    def kernel(*args):
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    _library.impl(name, kernel, "CompositeExplicitAutograd")


_register_composite("selective_scan", partial(reference.selective_scan, scan=torch.ops.grootvl_ops.tree_scan))
_register_composite(
    "selective_scan_backward",
    partial(reference.selective_scan_backward, scan_backward=torch.ops.grootvl_ops.tree_scan_backward),
)
_register_composite("gated_norm", reference.gated_norm)
_register_composite("gated_norm_backward", reference.gated_norm_backward)
_register_composite("layer_norm", reference.layer_norm)
_register_composite("layer_norm_backward", reference.layer_norm_backward)


@torch.library.register_fake("grootvl_ops::edge_weights")
def _(features: Tensor, metric: str) -> Tensor:
    batch, height, width, _ = features.shape
    dtype = reference.accumulation_dtype(features.dtype)
    return features.new_empty((batch, (height - 1) * width + height * (width - 1)), dtype=dtype)


def _fake_tree(like: Tensor, num_vertices: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (like.shape[0], num_vertices)
    return tuple(like.new_empty(shape, dtype=torch.int32) for _ in range(3))


@torch.library.register_fake("grootvl_ops::grid_tree")
def _(weights: Tensor, height: int, width: int, root: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_tree(weights, height * width)


@torch.library.register_fake("grootvl_ops::graph_tree")
def _(edges: Tensor, weights: Tensor, num_vertices: int, root: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_tree(weights, num_vertices)


@torch.library.register_fake("grootvl_ops::tree_scan")
def _(x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, subtree_size: Tensor, up_only: bool = False) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("grootvl_ops::tree_scan_backward")
def _(
    grad: Tensor, x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, subtree_size: Tensor, up_only: bool = False
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), decay.new_empty(decay.shape)


@torch.library.register_fake("grootvl_ops::selective_scan")
def _(x: Tensor, *parameters_and_tree) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("grootvl_ops::selective_scan_backward")
def _(
    grad: Tensor, x: Tensor, dt: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, *tree_and_mode
) -> tuple[Tensor, ...]:
    dparameters = dt_bias.new_empty((2, dt_bias.shape[0]), dtype=reference.accumulation_dtype(x.dtype))
    return (*(operand.new_empty(operand.shape) for operand in (x, dt, dt_weight)), dparameters, B.new_empty(B.shape))


@torch.library.register_fake("grootvl_ops::gated_norm")
def _(h: Tensor, *others) -> tuple[Tensor, Tensor]:
    statistics = h.new_empty((*h.shape[:-1], 4), dtype=reference.accumulation_dtype(h.dtype))
    return h.new_empty(h.shape), statistics


@torch.library.register_fake("grootvl_ops::gated_norm_backward")
def _(grad: Tensor, h: Tensor, x: Tensor, z: Tensor, C: Tensor, D_skip: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    dparameters = D_skip.new_empty((5, D_skip.shape[0]), dtype=reference.accumulation_dtype(h.dtype))
    return (*(operand.new_empty(operand.shape) for operand in (h, x, z, C)), dparameters)


@torch.library.register_fake("grootvl_ops::layer_norm")
def _(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    statistics = x.new_empty((*x.shape[:-1], 2), dtype=reference.accumulation_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=dtype), statistics


@torch.library.register_fake("grootvl_ops::layer_norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    dparameters = x.new_empty((2, x.shape[-1]), dtype=reference.accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), dparameters


def _save_for_scan(ctx, inputs, output) -> None:
    *tensors, ctx.up_only = inputs
    ctx.save_for_backward(*tensors)


def _save_for_norm(ctx, inputs, output) -> None:
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), statistics)


def _tree_scan_gradients(ctx, grad: Tensor):
    dx, ddecay = torch.ops.grootvl_ops.tree_scan_backward(grad, *ctx.saved_tensors, ctx.up_only)
    return dx, ddecay, None, None, None, None


def _selective_scan_gradients(ctx, grad: Tensor):
    *maps, dparameters, dB = torch.ops.grootvl_ops.selective_scan_backward(grad, *ctx.saved_tensors, ctx.up_only)
    return *maps, *dparameters, dB, None, None, None, None


def _gated_norm_gradients(ctx, grad: Tensor, _):
    *maps, dparameters = torch.ops.grootvl_ops.gated_norm_backward(grad, *ctx.saved_tensors)
    return *maps, *dparameters, None


def _layer_norm_gradients(ctx, grad: Tensor, _):
    x, weight, _, statistics = ctx.saved_tensors
    dx, dparameters = torch.ops.grootvl_ops.layer_norm_backward(grad, x, weight, statistics)
    return dx, *dparameters, None, None


def _no_double_backward(name: str):
    def refuse(ctx, *grads):
        raise RuntimeError(f"grootvl_ops.{name} can be differentiated once only: it has no second derivatives")

    return refuse


def _register_autograd() -> None:
    """The same as `csrc/autograd.cpp`, which spares the host most of the time that this takes a call."""
    for name, save, gradients in (
        ("tree_scan", _save_for_scan, _tree_scan_gradients),
        ("selective_scan", _save_for_scan, _selective_scan_gradients),
        ("gated_norm", _save_for_norm, _gated_norm_gradients),
        ("layer_norm", _save_for_norm, _layer_norm_gradients),
    ):
        torch.library.register_autograd(f"grootvl_ops::{name}", gradients, setup_context=save)
        torch.library.register_autograd(f"grootvl_ops::{name}_backward", _no_double_backward(name))


# Asked of the dispatcher, because a library that was built from older sources has none either.
if not torch._C._dispatch_has_kernel_for_dispatch_key("grootvl_ops::tree_scan", "Autograd"):
    _register_autograd()


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    """Under autocast, cast half-precision data to float32: results of a long product of decays need its range.

    torch.library.register_autocast does the same for one type of device, but its second call takes over the first one's
    kernel under torch.compile, which then leaves bfloat16 on CPUs as it is.
    """

    def kernel(x: Tensor, decay: Tensor, *tree_and_mode):
        with torch.autocast(device_type, enabled=False):
            x, decay = (data.to(torch.promote_types(data.dtype, torch.float32)) for data in (x, decay))
            return torch.ops.grootvl_ops.tree_scan(x, decay, *tree_and_mode)

    _library.impl("tree_scan", kernel, dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")

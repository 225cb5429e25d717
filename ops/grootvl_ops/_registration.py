"""Registration of the operations with torch.library, besides the kernels and gradients of the compiled library.

Here stand the shapes of results for tracing, the rule for autocast, the reference as the kernel for devices without
kernels of their own, and the gradients for where there is no compiled library.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from . import _loading, reference
from ._schemas import SCHEMAS

_library = _loading.library

_library.impl("cast_weights", reference.cast_weights, "CompositeExplicitAutograd")
if _loading.problems["autograd"] is not None:
    _library.impl("cast_weights", reference.cast_weights, "Autograd")

for _name in ("cast_weights_into", "depthwise_conv_silu_backward_into", "gated_norm_backward_into"):
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
for _name in ("sums_wait", "sums_run"):  # where no kernel is, no sum waits
    _library.impl(_name, lambda like: None, "CompositeExplicitAutograd")


def _register_reference(name: str) -> None:
    function = getattr(reference, name)

    def kernel(*args, **kwargs):
        _loading.warn_reference(args[0].device.type)
        return function(*args, **kwargs)

    # Chosen by the dispatcher only for devices that have no kernel of their own.
    _library.impl(name, kernel, "CompositeExplicitAutograd")


for _name in ("edge_weights", "grid_tree", "graph_tree", "tree_scan", "tree_scan_backward"):
    _register_reference(_name)


def without_autocast(function: Callable) -> Callable:
    """The same function of tensors, whose operations keep the dtypes that they are given under autocast, too."""

    def called(*args):
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return called


def _register_composite(name: str, function: Callable) -> None:
    """An operation made of PyTorch's and the tree scan, for devices on which no fused kernel computes it."""
    _library.impl(name, without_autocast(function), "CompositeExplicitAutograd")


_scan, _scan_backward = torch.ops.grootvl_ops.tree_scan, torch.ops.grootvl_ops.tree_scan_backward
_register_composite("selective_scan", partial(reference.selective_scan, scan=_scan))
_register_composite(
    "selective_scan_backward",
    partial(reference.selective_scan_backward, scan=_scan, scan_backward=_scan_backward),
)
_selective_scan = torch.ops.grootvl_ops.selective_scan
_selective_scan_backward = torch.ops.grootvl_ops.selective_scan_backward
_register_composite("stepped_scan", partial(reference.stepped_scan, scan=_selective_scan))
_register_composite(
    "stepped_scan_backward", partial(reference.stepped_scan_backward, scan_backward=_selective_scan_backward)
)
_register_composite("merged_scan", partial(reference.merged_scan, scan=_selective_scan))
_register_composite(
    "merged_scan_backward",
    partial(reference.merged_scan_backward, scan_backward=_selective_scan_backward),
)
_FUSED = ("depthwise_conv_silu", "gelu_mlp", "gated_norm", "layer_norm", "add_layer_norm")
for _name in ("neighbour_cosines", "path_tree", "bias_backward", *_FUSED, *(f"{name}_backward" for name in _FUSED)):
    _register_composite(_name, getattr(reference, _name))


def _gelu_mlp_backward_of_products(
    grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    before = F.linear(x, weight1, bias1.to(x.dtype))
    return torch.ops.grootvl_ops.gelu_mlp_backward(grad @ weight2, before)


def _gelu_mlp_fused_backward(
    grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One kernel where there is one; otherwise products, and the operation that takes them."""
    from . import _mlp_kernel  # here, since it imports Triton

    if _mlp_kernel.runs(x, weight1):
        with torch.cuda.device(x.device):
            return _mlp_kernel.hidden_gradients(grad, x, weight1, bias1, weight2)
    return _gelu_mlp_backward_of_products(grad, x, weight1, bias1, weight2)


_register_composite("gelu_mlp_fused_backward", _gelu_mlp_fused_backward)


# The schemas say the types of arguments. Where a signature would take a line for each argument, they do so alone.


@torch.library.register_fake("grootvl_ops::edge_weights")
def _(features: Tensor, metric: str) -> Tensor:
    batch, height, width, _ = features.shape
    dtype = reference.accumulation_dtype(features.dtype)
    return features.new_empty((batch, (height - 1) * width + height * (width - 1)), dtype=dtype)


@torch.library.register_fake("grootvl_ops::neighbour_cosines")
def _(x: Tensor, neighbours: int) -> Tensor:
    return x.new_empty((*x.shape[:2], neighbours), dtype=reference.accumulation_dtype(x.dtype))


def _fake_tree(like: Tensor, num_vertices: int) -> tuple[Tensor, Tensor, Tensor]:
    parent, order, subtree_size = (like.new_empty((like.shape[0], num_vertices), dtype=torch.int32) for _ in range(3))
    return parent, order, subtree_size


@torch.library.register_fake("grootvl_ops::grid_tree")
def _(weights: Tensor, height: int, width: int, root: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_tree(weights, height * width)


@torch.library.register_fake("grootvl_ops::graph_tree")
def _(edges: Tensor, weights: Tensor, num_vertices: int, root: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_tree(weights, num_vertices)


@torch.library.register_fake("grootvl_ops::path_tree")
def _(order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_tree(order, order.shape[1])


@torch.library.register_fake("grootvl_ops::tree_scan")
def _(x: Tensor, *decay_and_tree) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("grootvl_ops::tree_scan_backward")
def _(grad: Tensor, x: Tensor, decay: Tensor, *tree) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), decay.new_empty(decay.shape)


@torch.library.register_fake("grootvl_ops::selective_scan")
def _(x, dt, dt_weight, dt_bias, A_log, B, C, *tree) -> Tensor:
    states = A_log.shape[1:] if C is None else ()
    return x.new_empty((*x.shape, *states))


@torch.library.register_fake("grootvl_ops::selective_scan_backward")
def _(grad, x, dt, dt_weight, dt_bias, A_log, B, C, *tree) -> tuple[Tensor, ...]:
    num_states = A_log.shape[1] if A_log.dim() == 2 else 1
    dparameters = x.new_empty((1 + num_states, x.shape[2]), dtype=reference.accumulation_dtype(x.dtype))
    dx, ddt, dB = (operand.new_empty(operand.shape) for operand in (x, dt, B))
    dweight, dC = (x.new_empty(0) if given is None else given.new_empty(given.shape) for given in (dt_weight, C))
    return dx, ddt, dweight, dparameters, dB, dC


@torch.library.register_fake("grootvl_ops::stepped_scan")
def _(x: Tensor, *others) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("grootvl_ops::stepped_scan_backward")
def _(grad, x, dt, decay_dt, A_log, B, C, *tree) -> tuple[Tensor, ...]:
    dx, ddt, ddecay_dt, dB, dC = (operand.new_empty(operand.shape) for operand in (x, dt, decay_dt, B, C))
    return dx, ddt, ddecay_dt, A_log.new_empty(A_log.shape, dtype=reference.accumulation_dtype(x.dtype)), dB, dC


@torch.library.register_fake("grootvl_ops::merged_scan")
def _(
    x, dt, dt_weight, dt_bias, A_log, B, C, D_skip, parent, order, subtree_size, direction, dtype=None, keep=False
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((A_log.shape[0], *x.shape) if keep else (0,))


@torch.library.register_fake("grootvl_ops::merged_scan_backward")
def _(grad, x, dt, dt_weight, dt_bias, A_log, B, C, *others) -> tuple[Tensor, ...]:
    dparameters = x.new_empty((3, *A_log.shape), dtype=reference.accumulation_dtype(x.dtype))
    dx, ddt, dweight, dB, dC = (operand.new_empty(operand.shape) for operand in (x, dt, dt_weight, B, C))
    return dx, ddt, dweight, dparameters, dB, dC


@torch.library.register_fake("grootvl_ops::gelu_mlp")
def _(x: Tensor, *parameters_and_fused) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("grootvl_ops::cast_weights")
def _(weights: list[Tensor], rows: list[int], columns: list[int], dtype: torch.dtype) -> list[Tensor]:
    sizes = [(n, m)[2 - weight.dim() :] for weight, n, m in zip(weights, rows, columns, strict=True)]
    return [weight.new_empty(size, dtype=dtype) for weight, size in zip(weights, sizes, strict=True)]


@torch.library.register_fake("grootvl_ops::bias_backward")
def _(grad: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[1:], dtype=reference.accumulation_dtype(grad.dtype))


@torch.library.register_fake("grootvl_ops::gelu_mlp_backward")
def _(dhidden: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, dbefore = (before.new_empty(before.shape) for _ in range(2))
    return hidden, dbefore, before.new_empty(before.shape[1:], dtype=reference.accumulation_dtype(before.dtype))


@torch.library.register_fake("grootvl_ops::gelu_mlp_fused_backward")
def _(grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, dbefore = (x.new_empty((x.shape[0], weight1.shape[0])) for _ in range(2))
    return hidden, dbefore, x.new_empty(bias1.shape, dtype=reference.accumulation_dtype(x.dtype))


@torch.library.register_fake("grootvl_ops::depthwise_conv_silu")
def _(x: Tensor, weight: Tensor, height: int, dilation: int, keep: bool = False) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if keep else (0,))


@torch.library.register_fake("grootvl_ops::depthwise_conv_silu_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, height: int, dilation: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=reference.accumulation_dtype(x.dtype))


@torch.library.register_fake("grootvl_ops::gated_norm")
def _(h: Tensor, *others) -> tuple[Tensor, Tensor]:
    statistics = h.new_empty((*h.shape[:-1], 4), dtype=reference.accumulation_dtype(h.dtype))
    return h.new_empty(h.shape), statistics


@torch.library.register_fake("grootvl_ops::gated_norm_backward")
def _(grad: Tensor, h: Tensor, x: Tensor, z: Tensor, C: Tensor, D_skip: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    dparameters = D_skip.new_empty((5, D_skip.shape[0]), dtype=reference.accumulation_dtype(h.dtype))
    return (*(operand.new_empty(operand.shape) for operand in (h, x, z, C)), dparameters)


@torch.library.register_fake("grootvl_ops::layer_norm")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    statistics = x.new_empty((*x.shape[:-1], 2), dtype=reference.accumulation_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=dtype), statistics


@torch.library.register_fake("grootvl_ops::layer_norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    dparameters = x.new_empty((2, x.shape[-1]), dtype=reference.accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), dparameters


@torch.library.register_fake("grootvl_ops::add_layer_norm")
def _(x, branch, weight, bias, eps, dtype=None, factors=None) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((*x.shape[:-1], 2), dtype=reference.accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), statistics


@torch.library.register_fake("grootvl_ops::add_layer_norm_backward")
def _(grad, grad_sum, x, weight, statistics, factors, branch_dtype) -> tuple[Tensor, Tensor, Tensor]:
    dparameters = x.new_empty((2, x.shape[-1]), dtype=reference.accumulation_dtype(x.dtype))
    shared = branch_dtype == x.dtype and factors is None
    return x.new_empty(x.shape), x.new_empty(0 if shared else x.shape, dtype=branch_dtype), dparameters


def _check_kept(name: str, keep: bool) -> None:
    if not keep:
        raise ValueError(f"{name} must be called with keep=True to be differentiated")


def _save_for_scan(ctx, inputs, output) -> None:
    *tensors, ctx.direction = inputs
    ctx.save_for_backward(*tensors)


def _save_for_merged_scan(ctx, inputs, output) -> None:
    *tensors, ctx.direction, _, keep = inputs
    _check_kept("merged_scan", keep)
    _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(*tensors, kept)


def _save_for_convolution(ctx, inputs, output) -> None:
    x, weight, *ctx.height_and_dilation, keep = inputs
    _check_kept("depthwise_conv_silu", keep)
    _, before = output
    ctx.mark_non_differentiable(before)
    ctx.save_for_backward(x, weight, before)


def _save_for_mlp(ctx, inputs, output) -> None:
    x, weight1, bias1, weight2, _, ctx.fused = inputs
    ctx.save_for_backward(x, weight1, bias1, weight2)


def _save_for_norm(ctx, inputs, output) -> None:
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), statistics)


def _save_for_added_norm(ctx, inputs, output) -> None:
    _, branch, weight, *_, factors = inputs
    total, _, statistics = output
    ctx.branch_dtype = branch.dtype
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, statistics, factors)


def _tree_scan_gradients(ctx, grad: Tensor):
    dx, ddecay = torch.ops.grootvl_ops.tree_scan_backward(grad, *ctx.saved_tensors, ctx.direction)
    return dx, ddecay, None, None, None, None


def _selective_scan_gradients(ctx, grad: Tensor):
    saved = ctx.saved_tensors  # once: checkpointing computes them again when they are asked for
    _, _, dt_weight, dt_bias, A_log, _, C, *_ = saved
    dx, ddt, ddt_weight, dparameters, dB, dC = torch.ops.grootvl_ops.selective_scan_backward(
        grad, *saved, ctx.direction
    )
    return (
        dx,
        ddt,
        None if dt_weight is None else ddt_weight,
        None if dt_bias is None else dparameters[0],
        dparameters[1] if A_log.dim() == 1 else dparameters[1:].T,
        dB,
        None if C is None else dC,
        *[None] * 4,
    )


def _stepped_scan_gradients(ctx, grad: Tensor):
    gradients = torch.ops.grootvl_ops.stepped_scan_backward(grad, *ctx.saved_tensors, ctx.direction)
    return *gradients, *[None] * 4


def _merged_scan_gradients(ctx, grad: Tensor, _):
    saved = ctx.saved_tensors
    _, _, _, dt_bias, _, _, _, D_skip, *_ = saved
    dx, ddt, ddt_weight, dparameters, dB, dC = torch.ops.grootvl_ops.merged_scan_backward(grad, *saved, ctx.direction)
    return (
        dx,
        ddt,
        ddt_weight,
        None if dt_bias is None else dparameters[0],
        dparameters[1],
        dB,
        dC,
        None if D_skip is None else dparameters[2, 0],
        *[None] * 6,
    )


def _convolution_gradients(ctx, grad: Tensor, _):
    x, weight, before = ctx.saved_tensors
    dbefore = torch.ops.aten.silu_backward(grad, before)  # which a compiler fuses with what gives the gradient
    dx, dweight = torch.ops.grootvl_ops.depthwise_conv_silu_backward(dbefore, x, weight, *ctx.height_and_dilation)
    if weight.is_contiguous():  # in channels last, too, where the dimension of size one has another stride
        dweight = dweight.as_strided(weight.shape, weight.stride())
    return dx, dweight, None, None, None


def _gelu_mlp_gradients(ctx, grad: Tensor):
    maps, weight1, bias1, weight2 = ctx.saved_tensors
    weight1, weight2 = weight1.to(maps.dtype), weight2.to(maps.dtype)
    grad, x = (rows.reshape(-1, rows.shape[-1]) for rows in (grad, maps))
    compute = torch.ops.grootvl_ops.gelu_mlp_fused_backward if ctx.fused else _gelu_mlp_backward_of_products
    hidden, dbefore, dbias1 = compute(grad, x, weight1, bias1, weight2)
    _, of_weight1, _, of_weight2, *_ = ctx.needs_input_grad
    dweight1, dweight2 = dbefore.t() @ x if of_weight1 else None, grad.t() @ hidden if of_weight2 else None
    dbias2 = grad.sum(0, dtype=dbias1.dtype) if ctx.fused else torch.ops.grootvl_ops.bias_backward(grad)
    return (dbefore @ weight1).view(maps.shape), dweight1, dbias1, dweight2, dbias2, None


def _gated_norm_gradients(ctx, grad: Tensor, _):
    *maps, dparameters = torch.ops.grootvl_ops.gated_norm_backward(grad, *ctx.saved_tensors)
    return *maps, *dparameters, None


def _layer_norm_gradients(ctx, grad: Tensor, _):
    x, weight, _, statistics = ctx.saved_tensors
    dx, dparameters = torch.ops.grootvl_ops.layer_norm_backward(grad, x, weight, statistics)
    return dx, *dparameters, None, None


def _add_layer_norm_gradients(ctx, grad_sum: Tensor | None, grad: Tensor | None, _):
    total, weight, statistics, factors = ctx.saved_tensors
    grad = torch.zeros_like(total) if grad is None else grad
    dx, dbranch, dparameters = torch.ops.grootvl_ops.add_layer_norm_backward(
        grad, grad_sum, total, weight, statistics, factors, ctx.branch_dtype
    )
    # Not told by the sizes, which a compiler would then take for constants.
    shared = ctx.branch_dtype == total.dtype and factors is None
    return dx, dx if shared else dbranch, *dparameters, None, None, None


_BACKWARD = [schema.partition("(")[0] for schema in SCHEMAS if schema.partition("(")[0].endswith("_backward")]


def _no_double_backward(name: str):
    def refuse(ctx, *grads):
        raise RuntimeError(f"grootvl_ops.{name} can be differentiated once only: it has no second derivatives")

    return refuse


def register_autograd(namespace: str = "grootvl_ops", library: torch.library.Library | None = None) -> None:
    """Register the gradients of the operations of a namespace.

    They are those of `csrc/autograd.cpp`, which take the host a small part of the time. A test compares the two.
    """
    library = _library if library is None else library
    for name, save, gradients in (
        ("tree_scan", _save_for_scan, _tree_scan_gradients),
        ("selective_scan", _save_for_scan, _selective_scan_gradients),
        ("stepped_scan", _save_for_scan, _stepped_scan_gradients),
        ("merged_scan", _save_for_merged_scan, _merged_scan_gradients),
        ("depthwise_conv_silu", _save_for_convolution, _convolution_gradients),
        ("gelu_mlp", _save_for_mlp, _gelu_mlp_gradients),
        ("gated_norm", _save_for_norm, _gated_norm_gradients),
        ("layer_norm", _save_for_norm, _layer_norm_gradients),
        ("add_layer_norm", _save_for_added_norm, _add_layer_norm_gradients),
    ):
        operation = getattr(getattr(torch.ops, namespace), name).default
        kernel = make_autograd_impl(operation, Info(_backward_fn=gradients, _setup_context_fn=save))
        library.impl(name, _without_tangents(kernel), "Autograd", with_keyset=True)
    for name in _BACKWARD:
        refuse = _no_double_backward(name.removesuffix("_backward"))
        torch.library.register_autograd(f"{namespace}::{name}", refuse, lib=library)


def _without_tangents(kernel: Callable) -> Callable:
    """The kernel of a gradient, which raises in forward mode: without this, tangents are dropped silently."""

    def checked(keyset, *args, **kwargs):
        if forward_ad._current_level >= 0:
            for argument in args:
                if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
                    raise NotImplementedError(
                        "the operations of torch.ops.grootvl_ops have no forward-mode derivatives: call the functions "
                        "of the package grootvl_ops, which have"
                    )
        return kernel(keyset, *args, **kwargs)

    return checked


if _loading.problems["autograd"] is not None:
    register_autograd()


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    """Under autocast, cast half-precision data to float32: results of a long product of decays need its range.

    torch.library.register_autocast does the same for one type of device, but its second call takes over the first one's
    kernel under torch.compile, which then leaves bfloat16 on CPUs as it is.
    """

    def kernel(x: Tensor, decay: Tensor, *tree):
        with torch.autocast(device_type, enabled=False):
            x, decay = (data.to(torch.promote_types(data.dtype, torch.float32)) for data in (x, decay))
            return torch.ops.grootvl_ops.tree_scan(x, decay, *tree)

    _library.impl("tree_scan", kernel, dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")

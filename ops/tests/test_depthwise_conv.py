"""The depthwise convolution with SiLU against PyTorch's in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_selective_scan import TOLERANCE, as_columns, assert_near, with_gradients
from torch import Tensor

import grootvl_ops

library = torch.ops.grootvl_ops


def defined(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=dilation, dilation=dilation, groups=len(weight))
    return F.silu(out).permute(0, 2, 3, 1)


def operation(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """That of the library, of a map (B, H, W, D)."""
    return library.depthwise_conv_silu(x.flatten(1, 2), weight, x.size(1), dilation, True)[0].view(x.shape)


def make_operands(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    weight = torch.randn(size[-1], 1, 3, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [torch.randn(size).to(dtype), weight]


def check(device: str, operands: list[Tensor], dilation: int, function=grootvl_ops.depthwise_conv_silu) -> None:
    dtype = operands[0].dtype
    grad = torch.randn(operands[0].shape).to(dtype)
    expected = with_gradients(defined, [o.double() for o in operands], grad.double(), dilation)
    actual = with_gradients(function, [o.to(device) for o in operands], grad.to(device), dilation)
    assert [a.dtype for a in actual] == [dtype, *(o.dtype for o in operands)]
    assert_near(actual, expected, dtype)
    again = with_gradients(function, [o.to(device) for o in operands], grad.to(device), dilation)
    assert all(map(torch.equal, actual, again))


def check_forward(device: str, operands: list[Tensor], dilation: int) -> None:
    """Of the public function, which takes a kernel where no gradients are recorded."""
    x, weight = (o.to(device) for o in operands)
    with torch.no_grad():
        found = grootvl_ops.depthwise_conv_silu(x, weight, dilation)
        assert torch.equal(found, grootvl_ops.depthwise_conv_silu(x, weight, dilation))
    assert found.dtype == x.dtype
    assert_near([found], [defined(*(o.double() for o in operands), dilation)], x.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 1), (2, 1, 7, 4), (2, 7, 1, 8), (2, 6, 5, 3), (3, 7, 9, 40), (1, 3, 40, 160), (2, 33, 35, 12)],
    ids=str,
)
def test_against_the_definition(device, size, dilation, dtype, poisoned_memory):
    operands = make_operands(size, dtype)
    check_forward(device, operands, dilation)
    check(device, operands, dilation, operation)
    # PyTorch's gradients of bfloat16 were found to be wrong on a CPU.
    if dtype in (torch.float64, torch.float32) or device == "cuda":
        check(device, operands, dilation)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (3, 121, 118, 160),  # several tiles of rows and columns
        (300, 7, 7, 264),  # several images for a block, and channels that fill no block
        (130, 14, 15, 72),
        (2, 56, 56, 24),
        (66_000, 1, 2, 8),  # more images than a grid has blocks in one direction
    ],
    ids=str,
)
def test_large_maps(cuda_kernels, size, dtype):
    operands = make_operands(size, dtype)
    check_forward(cuda_kernels, operands, 1)
    check(cuda_kernels, operands, 1)
    check_forward(cuda_kernels, operands, 3)


def test_keeps_what_silu_takes(device):
    x, weight = (o.to(device) for o in make_operands((2, 5, 4, 8), torch.float32))
    out, before = library.depthwise_conv_silu(x.flatten(1, 2), weight, 5, 1, True)
    torch.testing.assert_close(F.silu(before), out)
    found, nothing = library.depthwise_conv_silu(x.flatten(1, 2), weight, 5, 1)
    torch.testing.assert_close(found, out, rtol=0, atol=0)
    assert nothing.numel() == 0
    with pytest.raises(ValueError, match="keep"):
        library.depthwise_conv_silu(x.flatten(1, 2).requires_grad_(), weight, 5, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operands_need_not_be_contiguous_or_aligned(device, dtype):
    x, weight = (o.to(device) for o in make_operands((2, 6, 5, 8), dtype))
    expected = operation(x, weight, 1)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x).copy_(x)
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for view in (as_columns(x), torch.cat([x, x + 1], -1)[..., :8], shifted, channels_first):
        torch.testing.assert_close(operation(view, weight, 1), expected)
    transposed = weight.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(operation(x, transposed, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_gradcheck_and_opcheck(device, dtype):
    x, weight = (o.to(device) for o in make_operands((2, 3, 4, 4), dtype))
    x = x.flatten(1, 2)
    for dilation in (1, 2):
        torch.library.opcheck(library.depthwise_conv_silu_backward.default, (x, x, weight, 3, dilation))
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        torch.library.opcheck(library.depthwise_conv_silu.default, (*leaves, 3, dilation, True))
        torch.library.opcheck(library.depthwise_conv_silu.default, (x, weight, 3, dilation))
        if dtype == torch.float64:
            for needed in ((True, True), (True, False), (False, True)):
                some = [leaf.detach().requires_grad_(needs) for leaf, needs in zip(leaves, needed, strict=True)]
                assert torch.autograd.gradcheck(
                    lambda *o, d=dilation: library.depthwise_conv_silu(*o, 3, d, True)[0], some
                )


def test_under_autocast(device):
    x, weight = (o.to(device) for o in make_operands((2, 6, 5, 8), torch.float32))
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            expected = grootvl_ops.depthwise_conv_silu(x, weight)
            with torch.autocast(device, torch.bfloat16):
                torch.testing.assert_close(grootvl_ops.depthwise_conv_silu(x, weight), expected, rtol=0, atol=1e-5)


# Where a result is written: the channels of its map, the first, and values between its memory's begin and the map.
PLACES = [(8, 0, 0), (16, 0, 0), (16, 8, 0), (11, 2, 0), (8, 0, 1), (16, 8, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("with_more", [False, True])
def test_gradients_into_a_larger_map(device, place, dtype, with_more, poisoned_memory):
    total, first, begin = place
    x, weight = (o.to(device) for o in make_operands((2, 42, 8), dtype))
    grad, more = (torch.randn_like(x) for _ in range(2))
    before = library.depthwise_conv_silu(x, weight, 6, 2, True)[1]
    summed = grad + more if with_more else grad
    expected = library.depthwise_conv_silu_backward(torch.ops.aten.silu_backward(summed, before), x, weight, 6, 2)
    memory = torch.full((begin + 2 * 42 * total,), torch.nan, dtype=dtype, device=device)
    larger = memory[begin:].view(2, 42, total)
    dx = larger[..., first : first + 8]
    dweight = library.depthwise_conv_silu_backward_into(dx, grad, more if with_more else None, before, x, weight, 6, 2)
    for found, wanted in ((dx, expected[0]), (dweight, expected[1])):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())
    assert memory.isnan().sum() == memory.numel() - dx.numel()  # nothing else was written


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradient_has_the_strides_of_the_weight(device, memory_format):
    """Which DistributedDataParallel compares, also of the dimension of size one."""
    x, weight = (o.to(device) for o in make_operands((2, 5, 6, 8), torch.float32))
    weight = weight.to(memory_format=memory_format).requires_grad_()
    in_proj = torch.randn(16, 8, device=device)

    def called() -> Tensor:
        return operation(x, weight, 1)

    for function in (called, torch.compile(called), lambda: grootvl_ops.mixer_input(x, in_proj, weight)[0]):
        (grad,) = torch.autograd.grad(function().sum(), weight)
        assert grad.stride() == weight.stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_for_any_number_of_channels(device, memory_format):
    compiled = torch.compile(lambda x, weight: operation(x, weight, 1), dynamic=True, fullgraph=True)
    for channels in (8, 12):
        x, weight = (o.to(device) for o in make_operands((2, 5, 6, channels), torch.float32))
        weight = weight.to(memory_format=memory_format).requires_grad_()
        grads = [
            torch.autograd.grad(f(x, weight).square().sum(), weight)[0]
            for f in (compiled, partial(operation, dilation=1))
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_nothing_to_do(device):
    x, weight = (o.to(device) for o in make_operands((0, 3, 4, 5), torch.float32))
    out, _, dweight = with_gradients(operation, [x, weight], x, 1)
    assert out.shape == x.shape and not dweight.any()


def test_refuses(device):
    x, weight = torch.randn(2, 3, 4, 5, device=device), torch.randn(5, 1, 3, 3, device=device)
    for name, bad in (
        ("x", x[0]),
        ("weight", weight[:4]),
        ("weight", weight[..., :2]),
        ("weight", weight.long()),
        ("weight", weight.to("meta")),
        ("dilation", 0),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            grootvl_ops.depthwise_conv_silu(**{"x": x, "weight": weight, "dilation": 1, name: bad})


def test_operation_refuses(device):
    x, weight = torch.randn(2, 12, 5, device=device), torch.randn(5, 1, 3, 3, device=device)
    for name, bad in (
        ("x", x[0]),
        ("x", x.long()),
        ("weight", weight[:4]),
        ("height", 5),
        ("height", 0),
        ("dilation", 0),
    ):
        arguments = {"x": x, "weight": weight, "height": 3, "dilation": 1, name: bad}
        with pytest.raises((ValueError, RuntimeError), match=name):
            library.depthwise_conv_silu(**arguments)
        if device == "cuda":  # elsewhere PyTorch's operations compute them, with errors of their own
            with pytest.raises((ValueError, RuntimeError), match=name):
                library.depthwise_conv_silu_backward(grad=arguments["x"], **arguments)
    if device == "cuda":
        with pytest.raises((ValueError, RuntimeError), match="grad"):
            library.depthwise_conv_silu_backward(x[:1], x, weight, 3, 1)
        for name in ("dx", "grad", "more", "before"):
            for bad in (x[:1], x.double(), *([x.transpose(0, 1).contiguous().transpose(0, 1)] if name == "dx" else [])):
                maps = {"dx": x, "grad": x, "more": x, "before": x, name: bad}
                with pytest.raises((ValueError, RuntimeError), match=name):
                    library.depthwise_conv_silu_backward_into(**maps, x=x, weight=weight, height=3, dilation=1)

"""VMamba on a GPU against the same model in float64 on a CPU, and the sum of its directions beyond half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from model_helpers import replay_graph
from torch import Tensor, nn

import grootvl_ops
from grootv.layers import SS2D
from grootv.models import VMamba

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or grootvl_ops.backend("cuda") != "compiled", reason="needs a GPU and its kernels"
)


def small(expand: int) -> VMamba:
    """With rates of decay and skips as after training, not as at its beginning."""
    torch.manual_seed(0)
    model = VMamba(dims=(16, 32), depths=(1, 2), expand=expand, num_classes=10)
    for mixer in (module for module in model.modules() if isinstance(module, SS2D)):
        for parameter in (mixer.A_log, mixer.D_skip, mixer.dt_bias):
            nn.init.normal_(parameter, std=0.5)
    return model


def loss_and_gradients(
    model: nn.Module, images: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        logits = model(images)
    loss = 1024 * logits.to(torch.promote_types(logits.dtype, torch.float32)).square().mean()  # as float16 needs it
    parameters = [images, *model.parameters()]
    return logits.detach(), list(torch.autograd.grad(loss, parameters))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double().cpu() - expected).norm() / expected.norm())


# Maps of a few pixels, whole trees, runs of a path, and sections of runs.
@pytest.mark.parametrize("size, expand", [((20, 28), 2), ((60, 64), 1), ((96, 160), 2), ((400, 396), 1)])
@pytest.mark.parametrize(
    "dtype, autocast, bound",
    [
        (torch.float64, None, 1e-9),
        (torch.float32, None, 1e-3),
        (torch.float32, torch.float16, 0.02),
        (torch.float32, torch.bfloat16, 0.1),
    ],
    ids=str,
)
def test_results_and_gradients_are_those_of_float64_on_a_cpu(dtype, autocast, bound, expand, size):
    model = small(expand).double()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    expected_logits, expected = loss_and_gradients(model, images)
    on_gpu = copy.deepcopy(model).to("cuda", dtype)
    logits, gradients = loss_and_gradients(on_gpu, images.detach().to("cuda", dtype).requires_grad_(), autocast)
    assert error(logits, expected_logits) < bound
    if autocast is not None:  # single parameters have gradients near zero
        gradients, expected = ([torch.cat([g.flatten() for g in each])] for each in (gradients, expected))
    for number, (gradient, e) in enumerate(zip(gradients, expected, strict=True)):
        assert error(gradient, e) < bound, number


def test_the_sum_of_the_directions_may_exceed_float16():
    """65504 is the largest number of float16; the norm after the sum brings it back."""
    torch.manual_seed(0)
    mixer = SS2D(32)
    nn.init.constant_(mixer.D_skip, 3e4)
    x = torch.randn(1, 8, 8, 32)
    expected = mixer.double()(x.double()).float()
    mixer.float().cuda()
    with torch.autocast("cuda", torch.float16):
        y = mixer(x.cuda())
    assert y.dtype == torch.float16 and y.isfinite().all()
    assert error(y, expected.double()) < 0.02


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_cuda_graph(dtype):
    """Inference and a training step are captured, and a replay on other images gives what the eager model gives."""
    model = small(1).cuda()
    static, other = torch.randn(4, 3, 64, 96, device="cuda").split(2)
    static = static.clone().requires_grad_()

    def step() -> list[Tensor]:
        logits, gradients = loss_and_gradients(model, static, dtype)
        return [logits, *gradients]

    results = replay_graph(step, static, other)
    for result, expected in zip(results, step(), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)

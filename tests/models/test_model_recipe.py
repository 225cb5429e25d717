"""The ImageNet recipe against the published rules: the learning rate, and which parameters take weight decay."""

import math
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import timm
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from model_helpers import official_names
from torch import nn

import grootv.openmmlab  # noqa: F401  registers the constructor and the scheduler
from grootv.models.checkpoint import official_to_own
from grootv.models.released import RELEASES

CONFIGS = Path(grootv.__file__).parents[1] / "configs/classification"
CONFIG = Config.fromfile(CONFIGS / "grootv-tiny_8xb128_in1k.py")
VMAMBA_CONFIG = Config.fromfile(CONFIGS / "vmamba-tiny-s1l8_8xb128_in1k.py")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return build_optim_wrapper(model, {**CONFIG.optim_wrapper, "type": "OptimWrapper"}).optimizer


def published_rate(epoch: float, batch: int, begin: int) -> float:
    """The published schedules: 20 epochs of warm-up; the cosine of GrootV counts all 300 epochs and is entered at epoch
    20, that of VMamba begins there."""
    peak, start, floor = (rate * batch / 512 for rate in (5e-4, 5e-7, 5e-6))
    if epoch < 20:
        return start + (peak - start) * epoch / 20
    return floor + (peak - floor) / 2 * (1 + math.cos(math.pi * (epoch - begin) / (300 - begin)))


@pytest.mark.parametrize("published, begin, at_20", [(CONFIG, 0, 0.989), (VMAMBA_CONFIG, 20, 1)], ids=("0", "20"))
@pytest.mark.parametrize("batch", [1024, 512, 4096])
def test_learning_rate_is_the_published_one(batch: int, published: Config, begin: int, at_20: float) -> None:
    optimizer = build_optimizer(nn.ModuleDict({"fc": nn.Linear(2, 2)}))
    for group in optimizer.param_groups:
        group["lr"] *= batch / published.auto_scale_lr.base_batch_size  # the rule of auto_scale_lr
    length = 8
    (config,) = published.param_scheduler
    scheduler = PARAM_SCHEDULERS.build(config, default_args={"optimizer": optimizer, "epoch_length": length})
    rates = []
    for _ in range(published.train_cfg.max_epochs * length):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        rates.append(rate)
        optimizer.step()
        scheduler.step()
    for epoch in (0, 0.5, 7, 19, 19.875, 20, 21, 60, 150, 299.875):
        assert rates[int(epoch * length)] == pytest.approx(published_rate(epoch, batch, begin), rel=1e-9), epoch
    assert rates[20 * length] / (1e-3 * batch / 1024) == pytest.approx(at_20, abs=2e-4)
    assert rates[0] == pytest.approx(1e-6 * batch / 1024)
    assert rates[-1] == pytest.approx(1e-5 * batch / 1024, rel=1e-3)


def test_a_resumed_schedule_goes_on() -> None:
    config = {"type": "WarmupCosineLR", "end": 12, "warmup": 4, "start_ratio": 0.1}

    def steps(scheduler: object, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        rates = []
        for _ in range(count):
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    def build() -> tuple[object, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return PARAM_SCHEDULERS.build(config, default_args={"optimizer": optimizer}), optimizer

    whole, interrupted, resumed = build(), build(), build()
    expected = steps(*whole, 11)
    first = steps(*interrupted, 6)
    resumed[0].load_state_dict(interrupted[0].state_dict())
    assert first + steps(*resumed, 5) == expected and len(set(expected)) == 11


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="warmup must be at least 0 and less than end=5, got 5"):
        PARAM_SCHEDULERS.build({"type": "WarmupCosineLR", "end": 5, "warmup": 5}, default_args={"optimizer": optimizer})


@pytest.mark.parametrize("size", RELEASES)
def test_weight_decay_is_on_the_published_parameters(size: str) -> None:
    """Published: none on tensors of one dimension and names that end in .bias, by official names and shapes."""
    model = timm.create_model(size, device="meta")
    optimizer = build_optimizer(model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    compared = 0
    for name, shape in official_names(size).items():
        if name.endswith(BUFFERS):
            continue
        expected = 0.0 if len(shape) == 1 or name.endswith(".bias") else 0.05
        assert decay[id(parameters[official_to_own(name)])] == expected, name
        compared += 1
    assert compared == len(parameters) == len(decay)

"""Parameter groups: weight decay and learning rates by layer. Mixed precision: skipped steps and the scale."""

from functools import partial

import pytest

pytest.importorskip("mmengine")

import timm
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from torch import nn

import grootv  # noqa: F401  registers the models
from grootv.openmmlab.classification.classifier import TimmClassifier
from grootv.openmmlab.runtime.optim import (
    GPUAmpOptimWrapper,
    TimmOptimWrapperConstructor,
    layer_scales,
    names_without_weight_decay,
)


def nano(**kwargs) -> nn.Module:
    return timm.create_model("grootv_nano", num_classes=3, dims=(8, 16), depths=(1, 2), **kwargs)


class Detector(BaseModel):
    """A model that contains a timm backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"body": nano()})
        self.neck = nn.Conv2d(16, 4, 3)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return inputs


def test_weight_decay_spares_norms_biases_and_what_the_modules_name() -> None:
    model = TimmClassifier({"model_name": "grootv_nano", "num_classes": 3, "dims": (8, 16), "depths": (1, 1)})
    wrapper = TimmOptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 0.1, "weight_decay": 0.05}})(model)
    decayed = {id(p) for group in wrapper.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert all(name.endswith((".weight", ".A_log", ".dt_proj.bias")) for name in names)
    assert not any("norm" in name or "D_skip" in name for name in names)
    assert any("A_log" in name for name in names) and any("dt_proj.bias" in name for name in names)
    assert any("in_proj" in name for name in names) and any("stem.conv1" in name for name in names)
    covered = [id(p) for group in wrapper.optimizer.param_groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())


def test_layer_decay_of_a_classifier_agrees_with_timm() -> None:
    from timm.optim import param_groups_layer_decay

    backbone = nano()
    groups = param_groups_layer_decay(backbone, layer_decay=0.7)
    expected = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = layer_scales(nn.ModuleDict({"backbone": backbone}), 0.7)
    for name, parameter in backbone.named_parameters():
        assert scales[f"backbone.{name}"] == pytest.approx(expected[id(parameter)])
    assert len(set(expected.values())) > 3


def test_layer_decay_inside_a_detector_leaves_the_rest_at_the_base_rate() -> None:
    model = Detector()
    config = {"optimizer": {"type": "AdamW", "lr": 0.1, "weight_decay": 0.05}}
    wrapper = TimmOptimWrapperConstructor(config, {"layer_decay": 0.5})(model)
    rates = {id(p): group["lr"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    assert rates[id(model.neck.weight)] == rates[id(model.neck.bias)] == 0.1
    body = model.backbone["body"]
    assert max(rates[id(p)] for p in body.parameters()) == pytest.approx(0.05)
    assert rates[id(body.stem.conv1.weight)] < rates[id(body.stages[1].blocks[0].mlp.fc1.weight)] < 0.1
    exempt = names_without_weight_decay(model)
    assert "backbone.body.stages.1.blocks.0.mixer.D_skip" in exempt and "neck.bias" in exempt
    assert "backbone.body.stages.1.blocks.0.mixer.A_log" not in exempt and "neck.weight" not in exempt


def test_optimizer_constructor_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="group_matcher"):
        layer_scales(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"unknown keys \['norm_decay'\]"):
        TimmOptimWrapperConstructor({"optimizer": {"type": "SGD", "lr": 1}}, {"norm_decay": 0})


@pytest.fixture
def scaler_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mmengine's wrapper work without a GPU: PyTorch's loss scaling is the same on both devices."""
    module = "mmengine.optim.optimizer.amp_optimizer_wrapper"
    monkeypatch.setattr(f"{module}.is_cuda_available", lambda: True)
    monkeypatch.setattr(f"{module}.GradScaler", partial(torch.amp.GradScaler, device="cpu"))
    MessageHub.get_instance("scaling").log_scalars.clear()
    MessageHub.get_instance("scaling").runtime_info.clear()


def half_precision_wrapper(**optimizer: object) -> tuple[nn.Parameter, GPUAmpOptimWrapper]:
    weight = nn.Parameter(torch.ones(4))
    wrapper = GPUAmpOptimWrapper(
        loss_scale={"init_scale": 2.0**17},
        optimizer=torch.optim.SGD([weight], lr=0.1, **optimizer),
        clip_grad={"max_norm": 100.0},
    )
    return weight, wrapper


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_counted_and_their_gradient_norms_are_not_logged(scaler_on_the_cpu, fused: bool) -> None:
    weight, wrapper = half_precision_wrapper(fused=fused)
    for _ in range(5):
        wrapper.update_params(weight.half().sum().float())
    # The largest float16 is 65504, so the scales 131072 and 65536 overflow, and 32768 does not.
    torch.testing.assert_close(weight.detach(), torch.full((4,), 1 - 3 * 0.1))
    log = MessageHub.get_instance("scaling").log_scalars
    assert log["train/skipped_steps"].data[0].tolist() == [1, 2, 2, 2, 2]
    assert log["train/grad_scale"].data[0].tolist() == [2.0**16, 2.0**15, 2.0**15, 2.0**15, 2.0**15]
    assert log["train/grad_norm"].data[0].tolist() == [2.0, 2.0, 2.0]


def test_scale_and_number_of_skipped_steps_survive_a_resume(scaler_on_the_cpu) -> None:
    weight, wrapper = half_precision_wrapper()
    for _ in range(4):
        wrapper.update_params(weight.half().sum().float())
    state = wrapper.state_dict()
    hub = MessageHub.get_instance("scaling").state_dict()
    MessageHub.get_instance("scaling").runtime_info.clear()
    weight, resumed = half_precision_wrapper()
    resumed.load_state_dict(state)
    MessageHub.get_instance("scaling").load_state_dict(hub)
    assert resumed.loss_scaler.state_dict() == wrapper.loss_scaler.state_dict()
    assert resumed.loss_scaler.get_scale() == 2.0**15
    resumed.update_params(weight.half().sum().float())
    assert MessageHub.get_instance("scaling").get_info("skipped_steps") == 2


def test_a_run_that_skips_every_step_is_stopped(scaler_on_the_cpu) -> None:
    weight, wrapper = half_precision_wrapper()
    with pytest.raises(FloatingPointError, match="mixed precision skipped 50 steps in a row"):
        for _ in range(60):
            wrapper.update_params((weight * float("nan")).sum())
    assert wrapper.inner_count == 50 and torch.equal(weight.detach(), torch.ones(4))

"""Parameter groups: weight decay and learning rates by layer."""

import pytest

pytest.importorskip("mmengine")

import timm
from mmengine.model import BaseModel
from torch import nn

import grootv  # noqa: F401  registers the models
from grootv.openmmlab.classification.classifier import TimmClassifier
from grootv.openmmlab.runtime.optim import TimmOptimWrapperConstructor, layer_scales, names_without_weight_decay


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

"""The classifier of any timm model, its preprocessor and its checkpoints."""

import importlib
import json

import pytest

pytest.importorskip("mmengine")

import torch
from training_helpers import ROOT

import grootv  # noqa: F401  registers the models
from grootv.openmmlab.classification.classifier import ImagePreprocessor, TimmClassifier


def test_preprocessor_normalises_and_mixes_in_training_only() -> None:
    preprocessor = ImagePreprocessor(
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.5), mixup={"mixup_alpha": 1.0, "num_classes": 3}
    )
    inputs = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    data = {"inputs": inputs, "targets": torch.tensor([0, 1, 2, 0]), "indices": torch.arange(4)}
    plain = preprocessor(dict(data))
    expected = (inputs[:, 2].double() / 255 - 0.3) / 0.5
    torch.testing.assert_close(plain["inputs"][:, 2].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(plain["targets"], data["targets"])
    mixed = preprocessor(dict(data), training=True)
    assert mixed["targets"].shape == (4, 3) and torch.allclose(mixed["targets"].sum(1), torch.ones(4))
    odd = {name: value[:3] for name, value in data.items()}
    with pytest.raises(ValueError, match="must be even, got 3"):
        preprocessor(odd, training=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_any_timm_model_trains(name: str) -> None:
    torch.manual_seed(0)
    model = TimmClassifier({"model_name": name, "num_classes": 3}, loss={"type": "LabelSmoothingCrossEntropy"})
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    size = model.backbone.default_cfg["input_size"]
    loss = model(torch.rand(2, *size), torch.tensor([0, 2]), torch.tensor([0, 1]), mode="loss")["loss"]
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is not None for parameter in model.parameters())


def test_binary_cross_entropy_takes_mixed_targets() -> None:
    model = TimmClassifier(
        {"model_name": "test_resnet", "num_classes": 3},
        loss={"type": "BinaryCrossEntropy"},
        data_preprocessor={"type": "ImagePreprocessor", "mixup": {"num_classes": 3}},
    )
    data = {
        "inputs": torch.randint(0, 256, (2, 3, 64, 64)),
        "targets": torch.tensor([0, 1]),
        "indices": torch.arange(2),
    }
    assert model(**model.data_preprocessor(data, True), mode="loss")["loss"].isfinite()


def test_mixup_must_have_the_models_classes() -> None:
    preprocessor = {"type": "ImagePreprocessor", "mixup": {"num_classes": 4}}
    with pytest.raises(ValueError, match="num_classes is 4, but the model has 3"):
        TimmClassifier({"model_name": "test_resnet", "num_classes": 3}, data_preprocessor=preprocessor)


def test_released_checkpoints_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint with the official names, filled by tests/golden/fill.py, gives the golden logits."""
    golden = ROOT / "tests/golden"
    monkeypatch.syspath_prepend(golden)
    fill = importlib.import_module("fill")
    shapes = json.loads((golden / "official_names.json").read_text())["grootv_tiny"]
    integers = {name: torch.tensor(0) for name in shapes if name.endswith("num_batches_tracked")}
    official = fill.fill({name: torch.empty(shape) for name, shape in shapes.items()} | integers)
    model = TimmClassifier({"model_name": "grootv_tiny"}).eval()
    model.load_state_dict(model.convert_checkpoint({"model": official}))
    again = model.convert_checkpoint({"state_dict": model.state_dict()})
    assert again.keys() == model.state_dict().keys()
    with torch.inference_mode():
        logits = model(fill.image(7, 2, 224, 224))
    expected = torch.load(golden / "grootv_tiny.pt", weights_only=True)["logits"]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()

"""GrootV under transformers: as a backbone, in a detector, and as a classifier from a folder that timm saved."""

import json
from pathlib import Path

import pytest
import timm
import torch
from everyday_models import images, make

transformers = pytest.importorskip("transformers", minversion="5")


def test_backbones() -> None:
    config = transformers.TimmBackboneConfig(backbone="grootv_nano", out_indices=[1, 3])
    for backbone in (transformers.TimmBackbone(config), transformers.AutoBackbone.from_config(config)):
        backbone.eval()
        assert backbone.channels == [64, 256]
        maps = backbone(images()).feature_maps
        peer = timm.create_model("grootv_nano", features_only=True, out_indices=(1, 3)).eval()
        peer.load_state_dict(backbone._backbone.state_dict())
        for actual, expected in zip(maps, peer(images()), strict=True):
            torch.testing.assert_close(actual, expected)


def test_detr_trains() -> None:
    config = transformers.DetrConfig(
        backbone_config=transformers.TimmBackboneConfig(backbone="grootv_nano", out_indices=[3]),
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, d_model=32, num_queries=5, num_labels=3,
    )  # fmt: skip
    detector = transformers.DetrForObjectDetection(config)
    output = detector(pixel_values=images())
    assert output.logits.shape == (2, 5, 4) and output.pred_boxes.shape == (2, 5, 4)
    (output.logits.sum() + output.pred_boxes.sum()).backward()
    grads = {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}
    mixers = {name for name in grads if "mixer" in name}
    assert mixers and all(grads[name] is not None and torch.isfinite(grads[name]).all() for name in mixers)


def saved(folder: Path) -> torch.nn.Module:
    """A model that timm saved.

    timm notes the number of classes and channels among the model's arguments, too, where the wrapper of transformers
    refuses them for any model.
    """
    model = make("grootv_nano")
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    for name in ("num_classes", "in_chans"):
        config["model_args"].pop(name)
    (folder / "config.json").write_text(json.dumps(config))
    return model


def test_classifier_from_a_folder(tmp_path: Path) -> None:
    model = saved(tmp_path)
    classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    output = classifier(images(), output_hidden_states=True)
    torch.testing.assert_close(output.logits, model(images()))
    stages = model.forward_intermediates(images(), intermediates_only=True)
    for hidden, stage in zip(output.hidden_states, stages, strict=True):
        torch.testing.assert_close(hidden, stage)
    classifier.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(images()).logits, output.logits)


def test_features_of_the_wrapper(tmp_path: Path) -> None:
    model = saved(tmp_path)
    output = transformers.TimmWrapperModel.from_pretrained(tmp_path).eval()(images())
    features = model.forward_features(images())
    torch.testing.assert_close(output.last_hidden_state, features)
    torch.testing.assert_close(output.pooler_output, model.forward_head(features, pre_logits=True))


def test_pipeline(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    saved(tmp_path)
    classify = transformers.pipeline("image-classification", model=str(tmp_path))
    answers = classify(Image.new("RGB", (80, 90), "red"), top_k=5)
    assert len(answers) == 5 and sum(answer["score"] for answer in answers) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("recomputing", [False, True])
def test_fine_tuning(tmp_path: Path, recomputing: bool) -> None:
    saved(tmp_path)
    classifier = transformers.TimmWrapperForImageClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True
    ).train()
    if recomputing:
        classifier.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = classifier(images(), labels=torch.tensor([0, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

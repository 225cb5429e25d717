"""GrootV as the backbone of segmentors, detectors and other heads that read its maps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from everyday_models import SIZES, images
from torch import Tensor, nn

CHANNELS = list(SIZES["grootv_nano"]["dims"])


@pytest.mark.parametrize("decoder", ["Unet", "UnetPlusPlus", "FPN", "UPerNet", "Segformer", "DeepLabV3Plus", "PSPNet"])
def test_segmentation_models_pytorch(decoder: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, decoder)("tu-grootv_tiny", encoder_weights=None, classes=3)
    masks = model(images())
    assert masks.shape == (2, 3, 64, 64)
    masks.sum().backward()
    # PSPNet reads the first stages only.
    used = [p for name, p in model.encoder.named_parameters() if "stages_0" in name]
    assert used and all(p.grad is not None and torch.isfinite(p.grad).all() for p in used)
    if decoder == "DeepLabV3Plus":
        assert [tuple(f.shape[2:]) for f in model.encoder(images())][-2:] == [(4, 4), (4, 4)]


class Pyramid(nn.Module):
    """A feature pyramid over GrootV, as torchvision's detectors take it."""

    def __init__(self) -> None:
        super().__init__()
        ops = pytest.importorskip("torchvision.ops")
        self.body = timm.create_model("grootv_nano", features_only=True)
        self.fpn = ops.FeaturePyramidNetwork(self.body.feature_info.channels(), 32)
        self.out_channels = 32

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): feature for i, feature in enumerate(self.body(x))})


@pytest.mark.parametrize("kind", ["MaskRCNN", "RetinaNet"])
def test_torchvision_detectors(kind: str) -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    ops = pytest.importorskip("torchvision.ops")
    anchors = detection.anchor_utils.AnchorGenerator(tuple((8 * 2**i,) for i in range(4)), ((0.5, 1.0, 2.0),) * 4)
    sizes = {"min_size": 96, "max_size": 128}
    if kind == "MaskRCNN":
        names = [str(i) for i in range(4)]
        model = detection.MaskRCNN(
            Pyramid(), 3, rpn_anchor_generator=anchors,
            box_roi_pool=ops.MultiScaleRoIAlign(names, 7, 2), mask_roi_pool=ops.MultiScaleRoIAlign(names, 14, 2),
            **sizes,
        )  # fmt: skip
    else:
        model = detection.RetinaNet(Pyramid(), 3, anchor_generator=anchors, **sizes)
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 50.0, 60.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    losses = model.train()([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    assert all(p.grad is not None for name, p in model.backbone.named_parameters() if "mixer" in name)
    results = model.eval()([torch.rand(3, 64, 80)])
    assert results[0]["boxes"].shape[1] == 4


def test_mmsegmentation_backbone() -> None:
    backbones = pytest.importorskip("mmseg.models.backbones", exc_type=ImportError)
    backbone = backbones.TIMMBackbone("grootv_nano", features_only=True, pretrained=False, **SIZES["grootv_nano"])
    maps = backbone(images())
    assert [tuple(m.shape) for m in maps] == [(2, c, 16 // 2**i, 16 // 2**i) for i, c in enumerate(CHANNELS)]


MMPRETRAIN = """
import importlib.metadata
import torch

find = importlib.metadata.distribution

def without_transformers(name):
    if name == "transformers":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)

importlib.metadata.distribution = without_transformers
import grootv, mmpretrain.models
from mmpretrain.registry import MODELS

backbone = dict(type="TIMMBackbone", model_name="grootv_nano", features_only=True)
maps = MODELS.build(backbone)(torch.randn(2, 3, 64, 64))
assert [tuple(m.shape) for m in maps] == [(2, 32 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)], maps
head = dict(type="LinearClsHead", num_classes=4, in_channels=256)
model = MODELS.build(
    dict(
        type="ImageClassifier",
        backbone=dict(backbone, out_indices=(3,)),
        neck=dict(type="GlobalAveragePooling"),
        head=head,
    )
)
sample = mmpretrain.structures.DataSample().set_gt_label(1)
model(torch.randn(1, 3, 64, 64), [sample], mode="loss")["loss"].backward()
assert all(p.grad is not None for name, p in model.named_parameters() if "mixer" in name)
"""


def test_mmpretrain_backbone() -> None:
    """mmpretrain takes no present version of transformers, so it runs as where transformers is not installed."""
    apart = Path(sys.prefix) / "share" / "mmpretrain"
    if not apart.exists():
        pytest.skip(f"needs mmpretrain in {apart}: make test-integrations")
    path = os.pathsep.join([str(apart), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", MMPRETRAIN], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


def test_anomalib() -> None:
    components = pytest.importorskip("anomalib.models.components")
    extractor = components.TimmFeatureExtractor("grootv_nano", layers=["stages.1", "stages.2"], pre_trained=False)
    maps = extractor(images())
    assert extractor.out_dims == [64, 128]
    assert [tuple(m.shape) for m in maps.values()] == [(2, 64, 8, 8), (2, 128, 4, 4)]
    patchcore = pytest.importorskip("anomalib.models.image.patchcore.torch_model")
    model = patchcore.PatchcoreModel(layers=["stages.1", "stages.2"], backbone="grootv_nano", pre_trained=False)
    assert model.train()(images()).shape == (2 * 8 * 8, 192)
    model.subsample_embedding(0.2)
    assert model.eval()(images()).anomaly_map.shape == (2, 1, 64, 64)


def test_terratorch() -> None:
    registry = pytest.importorskip("terratorch.registry")
    backbone = registry.BACKBONE_REGISTRY.build("timm_grootv_nano", pretrained=False, features_only=True)
    shapes = [tuple(m.shape) for m in backbone(images())]
    assert shapes == [(2, 32 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]
    assert list(backbone.out_channels) == [32, 64, 128, 256]


def test_lightly_train() -> None:
    helpers = pytest.importorskip("lightly_train._models.package_helpers")
    wrapped = helpers.get_wrapped_model("timm/grootv_nano", num_input_channels=3)
    features = wrapped.forward_features(images())
    assert wrapped.feature_dim() == 256 and features["features"].shape == (2, 256, 2, 2)
    pooled = wrapped.forward_pool(features)["pooled_features"]
    torch.testing.assert_close(pooled.flatten(1), features["features"].mean((2, 3)))

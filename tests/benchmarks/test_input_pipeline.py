"""The folder of ImageNet's shape, and what is measured on it."""

from pathlib import Path

import pytest

pytest.importorskip("mmengine")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from PIL import Image
from training_helpers import ROOT, run_tool

from grootv.openmmlab.classification.datasets import ImageClassificationDataset


def test_the_folder_is_read_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shaped"
    shown = run_tool("make_imagenet_shaped.py", folder, "--classes", 3, "--images", 8, "--size", 64, 48).stdout
    assert "3 classes, 24 images" in shown
    dataset = ImageClassificationDataset(str(folder), "train", is_training=True, transform={"input_size": 32})
    assert len(dataset) == 24 and len(dataset.metainfo["classes"]) == 3
    assert {Image.open(dataset.image_name(i)).size for i in range(24)} == {(64, 48), (48, 64)}
    assert len(ImageClassificationDataset(str(folder), "val")) == 3

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import input_pipeline

    parts = input_pipeline.breakdown(dataset, 5)
    assert list(parts)[:3] == ["read the file", "decode (Pillow)", "RandomResizedCropAndInterpolation"]
    assert all(value > 0 for value in parts.values())
    assert input_pipeline.throughput(dataset, 1, 4, 0.1, pin_memory=False) > 0
    with pytest.raises(SystemExit, match="24 images are too few for 2 processes"):
        input_pipeline.throughput(dataset, 2, 4, 0.1, pin_memory=False)

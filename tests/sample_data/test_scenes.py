"""Scenes of digits: correct masks, splits that share nothing, and files that readers of COCO and ADE20K load."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from PIL import Image

from grootv.sample_data.scenes import SEGMENTATION, SceneMaker, export_ade20k, export_coco


def decode(segmentation: dict) -> np.ndarray:
    """COCO's run lengths, by columns, as (H, W) bool."""
    height, width = segmentation["size"]
    values = np.concatenate([np.full(run, i % 2, bool) for i, run in enumerate(segmentation["counts"])])
    return values.reshape(width, height).T


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_coco(tmp_path_factory.mktemp("coco") / "data", num_train=20, num_val=10)


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_ade20k(tmp_path_factory.mktemp("ade") / "data", num_train=20, num_val=10)


@pytest.mark.parametrize(("split", "number"), [("train", 20), ("val", 10)])
def test_annotations_of_coco(coco: Path, split: str, number: int) -> None:
    content = json.loads((coco / "annotations" / f"instances_{split}2017.json").read_text())
    assert len(content["images"]) == number
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in content["images"]}
    for entry in content["images"]:
        assert Image.open(coco / f"{split}2017" / entry["file_name"]).size == sizes[entry["id"]]
    seen = {image: np.zeros(size[::-1], bool) for image, size in sizes.items()}
    for entry in content["annotations"]:
        mask = decode(entry["segmentation"])
        x, y, width, height = entry["bbox"]
        inside = np.zeros_like(mask)
        inside[y : y + height, x : x + width] = True
        assert mask.sum() == entry["area"] >= 12
        assert not (mask & ~inside).any()
        assert mask[y : y + height, x].any() and mask[y, x : x + width].any()
        assert mask[y : y + height, x + width - 1].any() and mask[y + height - 1, x : x + width].any()
        assert not (mask & seen[entry["image_id"]]).any(), "masks are of what can be seen, so they do not overlap"
        seen[entry["image_id"]] |= mask
        assert 1 <= entry["category_id"] <= 10
    crowds = [entry for entry in content["annotations"] if entry["iscrowd"]]
    areas = [entry["area"] for entry in content["annotations"] if not entry["iscrowd"]]
    assert crowds and min(areas) < 100 and max(areas) > 1000
    assert [image for image, mask in seen.items() if not mask.any()], "some image has no object"


def test_pycocotools_reads_the_masks(coco: Path) -> None:
    reader = pytest.importorskip("pycocotools.coco").COCO(coco / "annotations" / "instances_val2017.json")
    for annotation in reader.loadAnns(reader.getAnnIds()):
        assert np.array_equal(reader.annToMask(annotation).astype(bool), decode(annotation["segmentation"]))


def test_labels_of_ade20k_are_the_masks_of_scenes(ade: Path) -> None:
    labels = sorted((ade / "annotations" / "training").iterdir())
    images = sorted((ade / "images" / "training").iterdir())
    assert [path.stem for path in labels] == [path.stem for path in images] and len(images) == 20
    make = SceneMaker("train", **SEGMENTATION)
    for index, (path, image) in enumerate(zip(labels, images, strict=True)):
        scene = make(index)
        expected = np.ones(scene.image.shape[:2], np.uint8)
        for instance in scene.instances:
            expected[instance.mask] = 0 if instance.crowd else instance.label + 2
        assert np.array_equal(np.asarray(Image.open(path)), expected)
        # The picture belongs to the labels; JPEG changes it only a little.
        assert np.abs(np.asarray(Image.open(image), float) - scene.image).mean() < 8


def test_scenes_for_segmentation_have_all_that_is_hard_and_more_digits(ade: Path) -> None:
    labels = [np.asarray(Image.open(path)) for path in sorted((ade / "annotations" / "training").iterdir())]
    shares = np.bincount(np.concatenate([each.ravel() for each in labels]), minlength=12) / sum(x.size for x in labels)
    assert 0.12 < shares[2:].sum() < 0.4 and (shares[2:] > 0).all()
    assert shares[0] > 0, "crowds"
    assert any((each == 1).all() for each in labels), "an image without objects"
    assert len({each.shape for each in labels}) == 2
    scenes = [SceneMaker("train", **SEGMENTATION)(index) for index in range(20)]
    areas = [instance.mask.sum() for scene in scenes for instance in scene.instances if not instance.crowd]
    assert min(areas) < 100 and max(areas) > 400


def test_digits_that_try_several_places_hide_less_of_each_other() -> None:
    """Digits of equal sizes have more visible pixels in total if they hide less of each other."""
    options = {"digits": (6, 6), "sides": (0.4, 0.4)}
    seen = []
    for places in (1, 12):
        make = SceneMaker("train", places=places, **options)
        seen.append(sum(instance.mask.sum() for i in range(8) for instance in make(i).instances))
    assert seen[1] > 1.1 * seen[0]


def test_splits_share_neither_digits_nor_photographs() -> None:
    train, val = SceneMaker("train"), SceneMaker("val")
    assert len(train.digits) + len(val.digits) == 1797
    assert not {digit.tobytes() for digit in train.digits} & {digit.tobytes() for digit in val.digits}
    assert not {photo.tobytes() for photo in train.photographs} & {photo.tobytes() for photo in val.photographs}
    assert set(train.labels) == set(val.labels) == set(range(10))


def test_scenes_depend_on_seed_and_number_alone() -> None:
    first, second = SceneMaker("train", seed=3), SceneMaker("train", seed=3)
    second(0)
    assert np.array_equal(first(5).image, second(5).image)
    assert not np.array_equal(SceneMaker("train", seed=4)(5).image, first(5).image)


@pytest.mark.parametrize(
    "change",
    [
        {"split": "test"},
        {"size": (20, 200)},
        {"size": (160, 500)},
        {"digits": (0, 3)},
        {"digits": (5, 4)},
        {"sides": (0.5, 1.5)},
        {"places": 0},
    ],
)
def test_bad_arguments_are_named(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        SceneMaker(**{"split": "train", **change})


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(FileExistsError, match="data exists already"):
        export_coco(tmp_path / "data")
    assert list(tmp_path.iterdir()) == [tmp_path / "data"] and not list((tmp_path / "data").iterdir())


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(SceneMaker, "__call__", fail)
    with pytest.raises(OSError, match="disk full"):
        export_ade20k(tmp_path / "data")
    assert not list(tmp_path.iterdir())

"""Image classification data sets: folders, and the other sources that timm reads."""

from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import torch
from training_helpers import CLASSES, write_images

from grootv.openmmlab.classification.datasets import (
    DamagedDataError,
    ImageClassificationDataset,
    StreamedClassificationDataset,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root, "train", 4, seed=0)
    return root


def test_items_are_uint8_images_with_class_and_place(images: Path) -> None:
    dataset = ImageClassificationDataset(str(images), "train", transform={"input_size": 24})
    assert len(dataset) == 12 and dataset.metainfo["classes"] == CLASSES
    item = dataset[5]
    assert item["inputs"].shape == (3, 24, 24) and item["inputs"].dtype == torch.uint8
    assert item["targets"] == 1 and item["indices"] == 5


def test_augmentation_depends_on_seed_epoch_and_index_alone(images: Path) -> None:
    arguments = {"root": str(images), "split": "train", "is_training": True, "transform": {"input_size": 24}}
    dataset, other = ImageClassificationDataset(**arguments), ImageClassificationDataset(**arguments)
    dataset.set_epoch(7, 3)
    other.set_epoch(7, 3)
    before = torch.get_rng_state()
    first = dataset[2]["inputs"]
    assert torch.equal(before, torch.get_rng_state()), "the process's own random numbers must not be used up"
    torch.rand(5)
    other[4]
    assert torch.equal(first, other[2]["inputs"])
    other.set_epoch(7, 4)
    assert not torch.equal(first, other[2]["inputs"])


def test_the_strongest_posterisation_makes_an_image_black(images: Path) -> None:
    """The recipe's rand-m9-mstd0.5 draws this magnitude for one posterised image of fifty; Pillow 13 refuses it."""
    transform = {"input_size": 24, "auto_augment": "rand-m10-inc1"}
    dataset = ImageClassificationDataset(str(images), "train", is_training=True, transform=transform)
    augment = next(each for each in dataset.transform.transforms if hasattr(each, "ops"))
    posterize = next(each for each in augment.ops if each.name == "PosterizeIncreasing")
    posterize.prob = 1
    image = dataset._read(0)[0]
    assert image.getextrema()[0][1] > 0 and posterize(image).getextrema() == ((0, 0),) * 3


def test_damaged_images_are_named_and_limited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, "train", 4, seed=0)
    cut = tmp_path / "train/circle/1.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (tmp_path / "train/square/0.png").write_text("no image")
    training = ImageClassificationDataset(str(tmp_path), "train", is_training=True, max_damaged=2)
    assert training[1]["indices"] == 2, "the next readable image takes the place of a damaged one"
    assert training[1]["targets"] == 0
    assert training[4]["indices"] == 5
    evaluation = ImageClassificationDataset(str(tmp_path), "train", max_damaged=1)
    assert evaluation[1]["targets"] == -1 and evaluation[1]["indices"] == 1
    with pytest.raises(DamagedDataError, match=r"square/0\.png is damaged .* 2 damaged images, and max_damaged=1"):
        evaluation[4]


def test_tar_files_and_torchvision_sets_are_read_through_timm(images: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(images / "train", arcname=".")
    tar = ImageClassificationDataset(str(tmp_path / "train.tar"), "")
    assert len(tar) == 12 and tar[0]["inputs"].shape == (3, 224, 224)
    folder = ImageClassificationDataset(str(images / "train"), name="torch/image_folder")
    assert len(folder) == 12 and folder[11]["targets"] == 2 and folder.metainfo["classes"] == CLASSES


def test_missing_folder_is_named_with_what_is_there(images: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"validation does not exist: .* contains \['train'\]"):
        ImageClassificationDataset(str(images), "validation")
    with pytest.raises(FileNotFoundError, match="does not exist either"):
        ImageClassificationDataset(str(images / "nowhere"), "train")


def test_lasting_loader_processes_follow_the_epoch_and_share_damage(tmp_path: Path) -> None:
    write_images(tmp_path, "train", 4, seed=0)
    (tmp_path / "train/circle/0.png").write_text("no image")
    dataset = ImageClassificationDataset(
        str(tmp_path), "train", is_training=True, max_damaged=1, transform={"input_size": 24}
    )
    reference = ImageClassificationDataset(
        str(tmp_path), "train", is_training=True, max_damaged=1, transform={"input_size": 24}
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(1, epoch)
        reference.set_epoch(1, epoch)
        batches = torch.cat([batch["inputs"] for batch in loader])
        assert torch.equal(batches, torch.stack([reference[index]["inputs"] for index in range(12)]))
    assert dataset.damaged.nonzero().flatten().tolist() == [0]


def test_webdataset_shards_stream_by_epoch(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    images = tmp_path / "images"
    write_images(images, "train", 4, seed=0)
    (tmp_path / "shards").mkdir()
    with webdataset.TarWriter(str(tmp_path / "shards/train-0000.tar")) as shard:
        for number, path in enumerate(sorted(images.rglob("*.png"))):
            shard.write({"__key__": f"{number:03d}", "png": path.read_bytes(), "cls": CLASSES.index(path.parent.name)})
    arguments = {"name": "wds/shapes", "root": str(tmp_path / "shards"), "transform": {"input_size": 24}}
    stream = StreamedClassificationDataset(**arguments, split="train-{0000..0000}.tar|12")
    items = list(stream)
    assert len(items) == len(stream) == 12
    assert sorted(item["targets"] for item in items) == [0] * 4 + [1] * 4 + [2] * 4
    assert items[0]["inputs"].dtype == torch.uint8 and items[0]["inputs"].shape == (3, 24, 24)

    def epoch(number: int) -> torch.Tensor:
        training = StreamedClassificationDataset(
            **arguments, split="train-{0000..0000}.tar|12", is_training=True, batch_size=4
        )
        training.set_epoch(0, number)
        return torch.stack([item["inputs"] for item in training])

    assert torch.equal(epoch(1), epoch(1)) and not torch.equal(epoch(1), epoch(2))


def test_hugging_face_data_sets_are_read_through_timm(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_images(tmp_path / "images", "train", 2, seed=0)
    dataset = ImageClassificationDataset(
        str(tmp_path / "cache"), "train", name=f"hfds/{tmp_path / 'images'}", transform={"input_size": 24}
    )
    assert len(dataset) == 6 and dataset[5]["targets"] == 2 and dataset.metainfo["classes"] == CLASSES

"""Image files of every kind, sound and damaged, in a folder of classes and in tar files."""

import os
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import numpy as np
from PIL import Image, ImageOps
from training_helpers import write_images

from grootv.images import to_rgb
from grootv.openmmlab.classification.datasets import DamagedDataError, ImageClassificationDataset
from grootv.openmmlab.classification.images import ImageFolderReader, find_files, image_suffixes

RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))  # 48 rows of 64 grey pixels
COLOUR = np.stack((RAMP, RAMP[:, ::-1], np.full_like(RAMP, 40)), -1)

LOSSLESS = ["png", "apng", "bmp", "dib", "gif", "ppm", "pnm", "tif", "tiff", "tga", "sgi", "pcx", "im", "qoi", "dds"]
LOSSY = ["jpg", "jpeg", "jpe", "jfif", "webp", "avif", "jp2", "j2k"]
DAMAGED = ["png", "jpg", "gif", "bmp", "tif", "webp", "avif", "jp2", "dds", "blp", "tga", "pcx", "qoi", "ico", "psd"]


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", LOSSLESS + LOSSY)
def test_every_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    if f".{suffix}" not in image_suffixes():
        pytest.skip(f"this Pillow does not read .{suffix}")
    path = save(tmp_path / f"train/ramp/0.{suffix}", Image.fromarray(COLOUR))
    save(tmp_path / f"train/square/1.{suffix.upper()}", Image.fromarray(COLOUR))
    reader = ImageFolderReader(str(tmp_path / "train"))
    assert len(reader) == 2 and reader.filename(0, absolute=True) == str(path)
    found = np.asarray(to_rgb(Image.open(reader[0][0]))).astype(int)
    tolerance = 40 if suffix in LOSSY or suffix == "gif" else 0
    assert np.abs(found - COLOUR).mean() <= tolerance / 4 and np.abs(found - COLOUR).max() <= 3 * tolerance


@pytest.mark.parametrize(
    ("mode", "suffix"), [("I;16", "png"), ("I;16", "tif"), ("I;16", "pgm"), ("I;16", "jp2"), ("RGB", "png")]
)
def test_sixteen_bits_are_scaled_by_their_range_in_all_tasks(tmp_path: Path, mode: str, suffix: str) -> None:
    """Every task reads the same pixels; here the values are those of the ramp, times 257."""
    path = tmp_path / f"train/ramp/0.{suffix}"
    path.parent.mkdir(parents=True)
    wide = RAMP.astype(np.uint16) * 257
    if mode == "RGB":
        cv2 = pytest.importorskip("cv2")
        cv2.imwrite(str(path), np.stack([wide] * 3, -1))
    else:
        Image.fromarray(wide).save(path)
    dataset = ImageClassificationDataset(str(tmp_path), transform={"input_size": (3, 48, 64), "crop_pct": 1.0})
    image = dataset._read(0)[0]
    expected = np.stack([RAMP] * 3, -1)
    assert np.array_equal(np.asarray(image), expected)
    mmcv = pytest.importorskip("mmcv")
    dense = mmcv.imfrombytes(path.read_bytes(), flag="color", backend="cv2")
    assert np.array_equal(dense, expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_an_unknown_range_are_refused(tmp_path: Path, mode: str) -> None:
    save(tmp_path / "train/ramp/0.tif", Image.fromarray(RAMP.astype({"I": np.int32, "F": np.float32}[mode])))
    with pytest.raises(DamagedDataError, match=r"ramp/0\.tif is damaged .*unknown range"):
        ImageClassificationDataset(str(tmp_path))[0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_say(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    path = save(tmp_path / f"train/ramp/0.{suffix}", Image.fromarray(COLOUR), exif=exif)
    dataset = ImageClassificationDataset(str(tmp_path))
    turned = np.asarray(dataset._read(0)[0])
    with Image.open(path) as image:
        assert np.array_equal(turned, np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    assert turned.shape[:2] == ((64, 48) if orientation > 4 else (48, 64))
    if suffix in ("jpg", "png", "webp"):
        mmcv = pytest.importorskip("mmcv")
        dense = mmcv.imfrombytes(path.read_bytes(), flag="color", backend="cv2")[..., ::-1]
        assert dense.shape == turned.shape and np.abs(dense.astype(int) - turned).max() < 8
    if suffix == "jpg":
        plain = ImageClassificationDataset(str(tmp_path), exif_orientation=False)._read(0)[0]
        assert plain.size == (64, 48)


@pytest.mark.parametrize("suffix", DAMAGED)
def test_damaged_content_is_an_error_with_the_path(tmp_path: Path, suffix: str) -> None:
    """Cut off, with wrong bytes, and only a beginning: whatever Pillow raises, or makes of it."""
    write_images(tmp_path, "train", 1, seed=0, classes=("sound",))
    folder = tmp_path / "train/broken"
    folder.mkdir()
    header = {"blp": b"BLP2\x01\0\0\0" + bytes(range(200)), "psd": b"8BPS\0\1" + bytes(30), "ico": b"\0\0\1\0\1\0" * 9}
    if suffix in header:
        content = header[suffix]
    else:
        save(tmp_path / f"sound.{suffix}", Image.fromarray(COLOUR))
        content = (tmp_path / f"sound.{suffix}").read_bytes()
    generator = np.random.default_rng(0)
    damaged = [b"", b"this is no image", content[:30], content[: len(content) // 2]]
    for _ in range(20):
        wrong = bytearray(content)
        for place in generator.integers(0, min(len(wrong), 300), 8):
            wrong[place] = generator.integers(256)
        damaged.append(bytes(wrong))
    for number, data in enumerate(damaged):
        (folder / f"{number}.{suffix}").write_bytes(data)
    dataset = ImageClassificationDataset(str(tmp_path), max_damaged=len(damaged))
    strict = ImageClassificationDataset(str(tmp_path))
    for index in range(len(damaged)):
        assert dataset[index]["targets"] in (0, -1)
        if dataset.damaged[index]:
            strict.damaged.zero_()
            with pytest.raises(DamagedDataError, match=rf"broken/\d+\.{suffix} is damaged \(\w+: "):
                strict[index]
    assert dataset.damaged.sum() >= 3


def test_only_regular_files_are_read_and_each_once(tmp_path: Path) -> None:
    write_images(tmp_path, "train", 2, seed=0)
    write_images(tmp_path, "elsewhere", 1, seed=1, classes=("stripes",))
    train = tmp_path / "train"
    os.mkfifo(train / "circle/pipe.png")
    (train / "circle/up").symlink_to(tmp_path)
    (train / "circle/itself").symlink_to(train / "circle")
    (train / "again").symlink_to(train / "circle")
    (train / "a.png").symlink_to(train / "square/0.png")
    (train / "square/gone.png").symlink_to(tmp_path / "nothing.png")
    (train / "square/linked.png").symlink_to(tmp_path / "elsewhere/stripes/0.png")
    (train / "outside").symlink_to(tmp_path / "elsewhere/stripes")
    (train / "square/notes.txt").write_text("no image")
    dataset = ImageClassificationDataset(str(tmp_path))
    found = [os.path.relpath(dataset.image_name(index), train) for index in range(len(dataset))]
    assert dataset.metainfo["classes"] == ("circle", "outside", "square", "stripes")
    assert len(found) == 7 and len({os.path.realpath(train / path) for path in found}) == 7
    assert {path for path in found if path.startswith("circle")} == {"circle/0.png", "circle/1.png"}
    skipped = defaultdict(list)
    find_files(str(train), {".png"}, skipped)
    assert {what: len(paths) for what, paths in skipped.items()} == {
        "pipes, sockets or devices": 1,
        "links to folders that hold the link": 2,
        "links to folders that are read already": 1,
        "links to files that are read already": 2,
        "broken links": 1,
        ".txt files": 1,
    }


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/x.mp4").write_bytes(b"1")
    with pytest.raises(RuntimeError, match=r"no image in .*; it has 1 \.mp4 files \(the first: .*x\.mp4\)"):
        ImageClassificationDataset(str(tmp_path))


def test_tar_files_hold_every_suffix_too(tmp_path: Path) -> None:
    for number, suffix in enumerate(("webp", "bmp", "png")):
        save(tmp_path / f"images/a/{number}.{suffix}", Image.fromarray(COLOUR))
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(tmp_path / "images", arcname=".")
    assert len(ImageClassificationDataset(str(tmp_path / "train.tar"), "")) == 3

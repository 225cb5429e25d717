"""The handwritten digits as a folder of images."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

from grootv.sample_data import digits, export_digits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return export_digits(tmp_path_factory.mktemp("data") / "new" / "digits")


def fingerprint(root):
    return {p.relative_to(root): hashlib.sha256(p.read_bytes()).digest() for p in root.rglob("*.png")}


def test_every_digit_is_in_one_split_and_the_classes_are_balanced(root):
    train, val = ImageFolder(root / "train"), ImageFolder(root / "val")
    assert train.classes == val.classes == [str(label) for label in range(10)]
    numbers = [int(Path(path).stem) for path, _ in train.samples + val.samples]
    assert sorted(numbers) == list(range(1797))
    total, held_out = Counter(load_digits().target.tolist()), Counter(val.targets)
    assert all(abs(held_out[label] - 0.2 * total[label]) < 1 for label in range(10))


def test_images_are_the_digits_they_are_filed_under(root):
    source = load_digits()
    for path, label in ImageFolder(root / "val").samples[::17]:
        number = int(Path(path).stem)
        assert source.target[number] == label
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), source.images[number].ravel())[0, 1] > 0.95
        assert abs(small.mean() - source.images[number].mean() * 255 / 16) < 10


def test_two_exports_are_the_same_and_leave_nothing_else(root, tmp_path):
    again = export_digits(str(tmp_path / "digits"))
    assert fingerprint(again) == fingerprint(root)
    assert os.listdir(tmp_path) == ["digits"]


def test_a_finished_folder_is_left_alone(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert export_digits(root) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "digits").mkdir()
    assert len(ImageFolder(export_digits(tmp_path / "digits") / "val")) == 360


@pytest.mark.parametrize("kind", ["file", "other folder", "a file too many"])
def test_something_else_in_the_place_is_refused_and_kept(kind, tmp_path):
    target = tmp_path / "digits"
    if kind == "file":
        target.write_text("mine")
    elif kind == "other folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    else:
        export_digits(target)
        (target / "train" / "0" / "extra.png").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="digits exists and does not hold the digits"):
        export_digits(target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    save, calls = Image.Image.save, []

    def full_disk(image, path):
        calls.append(path)
        if len(calls) == 100:
            raise OSError("No space left on device")
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_digits(tmp_path / "digits")
    assert os.listdir(tmp_path) == []


def test_another_process_may_finish_the_same_folder_first(tmp_path, monkeypatch):
    target, save, raced = tmp_path / "digits", Image.Image.save, []

    def race(image, path):
        if not raced:
            raced.append(True)
            monkeypatch.setattr(Image.Image, "save", save)
            export_digits(target)
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", race)
    assert digits.export_digits(target) == target
    assert os.listdir(tmp_path) == ["digits"]
    assert len(ImageFolder(target / "train")) == 1437

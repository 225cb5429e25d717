"""Scenes of handwritten digits on photographs: small data for object detection, instance and semantic segmentation."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HELD_OUT = 0.2
# Segmentation counts pixels, not objects: with the settings for detection, nine of ten pixels show the photograph.
SEGMENTATION = {"digits": (3, 7), "sides": (0.3, 0.7), "places": 12}
# Photographs that scikit-image and scikit-learn contain; those for validation are not used in training.
PHOTOGRAPHS = {
    "train": (
        ("skimage", "astronaut.png"),
        ("skimage", "brick.png"),
        ("skimage", "camera.png"),
        ("skimage", "chelsea.png"),
        ("skimage", "coffee.png"),
        ("skimage", "grass.png"),
        ("skimage", "gravel.png"),
        ("skimage", "hubble_deep_field.jpg"),
        ("skimage", "ihc.png"),
        ("skimage", "moon.png"),
        ("skimage", "motorcycle_left.png"),
        ("skimage", "retina.jpg"),
        ("skimage", "rocket.jpg"),
    ),
    "val": (("sklearn", "china.jpg"), ("sklearn", "flower.jpg")),
}


@dataclass
class Instance:
    """One digit, or a crowd of tiny ones: its class, its visible pixels (H, W) bool, and whether it is a crowd."""

    label: int
    mask: np.ndarray
    crowd: bool = False


@dataclass
class Scene:
    """An RGB image (H, W, 3) uint8 and the instances on it, from back to front."""

    image: np.ndarray
    instances: list[Instance]


class SceneMaker:
    """Draws scenes of one split: digits on a part of a photograph whose colours are changed.

    Digits (scikit-learn's, 8x8 pixels) are enlarged, rotated by up to 25 degrees, coloured, and pasted one over the
    other. Some are tiny. Every eighth image has a crowd, every tenth has no digits.

    Args:
        split: "train" or "val"; they have different digits (four of five are for training) and photographs.
        seed: seed of all random choices. Scene i is a function of the split, the seed and i.
        size: shorter and longer side of an image in pixels, at most 300 and 400. Which one is the height is random.
        digits: smallest and largest number of digits on an image that has digits.
        sides: smallest and largest side of a digit that is not tiny, as fractions of the image's shorter side.
        places: number of random places to try for each digit. It goes where it covers the least of earlier digits.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        split: str,
        seed: int = 0,
        size: tuple[int, int] = (128, 160),
        digits: tuple[int, int] = (1, 6),
        sides: tuple[float, float] = (0.14, 0.6),
        places: int = 1,
    ) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in PHOTOGRAPHS:
            raise ValueError(f"split must be one of {tuple(PHOTOGRAPHS)}, got {split!r}")
        if not 64 <= min(size) <= 300 or not max(size) <= 400:
            raise ValueError(f"size must be from 64 to 300 (shorter side) and at most 400 (longer side), got {size}")
        self.key = (tuple(PHOTOGRAPHS).index(split), seed)
        if not 1 <= digits[0] <= digits[1]:
            raise ValueError(f"digits must be a smallest and a largest number, at least 1, got {digits}")
        if not 0 < sides[0] <= sides[1] <= 1:
            raise ValueError(f"sides must be a smallest and a largest fraction, above 0 and at most 1, got {sides}")
        if places < 1:
            raise ValueError(f"places must be at least 1, got {places}")
        self.size = tuple(sorted(size))
        self.number, self.sides, self.places = digits, sides, places
        self.photographs = [open_photograph(package, name) for package, name in PHOTOGRAPHS[split]]
        glyphs: Any = load_digits()
        halves = train_test_split(
            np.arange(len(glyphs.target)), test_size=HELD_OUT, stratify=glyphs.target, random_state=0
        )
        chosen = halves[self.key[0]]
        self.digits = np.round(glyphs.images[chosen] * (255 / 16)).astype(np.uint8)
        self.labels = glyphs.target[chosen]

    def __call__(self, index: int) -> Scene:
        """Draw scene number `index`."""
        rng = np.random.default_rng((*self.key, index))
        height, width = rng.permutation(self.size)
        scene = Scene(self._background(rng, height, width), [])
        if index % 10 == 9:
            return scene
        if index % 8 == 3:
            self._paste_crowd(rng, scene)
        for _ in range(rng.integers(self.number[0], self.number[1] + 1)):
            tiny = rng.random() < 0.15
            side = rng.integers(9, 14) if tiny else rng.uniform(*self.sides) * self.size[0]
            self._paste_digit(rng, scene, int(side))
        for behind, instance in enumerate(scene.instances):
            for cover in scene.instances[behind + 1 :]:
                instance.mask &= ~cover.mask
        scene.instances = [each for each in scene.instances if each.mask.sum() >= 12]
        return scene

    def _background(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        photograph = self.photographs[rng.integers(len(self.photographs))]
        scale = rng.uniform(1.0, min(photograph.height / height, photograph.width / width, 2.5))
        part_width, part_height = int(width * scale), int(height * scale)
        left = int(rng.integers(photograph.width - part_width + 1))
        top = int(rng.integers(photograph.height - part_height + 1))
        part = photograph.crop((left, top, left + part_width, top + part_height)).resize((int(width), int(height)))
        # Exchanging colours and changing contrast and brightness makes many backgrounds of few photographs.
        image = np.asarray(part, np.float32)[:, :: rng.choice([1, -1]), rng.permutation(3)]
        image = (image - image.mean()) * rng.uniform(0.6, 1.2) + rng.uniform(50, 200)
        return np.clip(np.round(image), 0, 255).astype(np.uint8)

    def _glyph(self, rng: np.random.Generator, side: int) -> tuple[np.ndarray, int]:
        """Opacity in [0, 1] of a digit of about `side` pixels, cropped to its visible part, and its class."""
        number = rng.integers(len(self.labels))
        glyph = Image.fromarray(np.pad(self.digits[number], 1))
        glyph = glyph.resize((side * 10 // 8, side * 10 // 8), Image.Resampling.BICUBIC)
        glyph = glyph.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)
        opacity = np.clip((np.asarray(glyph) / 255.0 - 0.25) / 0.3, 0, 1)
        rows, columns = np.flatnonzero((opacity > 0.5).any(1)), np.flatnonzero((opacity > 0.5).any(0))
        return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], int(self.labels[number])

    def _paste_digit(
        self, rng: np.random.Generator, scene: Scene, side: int, area: tuple[int, int, int, int] | None = None
    ) -> None:
        opacity, label = self._glyph(rng, side)
        height, width = scene.image.shape[:2]
        top, left, bottom, right = area or (0, 0, height, width)
        taken = np.any([np.zeros((height, width), bool), *(each.mask for each in scene.instances)], axis=0)

        def covered(place: tuple[int, int]) -> int:
            y, x = place
            behind = taken[y : y + opacity.shape[0], x : x + opacity.shape[1]]
            return int((behind & (opacity[: height - y, : width - x] > 0.5)).sum())

        places = [
            (
                rng.integers(top, max(bottom - opacity.shape[0], top) + 1),
                rng.integers(left, max(right - opacity.shape[1], left) + 1),
            )
            for _ in range(self.places)
        ]
        y, x = min(places, key=covered)
        opacity = opacity[: height - y, : width - x]
        place = scene.image[y : y + opacity.shape[0], x : x + opacity.shape[1]]
        # A colour that differs enough from the background to be read.
        brightness = place.mean()
        colour = rng.uniform(0, 255, 3)
        colour *= (rng.uniform(0, 60) if brightness > 110 else rng.uniform(190, 255)) / max(colour.mean(), 1)
        place[:] = np.round(place + opacity[..., None] * (np.clip(colour, 0, 255) - place)).astype(np.uint8)
        mask = np.zeros((height, width), bool)
        mask[y : y + opacity.shape[0], x : x + opacity.shape[1]] = opacity > 0.5
        scene.instances.append(Instance(label, mask))

    def _paste_crowd(self, rng: np.random.Generator, scene: Scene) -> None:
        """A dozen tiny digits close together, annotated as one region with their most frequent class."""
        height, width = scene.image.shape[:2]
        top, left = rng.integers(height - 36), rng.integers(width - 48)
        members = Scene(scene.image, [])
        for _ in range(12):
            self._paste_digit(rng, members, int(rng.integers(7, 11)), (top, left, top + 36, left + 48))
        labels = [each.label for each in members.instances]
        mask = np.logical_or.reduce([each.mask for each in members.instances])
        scene.instances.append(Instance(max(sorted(set(labels)), key=labels.count), mask, crowd=True))


def open_photograph(package: str, name: str) -> Image.Image:
    if package == "skimage":
        import skimage.data

        path = Path(skimage.data.__file__).parent / name
    else:
        import sklearn.datasets

        path = Path(sklearn.datasets.__file__).parent / "images" / name
    return Image.open(path).convert("RGB")


def export_coco(root: str | Path, num_train: int = 400, num_val: int = 80, seed: int = 0) -> Path:
    """Write scenes in COCO's layout: `annotations/instances_{train,val}2017.json`, `{train,val}2017/*.jpg`.

    Masks are run lengths, exact to the pixel. The ten categories are named "0" to "9".

    Args:
        root: folder to create. It is complete or does not exist.
        num_train, num_val: number of images.
        seed: seed of the scenes.

    Returns:
        `root` as a Path.

    Raises:
        FileExistsError: `root` exists already.
    """
    with _complete_folder(root) as folder:
        (folder / "annotations").mkdir()
        for split, number in (("train", num_train), ("val", num_val)):
            images, annotations = [], []
            (folder / f"{split}2017").mkdir()
            for index, scene in enumerate(_scenes(split, seed, number)):
                name = f"{index:012d}.jpg"
                Image.fromarray(scene.image).save(folder / f"{split}2017" / name, quality=95)
                height, width = scene.image.shape[:2]
                images.append({"id": index, "file_name": name, "height": height, "width": width})
                for instance in scene.instances:
                    rows, columns = np.flatnonzero(instance.mask.any(1)), np.flatnonzero(instance.mask.any(0))
                    x, y = int(columns[0]), int(rows[0])
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": index,
                            "category_id": instance.label + 1,
                            "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                            "area": int(instance.mask.sum()),
                            "segmentation": {"size": [height, width], "counts": _run_lengths(instance.mask)},
                            "iscrowd": int(instance.crowd),
                        }
                    )
            content = {
                "images": images,
                "annotations": annotations,
                "categories": [{"id": label + 1, "name": str(label)} for label in range(10)],
            }
            (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return Path(root)


def export_ade20k(root: str | Path, num_train: int = 400, num_val: int = 80, seed: int = 0) -> Path:
    """Write scenes in ADE20K's layout: `{images,annotations}/{training,validation}/*.{jpg,png}`.

    Labels: 1 is the photograph, 2 to 11 are the digits, 0 (crowds) is not evaluated. The scenes differ from those of
    `export_coco`: they have more and larger digits, which cover less of each other and fill a quarter of the pixels.

    Args, returns and errors are those of `export_coco`.
    """
    with _complete_folder(root) as folder:
        for split, name, number in (("train", "training", num_train), ("val", "validation", num_val)):
            for kind in ("images", "annotations"):
                (folder / kind / name).mkdir(parents=True)
            for index, scene in enumerate(_scenes(split, seed, number, **SEGMENTATION)):
                labels = np.ones(scene.image.shape[:2], np.uint8)
                for instance in scene.instances:
                    labels[instance.mask] = 0 if instance.crowd else instance.label + 2
                stem = f"ADE_{split}_{index + 1:08d}"
                Image.fromarray(scene.image).save(folder / "images" / name / f"{stem}.jpg", quality=95)
                Image.fromarray(labels).save(folder / "annotations" / name / f"{stem}.png")
    return Path(root)


def _scenes(split: str, seed: int, number: int, **options: Any) -> Iterator[Scene]:
    maker = SceneMaker(split, seed, **options)
    return (maker(index) for index in range(number))


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths: pixels in column order, beginning with a run outside the mask."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff(np.concatenate(([0], changes, [pixels.size]))).tolist()
    return [0, *runs] if pixels[0] else runs


@contextmanager
def _complete_folder(root: str | Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `root` at the end, or removed after an error."""
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists already: remove it, or give another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp makes folders for their owner only
        yield unfinished
        unfinished.rename(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

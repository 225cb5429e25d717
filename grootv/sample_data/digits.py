"""Handwritten digits as a folder of images: real data for the demo and for trying out a training set-up."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

SPLITS = ("train", "val")
IMAGE_SIZE = 32
HELD_OUT = 0.2


def export_digits(root: str | Path) -> Path:
    """Writes scikit-learn's handwritten digits as an image folder that torchvision and timm read.

    The 1,797 digits (8x8 pixels, 17 grey levels, from UCI's Optical Recognition of Handwritten Digits) become greyscale
    PNG files of 32x32 pixels, `root/{train,val}/{0..9}/{number}.png`, where the number is that of the image in
    `sklearn.datasets.load_digits`. 80 % of every class are for training, 20 % are held out, the same ones each time.

    The folder appears at once and complete, or not at all: it is written beside its place and then renamed. A complete
    folder that is already there is left as it is.

    Args:
        root: the folder to make. Folders above it are made too.

    Returns:
        `root` as a Path.

    Raises:
        FileExistsError: `root` exists and holds anything else than these digits.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    root = Path(root)
    digits = load_digits()
    every_number = np.arange(len(digits.target))
    split = train_test_split(every_number, test_size=HELD_OUT, stratify=digits.target, random_state=0)
    number_at = {
        Path(name, str(digits.target[number]), f"{number:04d}.png"): number
        for name, numbers in zip(SPLITS, split, strict=True)
        for number in numbers
    }

    def complete() -> bool:
        return {path.relative_to(root) for path in root.rglob("*") if not path.is_dir()} == number_at.keys()

    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if root.is_dir() and complete():
            return root
        raise FileExistsError(f"{root} exists and does not hold the digits: give another folder, or remove it first")

    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp makes folders for their owner only
        for path, number in number_at.items():
            image = Image.fromarray(np.round(digits.images[number] * (255 / 16)).astype(np.uint8))
            target = unfinished / path
            target.parent.mkdir(parents=True, exist_ok=True)
            image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(target)
        unfinished.replace(root)
    except OSError:
        # Another process may have finished the same folder first: a rename replaces empty folders only.
        if not (root.is_dir() and complete()):
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root

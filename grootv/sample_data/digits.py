"""Handwritten digits as a folder of images: real data for the demonstration and for short training runs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

SPLITS = ("train", "val")
IMAGE_SIZE = 32
HELD_OUT = 0.2


def export_digits(root: str | Path) -> Path:
    """Write scikit-learn's handwritten digits as an image folder that torchvision and timm read.

    The 1,797 digits (8x8 pixels, 17 grey levels, from UCI's Optical Recognition of Handwritten Digits) become greyscale
    PNG files of 32x32 pixels, `root/{train,val}/{0..9}/{number}.png`, where the number is that of the image in
    `sklearn.datasets.load_digits`. Of each class 80 % are for training and 20 % are held out, always the same ones.

    The folder is written under another name and then renamed, so it is complete or does not exist. An existing complete
    folder stays as it is.

    Args:
        root: folder to create, with the folders above it.

    Returns:
        `root` as a Path.

    Raises:
        FileExistsError: `root` exists and is not exactly the folder of these digits.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    root = Path(root)
    digits: Any = load_digits()
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
        unfinished.chmod(0o755)  # mkdtemp gives access to the owner only
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

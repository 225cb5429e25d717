#!/usr/bin/env python
"""Write a folder of the shape of ImageNet, to measure how fast its images can be read: DIR/{train,val}/CLASS/*.JPEG.

    tools/make_imagenet_shaped.py data/shaped                             # 1000 classes, 10 + 1 images, 500 x 375
    tools/make_imagenet_shaped.py data/shaped --images 100 --size 1000 750

Each file is a JPEG of a random part of a photograph, resized; every fourth one is upright. The photographs are those
that scikit-image and scikit-learn contain. A class is nothing but a number.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from grootv.sample_data.scenes import PHOTOGRAPHS, open_photograph

photographs_of = cache(lambda split: [open_photograph(*names) for names in PHOTOGRAPHS[split]])


def write_class(folder: Path, images: dict[str, int], size: tuple[int, int], quality: int, number: int) -> None:
    """Write the images of a class: `images` says how many of each split."""
    rng = np.random.default_rng(number)
    for split, count in images.items():
        target = folder / split / f"n{number:08d}"
        target.mkdir(parents=True)
        for i in range(count):
            photographs = photographs_of(split)
            photograph = photographs[rng.integers(len(photographs))]
            width, height = size if i % 4 else size[::-1]
            part = np.array([width, height]) * min(photograph.width / width, photograph.height / height)
            part = (part * rng.uniform(0.5, 1)).astype(int)
            left, top = rng.integers(np.array(photograph.size) - part + 1)
            image = photograph.resize(
                (width, height), Image.Resampling.BICUBIC, (left, top, left + part[0], top + part[1])
            )
            image.save(target / f"{i}.JPEG", quality=quality)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to create")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument(
        "--images", type=int, default=10, help="of each class for training; there is one for validation"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(500, 375), metavar=("LONG", "SHORT"), help="sides, in pixels"
    )
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists already")
    write = partial(write_class, args.folder, {"train": args.images, "val": 1}, tuple(args.size), args.quality)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(args.classes), chunksize=8))
    files = list(args.folder.glob("train/*/*.JPEG"))
    mean = sum(file.stat().st_size for file in files) / len(files)
    print(f"{args.folder}: {args.classes} classes, {len(files)} images for training of {mean / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

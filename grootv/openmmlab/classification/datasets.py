"""Image classification data sets through timm: folders, WebDataset shards, Hugging Face, torchvision."""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from PIL import Image
from timm.data import ImageDataset, auto_augment, create_dataset, create_transform
from timm.data.readers import img_extensions
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from grootv.images import to_rgb

from .images import ImageFolderReader, image_suffixes


def _posterize(image: Image.Image, bits_to_keep: int, **arguments) -> Image.Image:
    """timm's posterisation. At its highest magnitude it keeps no bits: a black image, and an error from Pillow 13."""
    if bits_to_keep < 1:
        return image.point(lambda _: 0)
    return auto_augment.posterize(image, bits_to_keep, **arguments)


for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = _posterize


class DamagedDataError(RuntimeError):
    """More images are damaged than `max_damaged` allows."""


@contextmanager
def _random_state(*key: int) -> Iterator[None]:
    """Seed all random generators by `key` within the block, and restore their states after it."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _folder(root: str, split: str) -> Path:
    """The folder of classes, or tar file, at `root/split`; FileNotFoundError if it does not exist."""
    folder = Path(root, split)
    if not folder.exists():
        parent = Path(root)
        content = sorted(path.name for path in parent.iterdir())[:10] if parent.is_dir() else None
        raise FileNotFoundError(
            f"dataset folder {folder} does not exist: "
            + (f"root={root!r} does not exist either" if content is None else f"root={root!r} contains {content}")
        )
    return folder


@contextmanager
def _all_suffixes() -> Iterator[None]:
    """Let timm's readers take every suffix that Pillow reads; by themselves they take .png, .jpg and .jpeg."""
    before = img_extensions.get_img_extensions()
    img_extensions.set_img_extensions(sorted(image_suffixes()))
    try:
        yield
    finally:
        img_extensions.set_img_extensions(before)


@DATASETS.register_module()
class ImageClassificationDataset(Dataset):
    """Images with one class each, from a folder with a subfolder a class or any indexed data set that timm reads.

    An item is a dict of `inputs` (C, H, W) uint8, `targets` int and `indices` int, the position in the data set.

    Image folders are read by :class:`~.images.ImageFolderReader`, pixels by :func:`grootv.images.to_rgb`.

    An image that cannot be decoded is logged once, with its path. In training the next readable image replaces it; in
    evaluation a grey image with target -1 replaces it, which the metrics ignore.

    Args:
        root: folder that contains `split`; for Hugging Face data, the cache folder.
        split: name of the split; for folders the name of the subfolder, which may be empty.
        name: as in `timm.data.create_dataset`: empty for image folders and tar files of images, "hfds/..." for
            Hugging Face, "torch/..." for torchvision.
        is_training: whether `transform` is random and damaged images are replaced.
        transform: arguments of `timm.data.create_transform`. :class:`ImagePreprocessor` does normalisation and random
            erasing.
        max_damaged: number of different damaged images that are allowed. Each process of a distributed run counts its
            own; `DamagedImagesHook` counts them together after each epoch.
        reader: further arguments of `timm.data.create_dataset`, such as `class_map` or `input_key`.
        exif_orientation: turn images as their EXIF orientation says, as viewers and the readers of mmdet and mmseg do.
            timm and torchvision do not.

    Raises:
        FileNotFoundError: the folder does not exist.
        DamagedDataError: while reading, more than `max_damaged` images are damaged.
    """

    def __init__(
        self,
        root: str | None = None,
        split: str = "train",
        name: str = "",
        is_training: bool = False,
        transform: dict | None = None,
        max_damaged: int = 0,
        reader: dict | None = None,
        exif_orientation: bool = True,
    ) -> None:
        if not name:
            root = str(_folder(root or "", split))
        if not name and os.path.isdir(root):
            self.source = ImageDataset(root, reader=ImageFolderReader(root, **(reader or {})))
        else:
            with _all_suffixes():
                self.source = create_dataset(
                    name, root=root, split=split, search_split=False, is_training=is_training, **(reader or {})
                )
        if hasattr(self.source, "loader"):  # torchvision's folders, which would convert to 8 bits themselves
            self.source.loader = Image.open
        self.exif_orientation = exif_orientation
        self.is_training = is_training
        self.max_damaged = max_damaged
        self.transform = create_transform(
            **(transform or {}), is_training=is_training, normalize=False, use_prefetcher=True
        )
        reader_classes = getattr(getattr(self.source, "reader", self.source), "class_to_idx", None)
        self.metainfo = {"classes": tuple(sorted(reader_classes, key=reader_classes.get))} if reader_classes else {}
        # In shared memory: persistent worker processes must see changes by the main process and by each other.
        self._seed = torch.full((2,), -1, dtype=torch.int64).share_memory_()
        self.damaged = torch.zeros(len(self.source), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Make each image's random transform a function of `seed`, `epoch` and its index.

        Then neither the number of processes nor an interruption changes the images that a run trains on.
        """
        self._seed.copy_(torch.tensor([seed, epoch]))

    def __getitem__(self, index: int) -> dict:
        image, target, index = self._read(index)
        if self._seed[0] < 0:
            return {"inputs": self.transform(image), "targets": target, "indices": index}
        with _random_state(*self._seed.tolist(), index):
            return {"inputs": self.transform(image), "targets": target, "indices": index}

    def _read(self, index: int) -> tuple[Image.Image, int, int]:
        for _ in range(len(self)):
            try:
                image, target, *_ = self.source.reader[index] if hasattr(self.source, "reader") else self.source[index]
                if not isinstance(image, Image.Image):
                    image = Image.open(image)
                return to_rgb(image, self.exif_orientation), target, index
            except Exception as error:  # Pillow's readers raise almost anything for wrong bytes
                self._report(index, error)
            if not self.is_training:
                return Image.new("RGB", (32, 32), (127, 127, 127)), -1, index
            index = (index + 1) % len(self)
        raise DamagedDataError(f"none of the {len(self)} images could be read")

    def image_name(self, index: int) -> str:
        """The path of an image, or, where the source knows none, its number."""
        if hasattr(self.source, "samples"):  # torchvision's folders
            return self.source.samples[index][0]
        try:
            return self.source.filename(index, absolute=True)
        except (AttributeError, AssertionError):
            return f"image {index}"

    def _report(self, index: int, error: Exception) -> None:
        if self.damaged[index]:
            return
        self.damaged[index] = True
        path = self.image_name(index)
        reason = f"{type(error).__name__}: {error}"
        count = int(self.damaged.sum())
        if count > self.max_damaged:
            raise DamagedDataError(
                f"{path} is damaged ({reason}); that makes {count} damaged images, "
                f"and max_damaged={self.max_damaged} allows no more"
            ) from error
        print_log(
            f"{path} is damaged ({reason}) and is skipped; damaged so far: {count}, allowed: {self.max_damaged}",
            logger="current",
            level=logging.ERROR,
        )


@DATASETS.register_module()
class StreamedClassificationDataset(IterableDataset):
    """Images with one class each, streamed: WebDataset shards ("wds/..."), Hugging Face ("hfids/..."), TFDS.

    Items are those of :class:`ImageClassificationDataset`, with index -1. timm's readers distribute the data over
    processes, shuffle by epoch and skip damaged records with a warning of their own. Use it with `sampler=None`.

    Args:
        name, root, split, reader: as in `timm.data.create_dataset`; see timm's documentation for each kind.
        is_training: whether `transform` is random and the data are shuffled.
        transform: arguments of `timm.data.create_transform`.
        batch_size: batch size of the loader; the readers round the length of an epoch to it.
        num_workers: worker processes of the loader, which the same rounding needs.
        seed: seed of the order.
        exif_orientation: as of :class:`ImageClassificationDataset`; TensorFlow's data sets do not tell it.
    """

    def __init__(
        self,
        name: str,
        root: str | None = None,
        split: str = "train",
        is_training: bool = False,
        transform: dict | None = None,
        batch_size: int = 1,
        num_workers: int = 1,
        seed: int = 42,
        reader: dict | None = None,
        exif_orientation: bool = True,
    ) -> None:
        # Without a mode, the readers leave the conversion to `to_rgb`; TensorFlow's decoder gives 8-bit RGB.
        reader = {**({} if name.startswith("tfds/") else {"input_img_mode": ""}), **(reader or {})}
        self.source = create_dataset(
            name, root=root, split=split, is_training=is_training, batch_size=batch_size, seed=seed, **reader
        )
        self.exif_orientation = exif_orientation
        self.source.set_loader_cfg(num_workers=num_workers)
        self.transform = create_transform(
            **(transform or {}), is_training=is_training, normalize=False, use_prefetcher=True
        )
        self.metainfo: dict = {}
        self._seed = torch.full((2,), -1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Choose the order of `epoch`; make the random transforms a function of `seed`, `epoch` and the position."""
        self._seed.copy_(torch.tensor([seed, epoch]))
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        process = get_rank(), worker.id if worker else 0
        for number, (image, target) in enumerate(self.source):
            image = to_rgb(image, self.exif_orientation)
            if self._seed[0] < 0:
                inputs = self.transform(image)
            else:
                with _random_state(*self._seed.tolist(), *process, number):
                    inputs = self.transform(image)
            yield {"inputs": inputs, "targets": target, "indices": -1}

"""Which image files a folder holds."""

import logging
import os
import stat
from collections import defaultdict
from pathlib import Path

from mmengine.logging import print_log
from PIL import Image
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from grootv.models.safe_loading import read_pickle

# Pillow recognises these formats, but needs programs or plug-ins of others to read their pixels.
_WITHOUT_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


def image_suffixes() -> set[str]:
    """The suffixes, in lower case, of all files that the installed Pillow reads."""
    Image.init()
    return {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _WITHOUT_PIXELS
    }


class ImageFolderReader(Reader):
    """Images in a folder of classes: the name of the folder that an image lies in is its class.

    It takes each regular file once whose suffix is one of an image. It follows links, but not to folders that hold the
    link itself, nor to what it has found already. It logs what it leaves out.

    Args:
        root: the folder.
        class_map: as of timm's `create_dataset`: classes by number, in a file or a dict; default: the folders' names in
            their natural order.
        input_key: suffixes to take, separated by ";"; default: all that Pillow reads.

    Raises:
        RuntimeError: there is no image; the message says what there is.
    """

    def __init__(self, root: str, class_map: str | dict = "", input_key: str | None = None) -> None:
        super().__init__()
        self.root = root
        suffixes = {suffix.lower() for suffix in input_key.split(";")} if input_key else image_suffixes()
        skipped: dict[str, list[str]] = defaultdict(list)
        files = find_files(root, suffixes, skipped)
        labels = [os.path.basename(os.path.dirname(path)) if os.path.dirname(path) != root else "" for path in files]
        if class_map:
            self.class_to_idx = load_class_map(_read_if_pickle(class_map, root), root)
        else:
            self.class_to_idx = {name: i for i, name in enumerate(sorted(set(labels), key=natural_key))}
        self.samples = []
        for path, label in zip(files, labels, strict=True):
            if label in self.class_to_idx:
                self.samples.append((path, self.class_to_idx[label]))
            else:
                skipped["images of classes that class_map does not have"].append(path)
        self.samples.sort(key=lambda sample: natural_key(sample[0]))
        left_out = "; ".join(f"{len(paths)} {what} (the first: {paths[0]})" for what, paths in sorted(skipped.items()))
        if not self.samples:
            raise RuntimeError(f"no image in {root}; it has {left_out or 'no files'}")
        if left_out:
            print_log(f"{root}: left out are {left_out}", logger="current", level=logging.WARNING)

    def __getitem__(self, index: int) -> tuple:
        path, target = self.samples[index]
        return open(path, "rb"), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def _read_if_pickle(class_map: str | dict[str, int], root: str) -> str | dict[str, int]:
    """The classes of a pickle, which timm before 1.0.28 would run as a program."""
    if not isinstance(class_map, str) or not class_map.lower().endswith(".pkl"):
        return class_map
    with open(class_map if os.path.exists(class_map) else os.path.join(root, class_map), "rb") as file:
        return read_pickle(file)


def find_files(root: str, suffixes: set[str], skipped: dict[str, list[str]]) -> list[str]:
    """Paths of the regular files below `root` with one of the suffixes, each file once.

    Args:
        root: folder.
        suffixes: in lower case, with the dot.
        skipped: what is left out, by kind, is appended to it.
    """
    found: dict[str, str] = {}  # by real path
    seen: set[str] = set()
    folders, links = [root], []
    # Links come after all else, so that what can be reached without one has the name that it has there.
    while folders or links:
        if folders:
            folder = folders.pop()
            real = os.path.realpath(folder)
            if real in seen:
                skipped["links to folders that are read already"].append(folder)
                continue
            seen.add(real)
            with os.scandir(folder) as entries:
                content = sorted(entries, key=lambda entry: entry.name, reverse=True)
            for entry in content:
                if entry.is_symlink():
                    links.append(entry.path)
                elif entry.is_dir():
                    folders.append(entry.path)
                else:
                    _add(entry.path, os.path.join(real, entry.name), entry.stat().st_mode, suffixes, found, skipped)
            continue
        links.sort(reverse=True)
        link = links.pop()
        real = os.path.realpath(link)
        if not os.path.exists(real):
            skipped["broken links"].append(link)
        elif os.path.isdir(real):
            if Path(os.path.realpath(os.path.dirname(link))).is_relative_to(real):
                skipped["links to folders that hold the link"].append(link)
            else:
                folders.append(link)
        else:
            _add(link, real, os.stat(real).st_mode, suffixes, found, skipped)
    return list(found.values())


def _add(
    path: str, real: str, mode: int, suffixes: set[str], found: dict[str, str], skipped: dict[str, list[str]]
) -> None:
    suffix = os.path.splitext(path)[1].lower()
    if not stat.S_ISREG(mode):
        skipped["pipes, sockets or devices"].append(path)
    elif suffix not in suffixes:
        skipped[f"{suffix} files" if suffix else "files without a suffix"].append(path)
    elif real in found:
        skipped["links to files that are read already"].append(path)
    else:
        found[real] = path

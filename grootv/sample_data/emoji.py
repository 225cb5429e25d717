"""Emoji by ten artists: a classification set of real drawings, made from packages of the npm registry.

The same subjects of Unicode, drawn by each artist. A class is one of Unicode's subgroups, such as "animal-bird" or
"food-fruit". One artist is held out, and one in ten subjects. `tools/make_emoji.py` fetches the packages and makes one
file of about 30 MB, which training code reads into memory as a whole.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ["ARTISTS", "HELD_OUT_ARTIST", "SPLITS", "SUBJECTS", "Emoji", "Package", "load_emoji", "make_emoji"]

IMAGE_SIZE = 128
SPLITS = ("train", "subjects", "artist")
"""Training; subjects that training has not seen, by its artists; and everything by the artist that it has not seen."""
LEAST_SUBJECTS = 8
"""Subgroups with fewer subjects are no class."""


class Package(NamedTuple):
    """A package of the npm registry, and what it must give."""

    name: str
    """As npm knows it."""
    version: str
    licence: str
    """SPDX identifier; the authors are named in the package's `info.json`."""
    integrity: str
    """SHA-512 of the package's archive, as npm writes it."""
    pixels: str = ""
    """SHA-256 of the pixels of all images, one after the other."""


# Skin tones, hair styles and flags are no drawings by an artist.
_NO_DRAWINGS = ("component", "flags")
SUBJECTS = Package(
    "emojibase-data",
    "17.0.0",
    "MIT",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
HELD_OUT_ARTIST = "openmoji"
ARTISTS = {
    package.name.removeprefix("@iconify-json/"): package
    for package in (
        Package(
            "@iconify-json/emojione",
            "1.2.3",
            "CC-BY-4.0",
            "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
            "a0bdb60588033443a50a9712512a22b446df83800c8216325d85dd2efe487d53",
        ),
        Package(
            "@iconify-json/emojione-v1",
            "1.2.3",
            "CC-BY-SA-4.0",
            "sha512-UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
            "33434f6248c022bbe0e74f4e8ac39ce91eac71bbd02771f189588b86d16363d7",
        ),
        Package(
            "@iconify-json/fluent-emoji",
            "1.2.7",
            "MIT",
            "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
            "f4b53e1a2d51d5cb32325c68647daa92b52b61e4ca648fbd62dc7119c4dcd184",
        ),
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "MIT",
            "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
            "1f2eff60831f07f6c7f9e35b4ab08b52302b53ad21a32e542012326f34c1773b",
        ),
        Package(
            "@iconify-json/fxemoji",
            "1.2.2",
            "Apache-2.0",
            "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
            "7e37ea3f2da91a5c604ef45e8dede61db811a984dd783d94b009482287850dac",
        ),
        Package(
            "@iconify-json/noto",
            "1.2.9",
            "Apache-2.0",
            "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
            "6ee4af0c1efa07176676114eaa5a91b504cff26d01258d0298f78312e3852cd9",
        ),
        Package(
            "@iconify-json/noto-v1",
            "1.2.5",
            "Apache-2.0",
            "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
            "ec5e281086d56bd3392dd990bad53851ae7e03ce249a04cb61bde2b2f06b97ed",
        ),
        Package(
            "@iconify-json/openmoji",
            "1.2.29",
            "CC-BY-SA-4.0",
            "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
            "142349f6cd16d51472abd8de23386b14793378f5ebb1194f2b61393a1d298f74",
        ),
        Package(
            "@iconify-json/streamline-emojis",
            "1.2.4",
            "CC-BY-4.0",
            "sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
            "61b51b3261a0cf2635f93b8615748dafba28b18cbe868bbab3c3b6743a4554d6",
        ),
        Package(
            "@iconify-json/twemoji",
            "1.2.5",
            "CC-BY-4.0",
            "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
            "0c66dbcd64481702f87c10b3c65fcd8f3c55a2467ddb99b103134ee32a09f243",
        ),
    )
}


class Emoji(NamedTuple):
    """The images of one split."""

    images: np.ndarray
    """(N, 128, 128, 3) uint8, RGB on white."""
    labels: np.ndarray
    """(N,) int64, index into `classes`."""
    classes: list[str]
    """Names of all classes, those of Unicode's subgroups."""
    subjects: list[str]
    """(N) names of what the images show."""
    artists: list[str]
    """(N) keys of `ARTISTS`."""


def make_emoji(archives: dict[str, Path], file: str | Path) -> Path:
    """Draw the emoji of all packages and write them into one file, which `load_emoji` reads.

    Vector drawings are rendered at 128 x 128 on white by resvg, and kept as lossless WebP. The result depends on the
    packages alone: their archives and the pixels of each artist are compared with the hashes of `ARTISTS`.

    Args:
        archives: The `.tgz` of each package by its name, as `npm pack` writes them.
        file: To write, `.npz`. It is written under another name and then renamed.

    Returns:
        `file` as a Path.

    Raises:
        ValueError: an archive or the pixels of an artist have another hash.
        ModuleNotFoundError: resvg_py is not installed.
    """
    file = Path(file)
    for package in (SUBJECTS, *ARTISTS.values()):
        digest = base64.b64encode(hashlib.sha512(archives[package.name].read_bytes()).digest()).decode()
        _compare(f"{archives[package.name]}, {package.name} {package.version}", f"sha512-{digest}", package.integrity)
    class_of = _subjects(archives[SUBJECTS.name])
    classes = sorted(set(class_of.values()))
    images, labels, subjects, artists, splits = [], [], [], [], []
    with ProcessPoolExecutor() as pool:
        for artist, package in ARTISTS.items():
            drawings = dict(_drawings(archives[package.name], class_of))
            hashed = hashlib.sha256()
            for subject, (encoded, pixels) in zip(
                drawings, pool.map(_render, drawings.values(), chunksize=16), strict=True
            ):
                hashed.update(pixels)
                images.append(encoded)
                labels.append(classes.index(class_of[subject]))
                subjects.append(subject)
                artists.append(artist)
                splits.append(_split(subject, artist))
            _compare(f"the pixels of {artist}", hashed.hexdigest(), package.pixels)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.npz")
    try:
        np.savez(
            unfinished,
            images=np.frombuffer(b"".join(images), np.uint8),
            ends=np.cumsum([len(image) for image in images]),
            labels=np.array(labels),
            subjects=np.array(subjects),
            artists=np.array(artists),
            splits=np.array(splits),
            classes=np.array(classes),
        )
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file


def load_emoji(file: str | Path, split: str) -> Emoji:
    """The images of a split from a file of `make_emoji`.

    Args:
        file: Path of the `.npz` file.
        split: "train"; "subjects": subjects that training has not seen, by its artists; or "artist": everything by the
            artist that training has not seen.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    with np.load(file) as content:
        chosen = np.flatnonzero(content["splits"] == split)
        ends, encoded = content["ends"], content["images"].tobytes()
        labels, classes = content["labels"][chosen], content["classes"].tolist()
        subjects, artists = content["subjects"][chosen].tolist(), content["artists"][chosen].tolist()

    def decode(number: int) -> np.ndarray:
        start = ends[number - 1] if number else 0
        with Image.open(io.BytesIO(encoded[start : ends[number]])) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(decode, chosen)))
    return Emoji(images, labels, classes, subjects, artists)


def _compare(what: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise ValueError(f"{what}: the hash is {actual}, and must be {expected}")


def _read(archive: Path, name: str) -> dict:
    """A JSON file in the archive of a package."""
    with tarfile.open(archive) as content:
        file = content.extractfile(f"package/{name}")
        assert file is not None, f"{name} is a folder"
        return json.load(file)


def _plain(name: str) -> str:
    """A name without case, spaces and punctuation, in which artists differ."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _subjects(archive: Path) -> dict[str, str]:
    """The class of each subject, by their names, in Unicode's order."""
    groups = _read(archive, "meta/groups.json")
    no_drawings = [int(number) for number, name in groups["groups"].items() if name in _NO_DRAWINGS]
    class_of = {
        emoji["label"]: groups["subgroups"][str(emoji["subgroup"])]
        for emoji in _read(archive, "en/data.json")
        if emoji.get("group") is not None and emoji["group"] not in no_drawings
    }
    names = list(class_of.values())
    return {subject: name for subject, name in class_of.items() if names.count(name) >= LEAST_SUBJECTS}


def _drawings(archive: Path, class_of: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Subjects and SVG documents of an artist. No drawing stands for two subjects."""
    icons = _read(archive, "icons.json")
    aliases = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items() if alias.keys() == {"parent"}}
    names = {_plain(name): name for name in (*aliases, *icons["icons"])}
    taken = set()
    for subject in class_of:
        name = names.get(_plain(subject))
        while name in aliases:
            name = aliases[name]
        if name not in icons["icons"] or name in taken:
            continue
        taken.add(name)
        icon = icons["icons"][name]
        left, top, width, height = (
            icon.get(key, icons.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        side = max(width, height)
        box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        yield subject, f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def _render(svg: str) -> tuple[bytes, bytes]:
    """A drawing as WebP, and its pixels."""
    import resvg_py  # pyright: ignore[reportMissingImports] (the extra "emoji", which only this function needs)

    png = bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, width=IMAGE_SIZE, height=IMAGE_SIZE, background="#ffffff", skip_system_fonts=True
        )
    )
    image = Image.open(io.BytesIO(png)).convert("RGB")
    webp = io.BytesIO()
    image.save(webp, "WEBP", lossless=True)
    return webp.getvalue(), image.tobytes()


def _split(subject: str, artist: str) -> str:
    """The split of an image. A man and a woman in one role count as one subject, because their drawings are similar."""
    if artist == HELD_OUT_ARTIST:
        return "artist"
    name = re.sub(r"\b(man|woman|men|women|person|people)\b", "", subject)
    return "subjects" if hashlib.sha256(_plain(name).encode()).digest()[0] < 26 else "train"

"""The emoji, from packages made up here, by a renderer that knows squares only."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from training_helpers import environment

from grootv.sample_data import emoji
from grootv.sample_data.emoji import Package, load_emoji

# The body of an icon is a colour; the renderer fills the part of the view box that the icon has.
RENDERER = """
import io, re
from PIL import Image

def svg_to_bytes(svg_string, width, height, background, skip_system_fonts):
    left, top, w, h = map(float, re.search('viewBox="([^"]*)"', svg_string)[1].split())
    assert w == h and background == "#ffffff" and skip_system_fonts
    colour = tuple(int(part) for part in re.search(">(.*)<", svg_string)[1].split(","))
    image = Image.new("RGB", (width, height), "white")
    image.paste(colour, (round(-left * width / w), round(-top * height / h), width, height))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
"""
BIRDS = [f"bird {number}" for number in range(40)]
SUBJECTS = {
    "meta/groups.json": {
        "groups": {"0": "animals", "9": "flags"},
        "subgroups": {"1": "bird", "2": "fruit", "3": "flag"},
    },
    "en/data.json": [
        *({"label": name, "group": 0, "subgroup": 1} for name in BIRDS),
        *({"label": f"fruit {number}", "group": 0, "subgroup": 2} for number in range(8)),
        {"label": "man bird 1", "group": 0, "subgroup": 1},
        {"label": "regional indicator"},
        *({"label": f"flag {number}", "group": 9, "subgroup": 3} for number in range(9)),
    ],
}


def icons(*names: str, **others: dict) -> dict:
    drawn = {name: {"body": f"{number},0,0"} for number, name in enumerate(names)}
    return {"icons.json": {"icons": {**drawn, **others}, "aliases": {"bird-39": {"parent": "bird-38"}}}}


PACKAGES = {
    "subjects": SUBJECTS,
    "@iconify-json/openmoji": icons("bird-0", "flag-1", "fruit-7"),
    "@iconify-json/other": icons(
        *(name.replace(" ", "") for name in BIRDS[:39]), "man-bird-1", wide={"body": "1,1,1"},
        **{"Fruit 1": {"body": "0,0,255", "width": 16, "height": 8}},
    ),
}  # fmt: skip


PROGRAM = """
from pathlib import Path
from grootv.sample_data import emoji
from grootv.sample_data.emoji import Package

packages, archives = {packages!r}, {{name: Path(path) for name, path in {archives!r}.items()}}
emoji.SUBJECTS = packages.pop("subjects")
emoji.ARTISTS = {{name.removeprefix("@iconify-json/"): package for name, package in packages.items()}}

def fail():
    try:
        emoji.make_emoji(archives, "refused.npz")
    except ValueError as error:
        print(error)

if __name__ == "__main__":
    fail()  # no artist has the pixels that its package names, which is nothing
    compare = emoji._compare
    emoji._compare = lambda what, *hashes: None if "pixels" in what else compare(what, *hashes)
    emoji.make_emoji(archives, "made.npz")
    emoji.make_emoji(archives, "again.npz")
    archives["@iconify-json/openmoji"] = archives["@iconify-json/other"]
    fail()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a program made the emoji of `PACKAGES`: made.npz, again.npz, and the errors that it printed."""
    folder = tmp_path_factory.mktemp("emoji")
    (folder / "resvg_py.py").write_text(RENDERER)
    packages, archives = {}, {}
    for name, files in PACKAGES.items():
        archives[name] = str(folder / f"{len(archives)}.tgz")
        with tarfile.open(archives[name], "w:gz") as archive:
            for path, content in files.items():
                data = json.dumps(content).encode()
                entry = tarfile.TarInfo(f"package/{path}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        digest = base64.b64encode(hashlib.sha512(Path(archives[name]).read_bytes()).digest()).decode()
        packages[name] = Package(name, "1.0.0", "MIT", f"sha512-{digest}")
    (folder / "program.py").write_text(PROGRAM.format(packages=packages, archives=archives))
    with (folder / "errors").open("w") as errors:
        subprocess.run(
            [sys.executable, "program.py"], cwd=folder, env=environment(folder), stdout=errors, check=True
        )  # fmt: skip
    return folder


def test_every_drawing_is_in_one_split_under_its_class(folder):
    train, subjects, artist = (load_emoji(folder / "made.npz", split) for split in emoji.SPLITS)
    assert train.classes == subjects.classes == artist.classes == ["bird", "fruit"]  # too few, no drawings: no class
    assert artist.subjects == ["bird 0", "fruit 7"] and set(artist.artists) == {"openmoji"}
    assert artist.labels.tolist() == [0, 1]
    by_others = train.subjects + subjects.subjects
    # A parent that is drawn already gives no second image to its alias.
    assert sorted(by_others) == sorted([*BIRDS[:39], "man bird 1", "fruit 1"]) and subjects.subjects
    assert ("man bird 1" in train.subjects) == ("bird 1" in train.subjects)


def test_images_are_the_drawings_on_white_squares(folder):
    train, subjects, artist = (load_emoji(folder / "made.npz", split) for split in emoji.SPLITS)
    assert artist.images.shape == (2, 128, 128, 3) and artist.images.dtype == np.uint8
    assert (artist.images[1] == (2, 0, 0)).all()
    images = {
        name: image for split in (train, subjects) for name, image in zip(split.subjects, split.images, strict=True)
    }
    assert all((images[bird] == (number, 0, 0)).all() for number, bird in enumerate(BIRDS[:39]))
    assert (images["fruit 1"][:32] == 255).all() and (images["fruit 1"][32:] == (0, 0, 255)).all()


def test_two_files_are_the_same_and_failures_leave_none(folder):
    assert (folder / "again.npz").read_bytes() == (folder / "made.npz").read_bytes()
    assert sorted(file.name for file in folder.glob("*.npz*")) == ["again.npz", "made.npz"]


def test_other_pixels_and_other_packages_are_refused(folder):
    pixels, package = (folder / "errors").read_text().splitlines()
    assert pixels.startswith("the pixels of openmoji: the hash is ")
    assert "@iconify-json/openmoji 1.0.0: the hash is sha512-" in package


def test_the_splits_have_names(folder):
    with pytest.raises(ValueError, match=r"split must be one of .*, got 'val'"):
        load_emoji(folder / "made.npz", "val")


def test_sets_without_an_open_licence_are_not_used():
    assert {package.licence for package in emoji.ARTISTS.values()} == {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT"}
    assert emoji.HELD_OUT_ARTIST in emoji.ARTISTS

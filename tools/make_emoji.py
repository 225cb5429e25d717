"""Make a classification set of emoji by ten artists from packages of the npm registry, in one file.

pip install ".[emoji]"
python tools/make_emoji.py data/emoji.npz

`npm` fetches the packages, about 30 MB. The set is for `benchmarks/compare_scans.py`.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from grootv.sample_data.emoji import ARTISTS, SPLITS, SUBJECTS, load_emoji, make_emoji


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="to write, such as data/emoji.npz")
    parser.add_argument("--packages", type=Path, help="folder of the packages, to keep them; default: a temporary one")
    args = parser.parse_args()
    if args.file.exists():
        parser.error(f"{args.file} exists")
    args.file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.packages or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        archives = {}
        for package in (SUBJECTS, *ARTISTS.values()):
            archive = folder / f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}.tgz"
            if not archive.exists():
                command = ["npm", "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", folder]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            archives[package.name] = archive
            print(f"{package.name} {package.version}, {package.licence}")
        make_emoji(archives, args.file)
    for split in SPLITS:
        emoji = load_emoji(args.file, split)
        print(
            f"{split}: {len(emoji.labels)} images of {len(set(emoji.subjects))} subjects, {len(emoji.classes)} classes"
        )


if __name__ == "__main__":
    main()

"""Write scenes of handwritten digits on photographs in the formats of COCO and ADE20K. Nothing is downloaded.

python tools/make_sample_data.py data/sample      makes data/sample/coco and data/sample/ade
"""

import argparse
from pathlib import Path

from grootv.sample_data.scenes import export_ade20k, export_coco


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder to create them in; formats that exist there are kept")
    parser.add_argument("--train", type=int, default=1200, help="images for training")
    parser.add_argument("--val", type=int, default=100, help="images held out")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    args = parser.parse_args()
    for name, export in (("coco", export_coco), ("ade", export_ade20k)):
        folder = args.root / name
        if folder.exists():
            print(f"{folder} exists already")
        else:
            print(f"{export(folder, args.train, args.val, args.seed)}: {args.train} + {args.val} images")


if __name__ == "__main__":
    main()

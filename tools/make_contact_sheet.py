"""Put the pictures of tools/test.py --show-dir on one sheet: python tools/make_contact_sheet.py FOLDER SHEET.png"""

import argparse
from pathlib import Path

from PIL import Image


def main() -> None:
    """Parse the arguments and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="searched with all folders in it for PNG and JPEG files")
    parser.add_argument("sheet", type=Path, help="the picture to write")
    parser.add_argument("--number", type=int, default=12, help="pictures to take, the first ones by name")
    parser.add_argument("--columns", type=int, default=3)
    args = parser.parse_args()
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix in (".png", ".jpg"))[: args.number]
    if not paths:
        parser.error(f"{args.folder} holds no pictures")
    pictures = [Image.open(path).convert("RGB") for path in paths]
    width, height = (max(sizes) for sizes in zip(*(picture.size for picture in pictures), strict=True))
    rows = -(-len(pictures) // args.columns)
    gap = 8
    sheet = Image.new("RGB", (args.columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, args.columns)
        sheet.paste(picture, (column * (width + gap), row * (height + gap)))
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.sheet)
    print(f"{args.sheet}: {len(pictures)} pictures, ground truth on the left of each, predictions on the right")


if __name__ == "__main__":
    main()

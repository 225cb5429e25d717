"""Write scikit-learn's handwritten digits as a folder of images that the classification configs read.

python tools/make_digits.py data/digits
"""

import argparse
from pathlib import Path

from grootv.sample_data import export_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=export_digits.__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder to create, with train and val in it")
    print(f"handwritten digits: {export_digits(parser.parse_args().root)}")


if __name__ == "__main__":
    main()

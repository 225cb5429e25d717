"""tools/make_digits.py on the command line."""

import subprocess
import sys
from pathlib import Path

from torchvision.datasets import ImageFolder


def test_the_command(tmp_path):
    tool = Path(__file__).parents[2] / "tools" / "make_digits.py"
    done = subprocess.run([sys.executable, tool, tmp_path / "digits"], capture_output=True, text=True, check=True)
    assert str(tmp_path / "digits") in done.stdout
    assert len(ImageFolder(tmp_path / "digits" / "val")) == 360

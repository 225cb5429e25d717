"""Fetch timm's own model tests, which its wheels leave out, from the source package of the installed version.

    python tests/models/fetch_timm_suite.py

puts them where `test_timm_suite.py` looks, in the environment that runs it. Nothing is left behind when it fails.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

SUITE = Path(sys.prefix) / "share" / "timm-tests" / f"timm-{version('timm')}" / "test_models.py"


def fetch() -> Path:
    """The path of timm's test_models.py, downloaded unless it is there.

    Raises:
        subprocess.CalledProcessError: pip could not download the source package.
        KeyError: the source package holds no tests/test_models.py.
    """
    if SUITE.exists():
        return SUITE
    name = f"timm-{version('timm')}"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
        subprocess.run([*pip, "--dest", folder, name.replace("-", "==", 1)], check=True)
        with tarfile.open(Path(folder) / f"{name}.tar.gz") as archive:
            SUITE.parent.mkdir(parents=True, exist_ok=True)
            with archive.extractfile(archive.getmember(f"{name}/tests/test_models.py")) as source:
                unfinished = SUITE.with_suffix(".part")
                with unfinished.open("wb") as target:
                    shutil.copyfileobj(source, target)
            unfinished.replace(SUITE)
    return SUITE


if __name__ == "__main__":
    print(fetch())

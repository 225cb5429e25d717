"""The blocks of code in the pages of the repository.

A block of Python runs, or this comment stands in the line above it, with the reason: <!-- not run: REASON -->.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from training_helpers import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*/README.md")])
BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code; `reason` says why it does not run, None if it does."""

    language: str
    code: str
    reason: str | None


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The blocks of a page, in order."""
    found = [Block(kind, code, reason) for reason, kind, code in BLOCK.findall(page.read_text())]
    return [block._replace(reason=block.reason or None) for block in found if language in (None, block.language)]


def examples(page: Path) -> list[str]:
    """Python that runs as it stands."""
    return [block.code for block in blocks(page, "python") if block.reason is None]


def packages(code: str) -> set[str]:
    """The packages that an example imports."""
    names = re.findall(r"^from (\w+)", code, re.MULTILINE)
    for line in re.findall(r"^import (.*)", code, re.MULTILINE):
        names += [name.split()[0].split(".")[0] for name in line.split(",")]
    if '"grootv.openmmlab"' in code:  # a config, which mmengine imports
        names.append("mmengine")
    return set(names)


def missing_packages(code: str) -> list[str]:
    """The packages that an example imports and that are not installed."""
    return sorted(name for name in packages(code) if find_spec(name) is None)


def run_example(code: str, folder: Path, *paths: Path) -> subprocess.CompletedProcess:
    """Run `code` in a Python of its own in `folder`, without network."""
    path = os.pathsep.join(map(str, (*paths, ROOT, *filter(None, [os.environ.get("PYTHONPATH")]))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)

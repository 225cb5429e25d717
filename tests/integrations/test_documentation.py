"""The examples of docs/integrations.md run as they stand, each in a Python of its own."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def packages(code: str) -> set[str]:
    """The packages that an example imports."""
    names = re.findall(r"^from (\w+)", code, re.MULTILINE)
    for line in re.findall(r"^import (.*)", code, re.MULTILINE):
        names += [name.split()[0].split(".")[0] for name in line.split(",")]
    return set(names)


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: "-".join(sorted(packages(code) - {"torch", "timm"})))
def test_example(code: str, tmp_path: Path) -> None:
    missing = sorted(name for name in packages(code) if find_spec(name) is None)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make test-integrations")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "False" not in result.stdout

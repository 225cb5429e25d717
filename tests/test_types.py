"""Types that users meet: pyright finds no error in the README's snippets. `make lint` runs it on the packages."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_snippets_of_the_readme(tmp_path):
    pytest.importorskip("pyright")
    for number, snippet in enumerate(SNIPPETS):
        (tmp_path / f"snippet_{number}.py").write_text(snippet)
    (tmp_path / "wrong.py").write_text("from grootv.layers import TreeSSM\n\nTreeSSM(dim='64')\n")
    config = {
        "extends": str(ROOT / "pyproject.toml"),
        "include": ["."],
        "exclude": [],
        "extraPaths": [str(ROOT), str(ROOT / "ops")],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--project", str(tmp_path), "--outputjson"]
    done = subprocess.run([*command, "--pythonpath", sys.executable], capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(SNIPPETS) + 1 > 5
    errors = [(Path(found["file"]).name, found["message"]) for found in report["generalDiagnostics"]]
    assert [error for error in errors if error[0] != "wrong.py"] == []
    assert errors, "pyright does not see grootv's types"

"""Whoever follows docs/add-a-scan.md literally gets a scan, a layer and a model that pass the tests of that page."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from documentation_helpers import blocks, run_example
from training_helpers import ROOT

PAGE = ROOT / "docs" / "add-a-scan.md"


def replace(path: Path, begin: str, end: str, text: str) -> None:
    """Put `text` in the place of what begins with `begin` and ends with the first `end` after it."""
    source = path.read_text()
    start = source.index(begin)
    stop = source.index(end, start) + len(end)
    path.write_text(source[:start] + text + source[stop:])


def test_the_page_followed_literally(tmp_path: Path) -> None:
    for name in ("grootv", "tests", "pyproject.toml", "conftest.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    layers, models = tmp_path / "grootv/layers", tmp_path / "grootv/models"
    code = [block.code for block in blocks(PAGE, "python")]
    function, layer, exports, use, in_model, default_cfgs, registration, all_models, all_sizes, tests = code

    (names,) = (line for line in PAGE.read_text().split("`") if line.startswith("__all__ ="))
    replace(layers / "scans.py", "__all__ =", "]", names)
    with (layers / "scans.py").open("a") as file:
        file.write("\n\n" + function)
    (layers / "snake_ssm.py").write_text(layer)
    replace(layers / "__init__.py", "from .norms", "\n]\n", exports)
    replace(models / "grootv.py", "default_cfgs =", "\n)\n", default_cfgs)
    replace(models / "grootv.py", "from grootv.layers import", "import", "from grootv.layers import SnakeSSM,")
    with (models / "grootv.py").open("a") as file:
        file.write("\n\n" + registration)
    (tmp_path / "tests/models/test_snake_ssm.py").write_text(tests)
    replace(tmp_path / "tests/models/test_model_contract.py", "    assert lines == ", "\n", all_models)
    replace(tmp_path / "tests/openmmlab/test_backbone.py", '        ({"arch": "huge"}', "\n", all_sizes)

    result = run_example("".join(f"exec({code!r}, {{}})\n" for code in (use, in_model)), tmp_path, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    files = ("models/test_snake_ssm.py", "models/test_model_contract.py")
    names = "snake_ssm or registered_by_import"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names]
    command += [f"tests/{file}" for file in files]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout and " failed" not in result.stdout

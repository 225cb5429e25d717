"""Errors for missing and broken packages of OpenMMLab say what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

from dense_helpers import fake_package
from training_helpers import ROOT, environment, run_python

from grootv.openmmlab.dense.requirements import base_configs, require


def test_operations_that_do_not_load_are_named(tmp_path: Path) -> None:
    fake_package(tmp_path, "mmcv", _ext="raise ImportError('undefined symbol: _ZN3c10')")
    fake_package(tmp_path, "mmdet")
    result = run_python("from grootv.openmmlab import base_configs; base_configs('mmdet', 'a.py')", tmp_path)
    assert "mmcv's compiled operations do not load (undefined symbol: _ZN3c10)" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


def test_versions_that_do_not_fit_are_named(tmp_path: Path) -> None:
    fake_package(tmp_path, "mmcv")
    (tmp_path / "mmdet").mkdir()
    (tmp_path / "mmdet" / "__init__.py").write_text("assert False, 'MMCV==2.2.0 is used but incompatible'")
    result = run_python("from grootv.openmmlab import base_configs; base_configs('mmdet', 'a.py')", tmp_path)
    assert "mmdet is installed but does not import (MMCV==2.2.0 is used but incompatible)" in result.stderr
    assert 'pip install "grootv[openmmlab]"' in result.stderr


@pytest.mark.parametrize(
    ("missing", "task"), [("mmdet", "detection"), ("mmseg", "segmentation"), ("mmcv", "detection")]
)
def test_a_config_names_the_package_that_is_missing(missing: str, task: str) -> None:
    config = next((ROOT / "configs" / task).glob("*digits*.py"))
    code = f"""
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "{missing}" else find_spec(name, *args)
from mmengine.config import Config
Config.fromfile({str(config)!r})
"""
    result = run_python(code)
    assert f"ImportError: {missing} is not installed (onedl-{missing}" in result.stderr
    assert 'pip install "grootv[openmmlab]"' in result.stderr


def test_missing_mmengine_is_named() -> None:
    result = run_python("import sys; sys.modules['mmengine'] = None; import grootv.openmmlab")
    assert "needs mmengine" in result.stderr and "pip install" in result.stderr


def test_a_base_config_that_is_not_there() -> None:
    pytest.importorskip("mmdet")
    with pytest.raises(FileNotFoundError, match=r"mmdet comes without the config .*no_such\.py"):
        base_configs("mmdet", "_base_/no_such.py")
    require("mmdet")


def test_mmengine_missing_is_explained(tmp_path: Path) -> None:
    (tmp_path / "mmengine.py").write_text("raise ImportError('not here')")
    result = subprocess.run(
        [sys.executable, "-c", "import grootv.openmmlab"], env=environment(tmp_path), capture_output=True, text=True
    )
    assert "pip install 'grootv[train]'" in result.stderr
    alone = "import sys, grootv; assert not any(name.startswith('mm') for name in sys.modules if name[:3] != 'mma')"
    subprocess.run([sys.executable, "-c", alone], env={**environment(), **{"PATH": os.environ["PATH"]}}, check=True)

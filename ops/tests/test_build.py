"""What a build of the package says where it fails, and what its archives hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources of this package, without what a build left in it."""
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", "_C*", "_build.json")
    return Path(shutil.copytree(SOURCES, tmp_path / "ops", ignore=ignored))


def setup(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        env={**os.environ, "FORCE_CUDA": "0", **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def broken(sources: Path) -> Path:
    """Sources that do not compile."""
    for source in (sources / "csrc").rglob("*.cpp"):
        source.write_text("#error no good\n")
    return sources


def test_a_failed_build_says_why(broken):
    stale = [broken / "grootvl_ops" / f"_C_{part}.abi3.so" for part in ("cpu", "cuda", "autograd")]
    for library in stale:  # of an earlier build; those of CPU and CUDA could be loaded
        library.touch()
    done = setup(broken, "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert not any(library.exists() for library in stale)
    assert "GROOTVL_REQUIRE_COMPILED=1 makes this an error" in done.stderr
    errors = json.loads((broken / "grootvl_ops" / "_build.json").read_text())["errors"]
    assert errors.keys() == {"cpu", "autograd"}
    assert "error: #error no good" in errors["cpu"]
    report = subprocess.run(
        [sys.executable, "-m", "grootvl_ops"],
        cwd=broken,  # whose package comes first
        capture_output=True,
        text=True,
        check=True,
    )
    assert errors["cpu"] in report.stdout


def test_a_missing_compiler_is_named(sources):
    done = setup(sources, "build_ext", "--inplace", CXX="/nowhere/c++", CC="/nowhere/cc")
    assert done.returncode == 0, done.stderr
    errors = json.loads((sources / "grootvl_ops" / "_build.json").read_text())["errors"]
    assert "/nowhere/c++" in errors["cpu"]


def test_a_failed_build_can_be_an_error(broken):
    done = setup(broken, "build_ext", "--inplace", GROOTVL_REQUIRE_COMPILED="1")
    assert done.returncode != 0
    assert "error: #error no good" in done.stdout + done.stderr


def test_cuda_without_its_sources_is_an_error(sources):
    shutil.rmtree(sources / "csrc" / "cuda")
    done = setup(sources, "build_ext", "--inplace", FORCE_CUDA="1")
    assert done.returncode != 0
    assert "FORCE_CUDA=1, but the CUDA part cannot be built" in done.stderr
    assert "'CUDA sources': 0" in done.stderr


def test_a_source_archive_is_complete(sources):
    done = setup(sources, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (sources / "dist").iterdir()
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    needed = {str(path.relative_to(SOURCES)) for path in (SOURCES / "csrc").rglob("*") if path.is_file()}
    needed |= {"LICENSE", "setup.py", "pyproject.toml", "build_backend.py", "grootvl_ops/py.typed"}
    assert needed <= held
    assert not [name for name in held if name.endswith((".so", "_build.json"))]

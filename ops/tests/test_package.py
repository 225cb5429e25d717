"""What the package says of itself, and how it behaves where its compiled library is missing or does not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grootvl_ops
from grootvl_ops import _loading

PACKAGE = Path(grootvl_ops.__file__).parent
REBUILD = "pip install --force-reinstall --no-deps ./ops"

PROBE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, grootvl_ops
    results = []
    for _ in range(2):
        features = torch.arange(36.0, dtype=torch.float64).sin().view(1, 3, 4, 3).requires_grad_()
        tree = grootvl_ops.build_tree(features)
        x, ones = features.flatten(1, 2), torch.ones(3, dtype=torch.float64)
        h = grootvl_ops.tree_scan(x, torch.full_like(x, 0.5), tree)
        h = grootvl_ops.selective_scan(h, x, torch.eye(3).double(), ones, ones, x[..., 0], tree)
        h = grootvl_ops.gated_norm(h, x, x, x[..., 1], *[ones] * 5)
        h = grootvl_ops.layer_norm(h, ones, ones)
        (gradient,) = torch.autograd.grad(h.exp().sum(), features, create_graph=True)
        results.append([tree.parent.tolist(), h.flatten().tolist(), gradient.flatten().tolist()])
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        refused = str(error)
said = [str(w.message) for w in caught if "grootvl_ops" in str(w.message)]
found = {"file": grootvl_ops.__file__, "backend": grootvl_ops.backend()}
print(json.dumps({**found, "said": said, "results": results, "refused": refused}))
"""


def run_python(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=path, capture_output=True, text=True, timeout=120
    )


def probe(path: Path) -> dict:
    done = run_python("-c", PROBE, path=path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The Python files of the package alone, in a directory that comes first on the path."""
    compiled = shutil.ignore_patterns("_C*", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "grootvl_ops", ignore=compiled)
    return tmp_path / "grootvl_ops"


@pytest.fixture(scope="module")
def as_installed() -> dict:
    return probe(PACKAGE.parent)


def check_reference_runs(as_installed: dict, package: Path, *named: str) -> None:
    found = probe(package.parent)
    assert Path(found["file"]).parent == package
    assert found["backend"] == "reference"
    assert len(found["said"]) == 1, found["said"]
    for part in (REBUILD, *named):
        assert part in found["said"][0]
    assert "can be differentiated once only: it has no second derivatives" in found["refused"]
    check_results(as_installed, found)


def check_results(as_installed: dict, found: dict) -> None:
    for result in found["results"]:
        for name, value, target in zip(("parent", "h", "gradient"), result, as_installed["results"][0], strict=True):
            torch.testing.assert_close(torch.tensor(value), torch.tensor(target), msg=name)


def test_no_compiled_library(as_installed, copied):
    check_reference_runs(as_installed, copied, "without its compiled library")


def test_gradients_of_another_torch(as_installed, copied):
    """The kernels run under every release of PyTorch, and the gradients are those in Python."""
    if grootvl_ops.backend() != "compiled":
        pytest.skip("no compiled kernels")
    for library in PACKAGE.glob("_C_*"):
        shutil.copy(library, copied)
    record = json.loads((PACKAGE / "_build.json").read_text())
    (copied / "_build.json").write_text(json.dumps({**record, "torch": "1.0.0"}))
    found = probe(copied.parent)
    assert (found["backend"], found["said"]) == ("compiled", [])
    check_results(as_installed, found)
    report = run_python("-m", "grootvl_ops", path=copied.parent).stdout
    assert "built against torch 1.0.0" in report


@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
def test_kernels_of_another_cuda(copied):
    for library in PACKAGE.glob("_C_cpu*"):
        shutil.copy(library, copied)
    (copied / "_C_cuda.abi3.so").touch()
    (copied / "_build.json").write_text(json.dumps({"cuda": "1.0"}))
    report = run_python("-m", "grootvl_ops", path=copied.parent).stdout
    assert f"built for CUDA 1.0, torch for CUDA {torch.version.cuda}" in report or grootvl_ops.backend() == "reference"


def test_the_error_of_the_build_is_quoted(as_installed, copied):
    (copied / "_build.json").write_text(json.dumps({"errors": {"cpu": "tree.cpp:1:1: error: no such file"}}))
    check_reference_runs(as_installed, copied, "tree.cpp:1:1: error: no such file")


@pytest.mark.parametrize("content", [b"", b"\x7fELF and then nothing"], ids=["empty", "cut"])
def test_damaged_library(as_installed, copied, content):
    (copied / "_C_cpu.abi3.so").write_bytes(content)
    check_reference_runs(as_installed, copied, "_C_cpu.abi3.so", "could not be loaded")


@pytest.mark.parametrize("content", ['{"torch": "2', "[]", '{"errors": 1}'], ids=["cut", "list", "number"])
def test_damaged_record(as_installed, copied, content):
    (copied / "_build.json").write_text(content)
    check_reference_runs(as_installed, copied, "without its compiled library")


def test_compiled_library_runs_silently(as_installed):
    if grootvl_ops.backend() != "compiled":
        pytest.skip("no compiled kernels")
    assert as_installed["backend"] == "compiled"
    assert as_installed["said"] == []


def test_report_of_what_is_in_use():
    done = run_python("-m", "grootvl_ops", path=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert grootvl_ops.backend("cpu") in done.stdout


def test_report_without_a_library(copied):
    done = run_python("-m", "grootvl_ops", path=copied.parent)
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert "reference" in done.stdout
    assert REBUILD in done.stdout + done.stderr


def test_backend_names():
    assert grootvl_ops.backend("cpu") in ("compiled", "reference")
    assert grootvl_ops.backend(torch.device("cpu")) == grootvl_ops.backend()
    assert grootvl_ops.backend("meta") == "reference"


def test_public_names():
    assert set(grootvl_ops.__all__) <= set(dir(grootvl_ops))
    assert all(getattr(grootvl_ops, name).__doc__ for name in grootvl_ops.__all__ if not name.isupper())


def test_import_is_light():
    """Nothing but torch and the standard library; warnings are for those who use the reference, not for importers."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import warnings; warnings.simplefilter('error')\n"
        "import grootvl_ops\n"
        "print({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    done = run_python("-c", code, path=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) <= {"torch", "grootvl_ops"}


SYMBOLS_OF = {
    "PyTorch's stable ABI": r"(aoti_)?torch_\w+",
    "the CUDA runtime": r"(__)?cuda\w+(@libcudart\.so\.\d+)?",
    "C and C++": r"\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ZNK?St\w+|__gmon_start__|_ITM_\w+",
}


@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_the_kernels_need_the_stable_abi_alone(part):
    file = _loading.library_file(part)
    if file is None or not shutil.which("nm"):
        pytest.skip(f"no compiled library {part}, or no nm")
    listed = subprocess.run(["nm", "-D", "--undefined-only", file], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1] for line in listed.splitlines()}
    assert any(symbol.startswith("torch_") for symbol in symbols)
    assert [s for s in sorted(symbols) if not any(re.fullmatch(p, s) for p in SYMBOLS_OF.values())] == []

"""A wheel of the operations as a kernel for the Hub, which the package `kernels` loads."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import grootvl_ops

ROOT = Path(__file__).parents[2]

LOAD = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu", trust_remote_code=True)
print(kernel.__file__, kernel.backend(), kernel.build_tree(torch.rand(1, 4, 4, 3)).parent.shape)
"""


def test_a_wheel_is_a_kernel(tmp_path):
    pytest.importorskip("kernels")
    if grootvl_ops.backend() != "compiled":
        pytest.skip("no compiled kernels")
    package = Path(grootvl_ops.__file__).parent
    wheel, folder = tmp_path / "grootvl_ops-0.1.0-x.whl", tmp_path / "kernel"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("grootvl_ops/", "")  # as auditwheel does it
        for file in (*package.rglob("*.py"), *package.glob("_C_*"), package / "_build.json"):
            content.write(file, Path("grootvl_ops", file.relative_to(package)))
    subprocess.run([sys.executable, ROOT / "ops" / "hub_kernel.py", wheel, folder], check=True)
    cuda = json.loads((package / "_build.json").read_text())["cuda"]
    assert len(list((folder / "build").iterdir())) == (2 if cuda else 1)
    # Outside of the folders from which `grootvl_ops` can be imported.
    done = subprocess.run([sys.executable, "-c", LOAD, folder], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, backend, shape = done.stdout.split(maxsplit=2)
    assert Path(file).is_relative_to(folder)
    assert (backend, shape.strip()) == ("compiled", "torch.Size([1, 16])")

"""timm's own tests of every model, on the models of this package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fetch_timm_suite import SUITE

TESTS = Path(__file__).parent
# What the file asks of every model; the rest of it is about particular models of timm.
GENERAL = 10 * 2  # for two families


@pytest.mark.skipif(
    not SUITE.exists(), reason=f"timm's tests are not in {SUITE}: python tests/models/fetch_timm_suite.py"
)
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_timm_suite(device):
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TORCH_DEVICE": device, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("GITHUB_ACTIONS", None)  # timm leaves tests out there
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "timm_suite_plugin", "-p", "no:cacheprovider"]
    command += ["-q", "-W", "ignore", "-k", "grootv_ or vmamba_", str(SUITE)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert passed >= GENERAL and "skipped" not in result.stdout.splitlines()[-1], result.stdout[-2000:]

"""The experiment of these tests and its unbroken run."""

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

from cluster_helpers import free_port, run_environment, write_experiment
from training_helpers import ROOT


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config, beside its data."""
    return write_experiment(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def unbroken(config: Path) -> Path:
    """Work directory of a run of two processes on one machine that nothing disturbed."""
    work_dir = config.parent / "unbroken"
    subprocess.run(
        [ROOT / "tools/dist_train.sh", config, "2", "--work-dir", work_dir],
        env={**run_environment(config), "PORT": str(free_port())},
        check=True,
        timeout=120,
    )
    return work_dir

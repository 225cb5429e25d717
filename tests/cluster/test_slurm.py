"""Slurm on this machine: its daemons in a temporary folder, with their own configuration, ports and state."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from getpass import getuser
from pathlib import Path

import pytest
from cluster_helpers import (
    assert_equal_ends,
    free_port,
    missing_programs,
    run_environment,
    wait_for,
    wait_for_pause,
)
from training_helpers import ROOT

pytestmark = pytest.mark.slow

PROGRAMS = "munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
KillWait=30
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=cpu Nodes=localhost Default=YES State=UP
SlurmdParameters=config_overrides
"""


def slurm(env: dict[str, str], *command: object) -> str:
    result = subprocess.run([*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, f"{command}: {result.stdout[-6000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def slurm_conf() -> Iterator[str]:
    """Path of the configuration of a cluster of one node with two CPUs, whose daemons run."""
    missing = missing_programs(*PROGRAMS)
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (Debian: slurm-wlm and munge)")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short, since the path of a socket has at most 107 characters
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    conf = folder / "slurm.conf"
    conf.write_text(
        CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            user=getuser(),
            controller_port=free_port(),
            node_port=free_port(),
        )
    )
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    env = {**os.environ, "PATH": path, "SLURM_CONF": str(conf)}
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file", "log-file")]
    daemons = [
        ["munged", "--foreground", "--force", *munge, f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for command in daemons:
            with open(folder / f"{command[0]}.out", "w") as log:
                process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            if command[0] == "munged":
                wait_for((folder / "munge.socket").exists, "munge.socket", 20)

        def is_idle() -> bool:
            state = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=env, capture_output=True, text=True)
            return state.stdout.strip() == "idle"

        wait_for(is_idle, f"node that is idle: {(folder / 'slurmd.out').read_text()}", 60)
        yield str(conf)
        subprocess.run(["scancel", "--user", getuser()], env=env)
        wait_for(is_idle, "end of the jobs", 60)


def slurm_environment(slurm_conf: str, **settings: str) -> dict[str, str]:
    return {"SLURM_CONF": slurm_conf, "GPUS": "2", "CPUS_PER_TASK": "1", "GRES": "none", **settings}


def test_two_tasks(slurm_conf: str, config: Path, unbroken: Path, tmp_path: Path) -> None:
    env = {**run_environment(config), **slurm_environment(slurm_conf)}
    log = slurm(env, ROOT / "tools/slurm_train.sh", "cpu", "two", config, tmp_path / "work")
    assert "Distributed launcher: slurm" in log and "GPU number: 2" in log
    assert_equal_ends(unbroken, tmp_path / "work")


def test_a_requeued_job(slurm_conf: str, config: Path, unbroken: Path, tmp_path: Path) -> None:
    env = {**run_environment(config, tmp_path / "pause", 8), **slurm_environment(slurm_conf)}
    log = tmp_path / "log"
    command = f"{ROOT}/tools/slurm_train.sh cpu requeued {config} {tmp_path}/work --resume"
    options = "--parsable", "--requeue", "--ntasks=2", "--open-mode=append", f"--output={log}"
    job = slurm(env, "sbatch", *options, f"--wrap={command}").strip()

    def state() -> str:
        return slurm(env, "squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").strip()

    wait_for_pause(tmp_path / "pause")
    slurm(env, "scontrol", "requeue", job)
    wait_for(lambda: state() == "PENDING", "requeued job", 60)
    first = log.read_text()
    assert "CANCELLED" in first and "DUE TO JOB REQUEUE" in first
    assert "the run ends after iteration 8 with exit code 143" in first
    assert "Exited with exit code 143" in first
    assert (tmp_path / "work/epoch_1_iter_8.pth").exists()

    slurm(env, "scontrol", "update", f"jobid={job}", "starttime=now")  # Slurm would wait for two minutes
    wait_for(lambda: state() == "COMPLETED", "end of the job")
    again = log.read_text()[len(first) :]
    assert "resumed epoch: 1, iter: 8" in again and "2 batches of epoch 2 are done and left out" in again
    assert_equal_ends(unbroken, tmp_path / "work")

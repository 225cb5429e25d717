"""Two machines: two network namespaces, which a pair of virtual Ethernet devices joins."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_helpers import (
    assert_equal_ends,
    finish,
    free_port,
    missing_programs,
    run_environment,
    wait_for_pause,
)
from training_helpers import ROOT

pytestmark = pytest.mark.slow

ADDRESSES = "10.213.7.1", "10.213.7.2"


def ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, f"ip {' '.join(arguments)}: {result.stdout}"


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, str]]:
    """Names of the two namespaces; in each the device is called `veth0`."""
    if missing_programs("ip"):
        pytest.skip("needs the program ip (Debian: iproute2)")
    names = f"grootv-{os.getpid()}-0", f"grootv-{os.getpid()}-1"
    probe = subprocess.run(["ip", "netns", "add", names[0]], stderr=subprocess.PIPE, text=True)
    if probe.returncode:
        pytest.skip(f"needs the permission to add network namespaces: {probe.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


class Run:
    """A run of one process on each of the two nodes."""

    def __init__(self, nodes: tuple[str, str], config: Path, work_dir: Path, env: dict[str, str], *options: str):
        port = str(free_port())
        self.logs = [work_dir.with_name(f"{work_dir.name}_{rank}.log") for rank in range(2)]
        self.processes = []
        for rank, (name, log) in enumerate(zip(nodes, self.logs, strict=True)):
            settings = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": ADDRESSES[0], "PORT": port}
            with open(log, "w") as file:
                process = subprocess.Popen(
                    ["ip", "netns", "exec", name, ROOT / "tools/dist_train.sh", config, "1"]
                    + ["--work-dir", str(work_dir), *options],
                    env={**env, **settings, "GLOO_SOCKET_IFNAME": "veth0"},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            self.processes.append(process)

    def finish(self, code: int | None = 0) -> list[str]:
        """The logs after the end of both."""
        return [finish(process, code, log) for process, log in zip(self.processes, self.logs, strict=True)]

    def stop(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_a_killed_node(nodes: tuple[str, str], config: Path, unbroken: Path, tmp_path: Path) -> None:
    run = Run(nodes, config, tmp_path / "work", run_environment(config, tmp_path / "pause", 8))
    try:
        workers = wait_for_pause(tmp_path / "pause")
        os.killpg(run.processes[1].pid, signal.SIGKILL)
        os.kill(workers[1], signal.SIGKILL)  # torchrun gives its workers a session of their own
        (tmp_path / "pause/go").touch()
        run.finish(code=None)
    finally:
        run.stop()
    assert not (tmp_path / "work/epoch_2.pth").exists()

    again = Run(nodes, config, tmp_path / "work", run_environment(config), "--resume")
    try:
        assert "resumed epoch: 1, iter: 6" in again.finish()[0]
    finally:
        again.stop()
    assert_equal_ends(unbroken, tmp_path / "work")


def test_sigterm_on_one_node_ends_both_with_a_checkpoint(
    nodes: tuple[str, str], config: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = Run(nodes, config, tmp_path / "work", run_environment(config, tmp_path / "pause", 8))
    try:
        wait_for_pause(tmp_path / "pause")
        run.processes[1].terminate()
        logs = run.finish(code=1)
    finally:
        run.stop()
    assert "the run ends after iteration 8 with exit code 143" in logs[0]
    assert "exitcode  : 143" in logs[0]  # torchrun's report: its own exit code is 1
    assert (tmp_path / "work/epoch_1_iter_8.pth").exists()

    again = Run(nodes, config, tmp_path / "work", run_environment(config), "--resume")
    try:
        log = again.finish()[0]
    finally:
        again.stop()
    assert "resumed epoch: 1, iter: 8" in log and "2 batches of epoch 2 are done and left out" in log
    assert_equal_ends(unbroken, tmp_path / "work")
    assert not (tmp_path / "work/epoch_1_iter_8.pth").exists()

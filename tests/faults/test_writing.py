"""Writing checkpoints: several writers, full disks, and the lock on a work directory."""

import errno
import fcntl
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import torch
from training_helpers import environment, run_python, write_config, write_images

from grootv.openmmlab.runtime import work_dir_lock
from grootv.openmmlab.runtime.checkpoints import AtomicCheckpointHook, AtomicLocalBackend, is_intact
from grootv.openmmlab.runtime.work_dir_lock import WorkDirInUseError, WorkDirLock


def saved(value: float) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": torch.full((50_000,), value)}, buffer)
    return buffer.getvalue()


def write_often(path: Path, content: bytes, times: int) -> None:
    for _ in range(times):
        AtomicLocalBackend().put(content, path)


def test_two_writers_of_one_name_never_show_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pth"
    write_often(path, saved(0), 1)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, saved(value), 60)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert is_intact(path)
        reads += 1
    assert reads > 3 and [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["epoch_1.pth"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_the_system_refuses_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pth"
    AtomicLocalBackend().put(b"good", path)
    with file_size_limit(100_000), pytest.raises(OSError, match=re.escape(str(path))) as error:
        AtomicLocalBackend().put(bytes(200_000), path)
    assert error.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["epoch_1.pth"] and path.read_bytes() == b"good"


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'epoch_1.pth'}'"):
        AtomicLocalBackend().put(b"new", tmp_path / "epoch_1.pth")
    assert os.listdir(tmp_path) == []


def test_files_get_the_permissions_of_the_process(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        AtomicLocalBackend().put(b"new", tmp_path / "epoch_1.pth")
    finally:
        os.umask(previous)
    assert (tmp_path / "epoch_1.pth").stat().st_mode & 0o777 == 0o640


def test_unfinished_files_are_removed_and_folders_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    (tmp_path / ".epoch_1.pth.0123.tmp").write_bytes(b"half")
    (tmp_path / ".epoch_2.pth.x.tmp").mkdir()
    (tmp_path / "x.pth.tmp").mkdir()
    monkeypatch.setattr("mmengine.hooks.CheckpointHook.before_train", lambda self, runner: None)
    hook = AtomicCheckpointHook()
    hook.out_dir = str(tmp_path)
    hook.before_train(SimpleNamespace(rank=0, val_loop=None, train_loop=SimpleNamespace(iter=0, max_iters=1)))
    assert sorted(os.listdir(tmp_path)) == [".epoch_2.pth.x.tmp", "x.pth.tmp"]


HOLD = """
import sys, time
from grootv.openmmlab.runtime.work_dir_lock import WorkDirLock
lock = WorkDirLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_dir_lock, "_PATIENCE", 0.3)
    monkeypatch.setattr(work_dir_lock, "_BEAT", 0.1)
    monkeypatch.setattr(work_dir_lock, "_SILENCE", 1.0)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.mark.usefixtures("impatient")
def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path, holder: subprocess.Popen) -> None:
    with pytest.raises(WorkDirInUseError) as error:
        WorkDirLock(tmp_path).acquire()
    message = str(error.value)
    assert f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}, since 20" in message
    assert f"kill {holder.pid}" in message and "--work-dir" in message and f"remove {tmp_path / '.lock'}" in message
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = WorkDirLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.usefixtures("impatient")
def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    first, second = WorkDirLock(tmp_path), WorkDirLock(tmp_path)
    first.acquire()
    with pytest.raises(WorkDirInUseError, match="another run of this process"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    second.release()


def elsewhere(path: Path, **more: object) -> None:
    path.write_text(json.dumps({"host": "node7", "pid": 12, "since": "2020-01-01 00:00:00", **more}))


@pytest.mark.usefixtures("impatient")
def test_a_silent_holder_on_another_machine_is_dead(tmp_path: Path) -> None:
    elsewhere(tmp_path / ".lock")
    lock = WorkDirLock(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.usefixtures("impatient")
def test_a_holder_on_another_machine_that_shows_life_is_respected(tmp_path: Path) -> None:
    """File systems that do not pass locks on: the counter in the file is all there is to see."""
    elsewhere(tmp_path / ".lock")
    timer = threading.Timer(0.3, elsewhere, (tmp_path / ".lock",), {"beat": 1})
    timer.start()
    with pytest.raises(WorkDirInUseError, match=r"in use by process 12 on node7, since 2020.*on node7: kill 12"):
        WorkDirLock(tmp_path).acquire()
    timer.join()


@pytest.mark.usefixtures("impatient")
def test_the_holder_shows_life(tmp_path: Path) -> None:
    lock = WorkDirLock(tmp_path)
    lock.acquire()
    time.sleep(0.5)
    content = (tmp_path / ".lock").read_text()
    assert json.loads(content)["beat"] >= 1
    lock.release()
    assert (tmp_path / ".lock").read_text() == ""


@pytest.mark.usefixtures("impatient")
def test_without_locks_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    for pid, alive in ((os.getppid(), True), (2**22 + 1, False)):
        content = {"host": socket.gethostname(), "pid": pid, "since": "2020-01-01 00:00:00"}
        (tmp_path / ".lock").write_text(json.dumps(content))
        lock = WorkDirLock(tmp_path)
        if alive:
            with pytest.raises(WorkDirInUseError, match=f"process {pid}"):
                lock.acquire()
        else:
            lock.acquire()
            lock.release()


def test_a_run_locks_its_folder(tmp_path: Path, holder: subprocess.Popen) -> None:
    write_images(tmp_path / "data", "train", 4, seed=0)
    write_images(tmp_path / "data", "val", 2, seed=1)
    config = write_config(tmp_path, tmp_path / "data", "visualizer = dict(type='Visualizer')")
    code = f"""
from mmengine.config import Config
from grootv.openmmlab.runtime import work_dir_lock
from grootv.openmmlab.runtime.runner import Runner
work_dir_lock._PATIENCE = 0.1
cfg = Config.fromfile("{config}")
cfg.work_dir = "{tmp_path}"
Runner.from_cfg(cfg).train()
"""
    result = run_python(code)
    assert result.returncode == 1
    assert f"WorkDirInUseError: {tmp_path} is in use by process {holder.pid}" in result.stderr
    assert "Epoch(train)" not in result.stdout

"""A lock on a work directory, so that two runs do not write the same checkpoints."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

__all__ = ["WorkDirInUseError", "WorkDirLock"]

# Seconds between two signs of life, and how long a process on another machine may give none.
_BEAT = 10.0
_SILENCE = 3 * _BEAT
# A process that was killed a moment ago may take some seconds to end.
_PATIENCE = 10.0

_held: set[Path] = set()


class WorkDirInUseError(RuntimeError):
    """Another run trains in the work directory."""


class WorkDirLock:
    """Exclusive use of a work directory, by a lock of the operating system on the file `.lock` in it.

    The operating system releases the lock when the process ends, however it ends. Not all file systems pass locks to
    other machines. The file therefore names its holder, which changes a counter in it every ten seconds: the holder on
    another machine counts as dead when the counter stands still for half a minute.

    Args:
        folder: The work directory.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).absolute() / ".lock"
        self._file: int | None = None
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock; wait some seconds if it is held, because its holder may be about to end.

        Raises:
            WorkDirInUseError: another run holds it. The message names the host, the process, since when, and how to
                go on.
        """
        if self.path in _held:
            raise WorkDirInUseError(f"{self.path.parent} is in use by another run of this process")
        holder = self._holder()
        if holder and holder["host"] != socket.gethostname():
            self._wait_for_silence(holder)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock(file)
        except BaseException:
            os.close(file)
            raise
        _held.add(self.path)
        self._file = file
        self._stop.clear()
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        content = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        self._write(content)
        self._beats = threading.Thread(target=self._beat, args=(content,), daemon=True)
        self._beats.start()

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._file is None:
            return
        self._stop.set()
        self._beats.join()
        os.ftruncate(self._file, 0)
        os.close(self._file)
        self._file = None
        _held.discard(self.path)

    def _lock(self, file: int) -> None:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):
                if time.monotonic() > end:
                    raise WorkDirInUseError(self._message(_parse(os.pread(file, 4096, 0)))) from None
            except OSError:  # no locks on this file system
                holder = _parse(os.pread(file, 4096, 0))
                if holder is None or holder["host"] != socket.gethostname() or not _is_alive(holder["pid"]):
                    return
                raise WorkDirInUseError(self._message(holder)) from None
            time.sleep(0.2)

    def _wait_for_silence(self, holder: dict[str, Any]) -> None:
        print_log(
            f"{self.path.parent} was in use by process {holder['pid']} on {holder['host']}, which did not end by "
            f"itself. Waiting up to {_SILENCE:g} seconds to see whether it runs.",
            logger="current",
            level=logging.WARNING,
        )
        end = time.monotonic() + _SILENCE
        while time.monotonic() < end:
            time.sleep(min(1.0, _BEAT))
            now = self._holder()
            if now is None:
                return
            if now != holder:
                raise WorkDirInUseError(self._message(now))

    def _holder(self) -> dict[str, Any] | None:
        try:
            return _parse(self.path.read_bytes())
        except FileNotFoundError:
            return None

    def _write(self, content: dict[str, Any]) -> None:
        # One write of constant length: a reader sees the content before it or after it.
        os.pwrite(self._file, json.dumps(content).ljust(512).encode(), 0)
        os.fsync(self._file)

    def _beat(self, content: dict[str, Any]) -> None:
        count = 0
        while not self._stop.wait(_BEAT):
            count += 1
            try:
                self._write({**content, "beat": count})
            except OSError as error:
                print_log(f"{self.path} could not be written: {error}", logger="current", level=logging.WARNING)

    def _message(self, holder: dict[str, Any] | None) -> str:
        folder = self.path.parent
        who = "process {pid} on {host}, since {since}".format(**holder) if holder else "another process"
        how_to_end = f"end it (on {holder['host']}: kill {holder['pid']})" if holder else "end it"
        return (
            f"{folder} is in use by {who}. Two runs in one folder would overwrite each other's checkpoints. Wait until "
            f"it has ended, {how_to_end}, or choose another folder by --work-dir. "
            f"If you are sure that no such process runs, remove {self.path}."
        )


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(content)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys() else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True

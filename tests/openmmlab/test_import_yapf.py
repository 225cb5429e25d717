"""Processes that start together in a new environment do not fail on yapf's half-written grammar."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

# The files of a first import are emptied, as another process has them that has just begun to write.
PROGRAM = """
import sys, threading, time
from pathlib import Path
files = list(Path(sys.argv[1]).rglob("*.pickle"))
contents = [file.read_bytes() for file in files]
assert files
for file in files:
    file.write_bytes(b"")
def finish():
    time.sleep(1)
    for file, content in zip(files, contents):
        file.write_bytes(content)
from grootv.openmmlab.runtime.command_line import import_yapf
assert "yapf" not in sys.modules
if sys.argv[2] == "finish":
    threading.Thread(target=finish).start()
import_yapf(seconds=8 if sys.argv[2] == "finish" else 0.3)
import yapf
print(yapf.yapf_api.FormatCode("a=1")[0])
"""


def run(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_file_that_another_process_writes_is_waited_for(tmp_path: Path) -> None:
    assert run(tmp_path, "import yapf").returncode == 0
    done = run(tmp_path, PROGRAM, str(tmp_path), "finish")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "a = 1"


def test_a_file_that_stays_damaged_is_an_error(tmp_path: Path) -> None:
    assert run(tmp_path, "import yapf").returncode == 0
    done = run(tmp_path, PROGRAM, str(tmp_path), "leave")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("EOFError")

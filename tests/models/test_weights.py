"""`python -m grootv.weights` against a stand-in for the sources (`drive.py`)."""

import fcntl
import hashlib
import os
import pickle
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gdown")
if shutil.which("openssl") is None:
    pytest.skip("needs openssl, which makes the stand-in's certificate", allow_module_level=True)

import timm
import torch
from drive import QUOTA, SIGN_IN, Source

from grootv.models.released import FOLDER, RELEASES, Release
from grootv.weights import FetchError, check, fetch, main

ROOT = Path(__file__).parents[2]
DRIVE = Release("GrootV", "grootv_nano.pth", "https://drive.google.com/file/d/1abcDEF-_ghiJKL/view")
PLAIN = Release("GrootV", "grootv_nano.pth", "https://weights.example/releases/nano.pth")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file as the published training script writes it: averaged weights, a node of yacs, NumPy's accuracies."""
    config = types.ModuleType("yacs.config")
    config.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    node = config.CfgNode(MODEL=config.CfgNode(NAME="nano"))
    node.__dict__["__immutable__"] = True
    content = {
        "model": timm.create_model("grootv_nano").state_dict(),
        "model_ema": timm.create_model("grootv_nano").state_dict(),
        "max_accuracy": np.float64(83.4),
        "epoch": 299,
        "config": node,
    }
    path = tmp_path_factory.mktemp("released") / "ckpt.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", config)
        torch.save(content, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    with Source(tmp_path_factory.mktemp("server")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def source(server: Source, checkpoint: bytes, monkeypatch: pytest.MonkeyPatch) -> Source:
    server.content, server.page, server.cuts, server.ranges, server.tag = checkpoint, None, [], True, None
    server.log.clear()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)  # gdown's delay before it tries again
    monkeypatch.setitem(RELEASES, "grootv_nano", DRIVE)
    return server


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(".grootv_nano.pth.part/*.part"))


def start_of(asked: str) -> int:
    """The first byte of a Range header without an end."""
    return int(asked.removeprefix("bytes=").removesuffix("-"))


def assert_nothing_but(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def assert_complete(folder: Path, content: bytes) -> None:
    assert (folder / "grootv_nano.pth").read_bytes() == content
    record = f"{hashlib.sha256(content).hexdigest()}  grootv_nano.pth\n"
    assert (folder / "grootv_nano.pth.sha256").read_text() == record
    assert_nothing_but(folder, "grootv_nano.pth", "grootv_nano.pth.sha256")


def assert_tells_by_hand(error: Exception, folder: Path, release: Release = DRIVE) -> None:
    assert f"open {release.url} in a browser, save the file as {folder / release.file}" in str(error)


def test_the_configs_look_where_the_files_get() -> None:
    for name, release in RELEASES.items():
        config = runpy.run_path(str(ROOT / "configs" / "_base_" / f"{name}.py"))
        assert config["backbone"]["init_cfg"]["checkpoint"] == f"{FOLDER}/{release.file}"
        assert timm.is_model(name)


def test_behind_the_confirmation_page(source: Source, checkpoint: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    weights = fetch("grootv_nano", folder)
    assert weights.fetched
    assert (weights.path, weights.size) == (folder / "grootv_nano.pth", len(checkpoint))
    assert weights.sha256 == hashlib.sha256(checkpoint).hexdigest()
    assert_complete(folder, checkpoint)
    assert [host for host, _, _ in source.log] == ["drive.google.com", "drive.usercontent.google.com"]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(weights.path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_from_a_plain_address(
    source: Source, checkpoint: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RELEASES, "grootv_nano", PLAIN)
    fetch("grootv_nano", tmp_path)
    assert_complete(tmp_path, checkpoint)


def test_a_good_file_is_kept(source: Source, checkpoint: bytes, tmp_path: Path) -> None:
    fetch("grootv_nano", tmp_path)
    source.log.clear()
    before = (tmp_path / "grootv_nano.pth").stat()
    weights = fetch("grootv_nano", tmp_path)
    after = weights.path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not weights.fetched
    assert weights.sha256 == hashlib.sha256(checkpoint).hexdigest()
    assert source.log == []


def test_a_file_saved_by_hand_is_checked_and_recorded(source: Source, checkpoint: bytes, tmp_path: Path) -> None:
    (tmp_path / "grootv_nano.pth").write_bytes(checkpoint)
    assert not fetch("grootv_nano", tmp_path).fetched
    assert_complete(tmp_path, checkpoint)
    assert source.log == []


def test_a_wrong_file_saved_by_hand_is_refused_and_left_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "grootv_nano.pth").write_text(QUOTA)
    with pytest.raises(FetchError, match=r"grootv_nano.pth exists, but it is a web page.* Remove or rename it"):
        fetch("grootv_nano", tmp_path)
    assert (tmp_path / "grootv_nano.pth").read_text() == QUOTA
    assert_nothing_but(tmp_path, "grootv_nano.pth")


def test_a_broken_transfer_continues_by_itself(source: Source, checkpoint: bytes, tmp_path: Path) -> None:
    source.cuts = [2_000_000, 3_000_000]
    fetch("grootv_nano", tmp_path)
    assert_complete(tmp_path, checkpoint)
    first, second, third = [asked for host, _, asked in source.log if host == "drive.usercontent.google.com"]
    assert first is None
    # What came since gdown last wrote is lost.
    assert 1_000_000 < start_of(second) <= 2_000_000 < 3_000_000 < start_of(third) <= 5_000_000


def test_the_next_call_continues_a_broken_transfer(source: Source, checkpoint: bytes, tmp_path: Path) -> None:
    source.cuts = [1_000_000] * 4
    with pytest.raises(FetchError, match="incomplete.* Run this command again to continue") as error:
        fetch("grootv_nano", tmp_path)
    assert_tells_by_hand(error.value, tmp_path)
    assert not (tmp_path / "grootv_nano.pth").exists()
    kept = held(tmp_path)
    assert 1_000_000 < kept <= 4_000_000
    source.page = (200, QUOTA)
    with pytest.raises(FetchError, match="Too many users"):
        fetch("grootv_nano", tmp_path)
    assert held(tmp_path) == kept
    source.page = None
    source.log.clear()
    fetch("grootv_nano", tmp_path)
    assert f"bytes={kept}-" in [asked for _, _, asked in source.log]
    assert_complete(tmp_path, checkpoint)


def test_a_killed_process_leaves_no_file_and_the_next_call_continues(
    source: Source, checkpoint: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.cuts, source.stalls = [2_000_000], True
    source.stalled.clear()
    source.released.clear()
    code = (
        "import sys; from grootv.models.released import RELEASES, Release; from grootv.weights import main;"
        f"RELEASES['grootv_nano'] = {DRIVE!r}; main(['grootv_nano', '--folder', sys.argv[1]])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        assert source.stalled.wait(120)
        for _ in range(100):
            if held(tmp_path) >= 1_000_000:
                break
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        source.stalls = False
        source.released.set()
    kept = held(tmp_path)
    assert 1_000_000 <= kept <= 2_000_000
    assert_nothing_but(tmp_path, ".grootv_nano.pth.part")
    fetch("grootv_nano", tmp_path)
    assert f"bytes={kept}-" in [asked for _, _, asked in source.log]
    assert_complete(tmp_path, checkpoint)


def test_a_source_without_ranges_starts_over(source: Source, checkpoint: bytes, tmp_path: Path) -> None:
    source.ranges, source.cuts = False, [1_000_000]
    with pytest.raises(FetchError, match="byte range"):
        fetch("grootv_nano", tmp_path)
    assert held(tmp_path) > 0
    fetch("grootv_nano", tmp_path)
    assert_complete(tmp_path, checkpoint)


@pytest.mark.parametrize("tagged", [False, True])
def test_a_file_that_changes_between_two_calls_is_not_mixed(
    source: Source, checkpoint: bytes, tmp_path: Path, tagged: bool
) -> None:
    source.tag = '"first"' if tagged else None
    source.cuts = [1_000_000] * 4
    with pytest.raises(FetchError):
        fetch("grootv_nano", tmp_path)
    torch.save({"model": timm.create_model("grootv_nano").state_dict(), "epoch": 1}, tmp_path / "other")
    source.content = (tmp_path / "other").read_bytes()
    (tmp_path / "other").unlink()
    source.tag = '"second"' if tagged else None
    fetch("grootv_nano", tmp_path)
    assert_complete(tmp_path, source.content)


def test_another_file_at_the_source_than_recorded(source: Source, checkpoint: bytes, tmp_path: Path) -> None:
    record = tmp_path / "grootv_nano.pth.sha256"
    record.write_text(f"{'0' * 64}  grootv_nano.pth\n")
    with pytest.raises(FetchError, match=f"has changed: its SHA-256 is .* says 0{{64}}.*remove {record}"):
        fetch("grootv_nano", tmp_path)
    assert_nothing_but(tmp_path, record.name)
    record.unlink()
    fetch("grootv_nano", tmp_path)
    assert_complete(tmp_path, checkpoint)


def test_a_file_changed_here_since_it_was_recorded(source: Source, checkpoint: bytes, tmp_path: Path) -> None:
    weights = fetch("grootv_nano", tmp_path)
    weights.path.write_bytes(checkpoint[:-1] + b"!")
    with pytest.raises(FetchError, match="has changed since its SHA-256 was recorded"):
        fetch("grootv_nano", tmp_path)
    assert weights.path.read_bytes() == checkpoint[:-1] + b"!"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ((200, QUOTA), "Google Drive answers with a page instead of the file: Too many users have viewed"),
        ((200, SIGN_IN), "Google Drive answers with a page instead of the file: Cannot retrieve the public link"),
        ((404, SIGN_IN), "Google Drive answers with a page instead of the file: Cannot retrieve the public link"),
    ],
)
def test_pages_of_google_drive(source: Source, tmp_path: Path, page: tuple[int, str], message: str) -> None:
    source.page = page
    with pytest.raises(FetchError, match=message) as error:
        fetch("grootv_nano", tmp_path)
    assert_tells_by_hand(error.value, tmp_path)
    assert_nothing_but(tmp_path)


@pytest.mark.parametrize(
    ("page", "message"), [((404, SIGN_IN), "404 Client Error"), ((200, SIGN_IN), "it is a web page, not a checkpoint")]
)
def test_pages_of_a_plain_address(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: tuple[int, str], message: str
) -> None:
    monkeypatch.setitem(RELEASES, "grootv_nano", PLAIN)
    source.page = page
    with pytest.raises(FetchError, match=message) as error:
        fetch("grootv_nano", tmp_path)
    assert_tells_by_hand(error.value, tmp_path, PLAIN)
    assert_nothing_but(tmp_path)


def test_without_a_network(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(FetchError, match="could not be fetched") as error:
        fetch("grootv_nano", tmp_path)
    assert_tells_by_hand(error.value, tmp_path)
    assert_nothing_but(tmp_path)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def saved(path: Path, content: object) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


def flip_a_weight(path: Path, content: bytes) -> bytes:
    """One changed bit in the largest record, which torch.load would not notice."""
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    at = largest.header_offset + largest.file_size // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


WRONG_FILES = {
    "truncated": (lambda path, content: content[:5_000_000], "it is incomplete or damaged .5000000 bytes"),
    "empty": (lambda path, content: b"", "it is empty"),
    "damaged": (flip_a_weight, "it is damaged: the checksum of its record .* is wrong"),
    "of another model": (
        lambda path, content: saved(path, timm.create_model("grootv_nano", depths=(1, 1, 3, 1)).state_dict()),
        "the checkpoint does not fit the model: .* missing: stages.2.blocks.3",
    ),
    "with another number of classes": (
        lambda path, content: saved(path, timm.create_model("grootv_nano", num_classes=10).state_dict()),
        "size mismatch for head.fc.weight",
    ),
    "of another project": (
        lambda path, content: saved(path, torch.nn.Linear(2, 2).state_dict()),
        "no GrootV or VMamba weights",
    ),
    "a tensor": (lambda path, content: saved(path, torch.ones(2)), "it holds a Tensor instead of a dict of weights"),
    "without weights": (lambda path, content: saved(path, {"model": {}}), "it holds no state dict"),
    "with code": (
        lambda path, content: saved(path, {"config": RunsCode()}),
        "it refers to posix.mkdir, which is not plain data",
    ),
    "a pickle": (lambda path, content: pickle.dumps({"model": {}}), "it is damaged, or no file of torch.save"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_what_is_not_the_file_is_refused(
    source: Source, checkpoint: bytes, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = WRONG_FILES[kind]
    source.content = make(tmp_path / "made", checkpoint)
    with pytest.raises(FetchError, match=f"does not give the weights of grootv_nano: .*{message}") as error:
        fetch("grootv_nano")
    assert_tells_by_hand(error.value, Path(FOLDER))
    assert_nothing_but(tmp_path / FOLDER)
    assert not (tmp_path / "executed").exists()


def test_one_process_at_a_time(source: Source, tmp_path: Path) -> None:
    (tmp_path / ".grootv_nano.pth.part").mkdir()
    with (tmp_path / ".grootv_nano.pth.part" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match="Another process is fetching .*grootv_nano.pth"):
            fetch("grootv_nano", tmp_path)
    assert source.log == []


def test_without_gdown(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(ImportError, match=r"pip install gdown, or pip install \"grootv\[weights\]\""):
        fetch("grootv_nano", tmp_path)
    assert_nothing_but(tmp_path)


def test_an_old_gdown(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdown.download", lambda url, output, quiet=False, resume=False: None)
    with pytest.raises(ImportError, match="needs gdown 6.3 or later"):
        fetch("grootv_nano", tmp_path)


def test_accuracies_of_an_older_numpy(checkpoint: bytes, tmp_path: Path) -> None:
    """NumPy 1 called the function that makes its scalars by another name."""
    (tmp_path / "new.pth").write_bytes(checkpoint)
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            record = new.read(name)
            if name.endswith("/data.pkl"):
                assert b"yacs.config\nCfgNode\n" in record
                record, changed = re.subn(rb"numpy\.(_core|core)\.multiarray\n", b"numpy.core.multiarray\n", record)
                assert changed
            old.writestr(name, record)
    check(tmp_path / "old.pth", "grootv_nano")


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name must be one of .*'grootv_tiny'.*, got 'grootv_huge'"):
        fetch("grootv_huge", tmp_path)


def test_the_command_line(source: Source, checkpoint: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["grootv_nano", "--folder", str(tmp_path)]
    digest = hashlib.sha256(checkpoint).hexdigest()
    for done in ("fetched", "already there"):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert f"{tmp_path / 'grootv_nano.pth'}: {len(checkpoint):,} bytes, {done}\n" in printed
        assert DRIVE.url in printed
        assert digest in printed


def test_the_command_tries_all_names(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["grootv_tiny", "grootv_nano", "--folder", str(tmp_path)]) == 1  # tiny gets nano's weights
    printed = capsys.readouterr()
    assert "error: " in printed.err
    assert "does not give the weights of grootv_tiny" in printed.err
    assert f"{tmp_path / 'grootv_nano.pth'}: " in printed.out
    assert not (tmp_path / "grootv_tiny.pth").exists()


def test_as_a_module(source: Source, tmp_path: Path) -> None:
    source.page = (200, QUOTA)
    command = [sys.executable, "-m", "grootv.weights", "grootv_tiny"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "Too many users have viewed or downloaded this file recently. To get it by hand" in result.stderr
    assert f"{RELEASES['grootv_tiny'].url} in a browser, save the file as checkpoints/grootv_tiny.pth" in result.stderr
    assert "Traceback" not in result.stderr


def test_timm_fetches_from_a_plain_address_itself(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = timm.create_model("grootv_nano").state_dict()
    source.content = saved(tmp_path / "made", {"model": state})
    model = timm.create_model(
        "grootv_nano", pretrained=True, pretrained_cfg_overlay={"url": PLAIN.url}, cache_dir=tmp_path
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_fetched_file_loads(source: Source, tmp_path: Path) -> None:
    state = timm.create_model("grootv_nano").state_dict()
    source.content = saved(tmp_path / "made", {"model": state})
    path = fetch("grootv_nano", tmp_path).path
    model = timm.create_model("grootv_nano", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

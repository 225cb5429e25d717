"""Every door refuses damaged files and files with code, says which file and why, and takes published ones."""

import contextlib
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmengine")

import mmengine
import torch
from doors import DOORS, FAULT_TRIES, FIRST, WEIGHT_DOORS, RunsCode, campaign, flip, make_model, save_as_published, yacs
from mmengine.dataset import BaseDataset
from mmengine.logging import HistoryBuffer, MMLogger
from model_helpers import OFFICIAL_NAMES, official_state
from training_helpers import run_tool, write_config, write_images

from grootv.models.checkpoint import official_to_own
from grootv.models.safe_loading import TRUST_VARIABLE, CheckpointError, read_checkpoint, read_pickle
from grootv.openmmlab.classification.datasets import ImageClassificationDataset
from grootv.openmmlab.runtime.checkpoints import find_intact_checkpoint


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, "train", 4, seed=0)
    write_images(folder, "val", 2, seed=1)
    return folder


@pytest.fixture
def folder(tmp_path: Path, images: Path) -> Path:
    (tmp_path / "data").symlink_to(images)
    return tmp_path


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, also by mmengine, whose loggers do not pass their messages on."""
    caplog.set_level(logging.INFO)
    yield caplog


def own_file(path: Path, **more: object) -> Path:
    torch.manual_seed(5)
    weights = make_model().state_dict()
    torch.save({"state_dict": weights, "meta": {}, **more}, path)
    return path


def official_names() -> dict[str, list[int]]:
    """Official names of the doors' model, with its shapes."""
    own = make_model().state_dict()
    names = {}
    for name in OFFICIAL_NAMES["grootv_tiny"]:
        if (shape := own.get(official_to_own(name))) is not None:
            names[name] = list(shape.shape)
    return names


@pytest.mark.parametrize("door", DOORS)
def test_a_good_file_gets_through(door: str, folder: Path) -> None:
    if door.startswith("resume"):
        pytest.skip("tests/openmmlab/test_training_faults.py resumes runs")
    path = own_file(folder / "good.pth")
    if door in ("detector", "segmentor"):
        model = make_model(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))
        weights = {f"backbone.model.{name}": value for name, value in model.state_dict().items()}
        torch.save({"state_dict": weights, "meta": {}}, path)
        expected = model.state_dict()[FIRST]
    else:
        expected = torch.load(path)["state_dict"][FIRST]
    assert torch.equal(DOORS[door](path, folder), expected)


@pytest.mark.parametrize("door", DOORS)
def test_code_in_a_file_does_not_run(door: str, folder: Path) -> None:
    path = own_file(folder / "planted.pth", optimizer=RunsCode(folder / "executed"))
    expected = folder / "work/epoch_1.pth" if door == "resume_found" else path
    message = f"checkpoint {expected} cannot be used: it refers to posix.mkdir, which is not plain data"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        DOORS[door](path, folder)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("door", [door for door in DOORS if door != "resume_found"])
def test_a_flipped_bit_is_noticed(door: str, folder: Path) -> None:
    path = own_file(folder / "damaged.pth")
    flip(path)
    with pytest.raises(RuntimeError, match=f"checkpoint {path} cannot be used: it is damaged: the checksum of its rec"):
        DOORS[door](path, folder)


def test_a_found_checkpoint_with_a_flipped_bit_is_skipped(tmp_path: Path) -> None:
    for number in (1, 2):
        own_file(tmp_path / f"epoch_{number}.pth")
    flip(tmp_path / "epoch_2.pth")
    assert find_intact_checkpoint(tmp_path) == str(tmp_path / "epoch_1.pth")


def legacy_file(path: Path) -> None:
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:100])


USELESS_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "text": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "it is damaged, or no file of torch.save .[0-9]+ bytes that begin with b'version https://'",
    ),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html>"), "it is a web page, not a checkpoint"),
    "truncated": (
        lambda path: (own_file(path), path.write_bytes(path.read_bytes()[:-100])),
        "it is incomplete or damaged",
    ),
    "truncated and old": (legacy_file, "it cannot be read as plain data"),
    "list": (lambda path: torch.save([torch.ones(1)], path), "it holds a list instead of a dict of weights"),
    "tensor": (lambda path: torch.save(torch.ones(1), path), "it holds a Tensor instead of a dict of weights"),
    "number": (lambda path: torch.save(3, path), "it holds an int instead of a dict of weights"),
    "folder": (lambda path: path.mkdir(), "it is a folder, not a file"),
    "pipe": (lambda path: os.mkfifo(path), "it is not a regular file"),
    "another model": (lambda path: torch.save({"conv.weight": torch.ones(1)}, path), ".*conv.weight"),
}


@pytest.mark.parametrize("kind", USELESS_FILES)
@pytest.mark.parametrize("door", ["timm_file", "timm_checkpoint_path", "init_cfg", "load_from"])
def test_messages_name_the_file(door: str, kind: str, folder: Path) -> None:
    path = folder / "useless.pth"
    make, message = USELESS_FILES[kind]
    make(path)
    with pytest.raises((RuntimeError, ValueError), match=message) as error:
        DOORS[door](path, folder)
    if (kind, door) != ("another model", "timm_checkpoint_path"):  # there timm loads into the model by itself
        assert str(path) in str(error.value)


@pytest.mark.parametrize("door", ["timm_file", "timm_checkpoint_path", "timm_loading", "init_cfg", "load_from"])
def test_a_missing_file_is_named(door: str, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"checkpoint {folder / 'nowhere.pth'} does not exist"):
        DOORS[door](folder / "nowhere.pth", folder)


@pytest.mark.parametrize("installed", [False, True], ids=["without yacs", "with yacs"])
@pytest.mark.parametrize("door", WEIGHT_DOORS)
def test_published_files_load_with_their_averaged_weights(
    door: str, installed: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = official_names()
    averaged = official_state(names)
    last = {name: torch.zeros_like(value) for name, value in averaged.items()}
    save_as_published(folder / "published.pth", last, {f"module.{name}": value for name, value in averaged.items()})
    messages: list[str] = []
    monkeypatch.setattr(logging.Logger, "handle", lambda self, record: messages.append(record.getMessage()))
    monkeypatch.setattr(MMLogger, "callHandlers", lambda self, record: messages.append(record.getMessage()))
    logging.getLogger("timm").setLevel(logging.INFO)
    with yacs() if installed else contextlib.nullcontext():
        loaded = DOORS[door](folder / "published.pth", folder)
    assert torch.equal(loaded, averaged["patch_embed.conv1.weight"])
    assert any("model_ema" in message for message in messages)


@pytest.mark.parametrize("averaged", [True, False])
def test_published_files_of_vmamba_are_read_as_data(averaged: bool, tmp_path: Path) -> None:
    """VMamba's names, among them the misspelt accuracy; its training script is the other one with yacs."""
    weights = {"patch_embed.0.weight": torch.ones(4, 3, 3, 3), "layers.0.blocks.0.op.A_logs": torch.ones(8, 1)}
    save_as_published(tmp_path / "vmamba.pth", weights, weights if averaged else None)
    content = read_checkpoint(tmp_path / "vmamba.pth")
    assert torch.equal(content["model"]["layers.0.blocks.0.op.A_logs"], torch.ones(8, 1))
    assert content["max_accuracy"] == 83.4 and type(content["max_accuracy"]) is float
    assert content["config"]["MODEL"] == {"NAME": "tiny", "DIMS": [8, 16], "PRETRAINED": None}
    assert ("model_ema" in content) is averaged


NUMPY = [
    np.float64(2.5),
    np.float32(0.1),
    np.int64(-3),
    np.bool_(True),
    np.str_("größe"),
    np.arange(6).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(3, dtype=">i4"),
    np.zeros((0, 4), np.float32),
]


@pytest.mark.parametrize("value", NUMPY, ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}")
def test_numpy_becomes_plain_data(value: np.generic | np.ndarray, tmp_path: Path) -> None:
    torch.save({"value": value}, tmp_path / "numpy.pth")
    from_checkpoint = read_checkpoint(tmp_path / "numpy.pth")["value"]
    from_pickles = []
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "numpy.pkl").write_bytes(pickle.dumps(value, protocol))
        with (tmp_path / "numpy.pkl").open("rb") as file:
            from_pickles.append(read_pickle(file))
    for loaded in (from_checkpoint, *from_pickles):
        assert type(loaded) is (np.ndarray if isinstance(value, np.ndarray) else type(value.item()))
        assert np.array_equal(loaded, value) and np.asarray(loaded).shape == value.shape


@pytest.mark.parametrize("name", ["O", "V8", "i4,O", "datetime64[s]", "f8, f8"])
def test_numpy_types_that_are_not_plain_data_are_refused(name: str, tmp_path: Path) -> None:
    class Stored:
        def __reduce__(self) -> tuple:
            return np.dtype, (name, False, True)

    torch.save({"type": Stored()}, tmp_path / "type.pth")
    with pytest.raises(CheckpointError, match="NumPy's type .* is not plain data"):
        read_checkpoint(tmp_path / "type.pth")


def test_getattr_reaches_nothing(tmp_path: Path) -> None:
    """mmengine allows `getattr` when it loads checkpoints, through which any function can be reached."""

    class Reaches:
        def __reduce__(self) -> tuple:
            return getattr, (np.ndarray, "tofile")

    torch.save({"state_dict": {}, "reached": Reaches()}, tmp_path / "getattr.pth")
    with pytest.raises(CheckpointError, match="getattr"):
        read_checkpoint(tmp_path / "getattr.pth")


def test_trust_is_explicit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    path = own_file(tmp_path / "old.pth", extra=RunsCode(tmp_path / "executed"))
    with pytest.raises(CheckpointError, match=f"{TRUST_VARIABLE}=1, or pass --trust-checkpoint"):
        read_checkpoint(path)
    monkeypatch.setenv(TRUST_VARIABLE, "0")
    with pytest.raises(CheckpointError, match="is not plain data"):
        read_checkpoint(path)
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    assert "state_dict" in read_checkpoint(path)
    assert (tmp_path / "executed").is_dir()
    assert f"loading {path} may run code from it" in log.text
    flip(path)
    with pytest.raises(CheckpointError, match="it is damaged"):
        read_checkpoint(path)


class Annotations(BaseDataset):
    METAINFO = {"classes": ("a",)}


def test_annotation_pickles_are_read_as_data(tmp_path: Path) -> None:
    content = {"metainfo": {}, "data_list": [{"img_path": "a.png", "bboxes": np.ones((2, 4), np.float32)}]}
    mmengine.dump(content, tmp_path / "good.pkl")
    dataset = Annotations(ann_file=str(tmp_path / "good.pkl"))
    assert np.array_equal(dataset[0]["bboxes"], np.ones((2, 4)))
    mmengine.dump({**content, "planted": RunsCode(tmp_path / "executed")}, tmp_path / "planted.pkl")
    with pytest.raises(pickle.UnpicklingError, match="it refers to posix.mkdir, which is not plain data"):
        Annotations(ann_file=str(tmp_path / "planted.pkl"))
    assert not (tmp_path / "executed").exists()


def test_results_with_tensors_are_read_as_data(tmp_path: Path) -> None:
    results = [{"scores": torch.arange(3.0), "mask": {"size": [2, 2], "counts": b"04"}, "history": HistoryBuffer()}]
    mmengine.dump(results, tmp_path / "results.pkl")
    loaded = mmengine.load(tmp_path / "results.pkl")
    assert torch.equal(loaded[0]["scores"], torch.arange(3.0)) and loaded[0]["mask"]["counts"] == b"04"


def test_a_pickle_cannot_change_the_reader(tmp_path: Path) -> None:
    """BUILD sets attributes of what a pickle names, also of functions."""
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cnumpy\ndtype\n", b"cnumpy._core.multiarray\nscalar\n"):
        (tmp_path / "build.pkl").write_bytes(b"\x80\x02" + target + b"N}X\x05\x00\x00\x00ownerK\x01s\x86b.")
        with (tmp_path / "build.pkl").open("rb") as file, pytest.raises(pickle.UnpicklingError, match="build.pkl"):
            read_pickle(file)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "owner")


def test_class_map_pickles_are_read_as_data(images: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.pkl").write_bytes(pickle.dumps({"circle": RunsCode(tmp_path / "executed")}))
    with pytest.raises(pickle.UnpicklingError, match="classes.pkl cannot be used"):
        ImageClassificationDataset(str(images), "val", reader={"class_map": str(tmp_path / "classes.pkl")})
    assert not (tmp_path / "executed").exists()


@campaign
@pytest.mark.slow
def test_the_tools_refuse(folder: Path) -> None:
    config = write_config(folder, folder / "data")
    planted = own_file(folder / "planted.pth", optimizer=RunsCode(folder / "executed"))
    damaged = own_file(folder / "damaged.pth")
    flip(damaged)
    work_dir = ("--work-dir", folder / "work")
    for path in (planted, damaged):
        for arguments in (
            ("test.py", config, path),
            ("train.py", config, "--resume", path),
            ("train.py", config, "--cfg-options", f"load_from={path}"),
        ):
            result = run_tool(*arguments, *work_dir, code=1)
            assert f"checkpoint {path} cannot be used: " in result.stdout
    assert not (folder / "executed").exists()
    assert not list((folder / "work").glob("*.pth"))
    result = run_tool("test.py", config, planted, *work_dir, "--trust-checkpoint")
    assert (folder / "executed").is_dir() and "may run code from it" in result.stdout
    result = run_tool("test.py", config, folder, *work_dir, code=2)
    assert f"checkpoint {folder} is a folder, not a file" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_doors_times_damage(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Flipped bits and cut files at every door: refused, or loaded with exactly the right weights."""
    tries = FAULT_TRIES or 4
    generator = np.random.default_rng(0)
    good = own_file(folder / "good.pth")
    expected = torch.load(good)["state_dict"][FIRST]
    refused = 0
    doors = [door for door in DOORS if door not in ("resume", "resume_found", "detector", "segmentor")]
    for door in doors:
        for number in range(tries):
            path = folder / "damaged.pth"
            shutil.copy(good, path)
            if number % 4 == 3:
                os.truncate(path, int(generator.integers(path.stat().st_size)))
            else:
                flip(path, generator)
            try:
                loaded = DOORS[door](path, folder)
            except (RuntimeError, ValueError) as error:
                assert str(path) in str(error)
                refused += 1
            else:
                assert torch.equal(loaded, expected)
    total = len(doors) * tries
    assert refused > total // 2
    with capsys.disabled():
        print(f"\n{total} damaged files at {len(doors)} doors: {refused} refused, {total - refused} loaded unchanged")

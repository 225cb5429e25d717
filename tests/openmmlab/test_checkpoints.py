"""Checkpoints of runs: written atomically, and verified before a run resumes from them."""

from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from grootv.openmmlab.runtime.checkpoints import (
    AtomicCheckpointHook,
    AtomicLocalBackend,
    find_intact_checkpoint,
    is_intact,
)


def test_a_flipped_bit_and_a_cut_file_are_noticed(tmp_path: Path) -> None:
    state = {"weights": torch.arange(10000.0)}
    for number in (1, 2, 10, 11):
        torch.save(state, tmp_path / f"epoch_{number}.pth")
    torch.save(state, tmp_path / "best_accuracy_top1_epoch_12.pth")
    path = tmp_path / "epoch_11.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    cut = tmp_path / "epoch_10.pth"
    cut.write_bytes(cut.read_bytes()[:-1000])
    assert not is_intact(path) and not is_intact(cut) and not is_intact(tmp_path / "none.pth")
    assert find_intact_checkpoint(tmp_path) == str(tmp_path / "epoch_2.pth")
    assert find_intact_checkpoint(tmp_path / "empty") is None


def test_no_changed_bit_gives_other_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {f"weights{number}": torch.randn(4) for number in range(3)}
    path = tmp_path / "epoch_1.pth"
    torch.save(state, path)
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        content = bytearray(good)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        if is_intact(path):
            loaded = torch.load(path)
            assert all(torch.equal(loaded[name], value) for name, value in state.items()), position
    directory_flag = good.rindex(b"PK\x01\x02") + 38
    path.write_bytes(good[:directory_flag] + b"\x10" + good[directory_flag + 1 :])
    assert not is_intact(path)


def test_a_failed_write_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = AtomicLocalBackend()
    backend.put(b"good", tmp_path / "epoch_1.pth")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        backend.put(b"better", tmp_path / "epoch_1.pth")
    assert (tmp_path / "epoch_1.pth").read_bytes() == b"good"


def test_checkpoints_of_mmengine_load_with_their_scalars(tmp_path: Path) -> None:
    """mmengine's own runs store objects of a class, which `torch.load` refuses to make."""
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"message_hub": {"log_scalars": {"loss": history}}}, tmp_path / "epoch_1.pth")
    content = CheckpointLoader.load_checkpoint(str(tmp_path / "epoch_1.pth"), map_location="cpu")
    loaded = content["message_hub"]["log_scalars"]["loss"]
    assert isinstance(loaded, HistoryBuffer)
    assert loaded.mean() == 1.5 and loaded.max_length == history.max_length
    loaded.update(6.0)
    assert loaded.statistics("mean") == 3.0
    with pytest.raises(FileNotFoundError, match=r"epoch_2\.pth"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "epoch_2.pth"))


def test_one_checkpoint_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        AtomicCheckpointHook(max_keep_ckpts=1)

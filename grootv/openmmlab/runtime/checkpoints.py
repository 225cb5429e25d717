"""Checkpoints that survive being killed: written in one step, verified before a run resumes from them."""

import logging
import os
import re
import zipfile
from pathlib import Path

import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, Runner

from .termination import ResumableEpochTrainLoop

_PERIODIC_CHECKPOINT = re.compile(r"(?:epoch|iter)_(\d+)(?:_iter_(\d+))?\.pth")


class AtomicLocalBackend(LocalBackend):
    """Local files that appear under their name only when they are complete.

    The bytes go to `<name>.tmp` and to the disk, then the file is renamed. A process that is killed on the way leaves
    the previous file of that name, if there was one, as it was.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write `obj` to `filepath`."""
        filepath = Path(filepath)
        filepath.parent.mkdir(parents=True, exist_ok=True)
        temporary = filepath.with_name(filepath.name + ".tmp")
        with open(temporary, "wb") as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, filepath)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write the text `obj` to `filepath`."""
        self.put(obj.encode(encoding), filepath)


register_backend("atomic_local", AtomicLocalBackend, force=True)


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_local_checkpoint(filename: str, map_location: str | None = None) -> dict:
    """Load a local file of `torch.save`, for every part of mmengine that loads checkpoints.

    Runs keep their message hub in checkpoints, which torch refuses to unpickle unless told otherwise. The maintained
    mmengine tells it so, the original 0.10.7 does not. The file has to be one that is trusted.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{filename} can not be found.")
    return torch.load(path, map_location=map_location, weights_only=False)


def is_intact(checkpoint: str | Path) -> bool:
    """Whether `checkpoint` is a complete file of `torch.save` in which no byte that matters has changed.

    `torch.load` does not compare the checksums of the records, so that it may return wrong weights from a damaged file;
    the checksums do not cover the directory of the records, in which one bit makes torch take a record for a folder.
    The file is unpickled, so it has to be one that would be trusted to resume from.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            if archive.testzip() is not None or any(record.external_attr for record in archive.infolist()):
                return False
        torch.load(checkpoint, map_location="meta", mmap=True, weights_only=False)
    except Exception:  # what a wrong byte in the structure raises depends on the byte
        return False
    return True


def find_intact_checkpoint(folder: str | Path) -> str | None:
    """The most advanced `epoch_N.pth`, `epoch_N_iter_I.pth` or `iter_N.pth` in `folder` that is intact, or None.

    Each damaged one that has to be passed over is reported in the log.
    """
    found = [
        (int(match[1]), int(match[2] or 0), path)
        for path in Path(folder).glob("*.pth")
        if (match := _PERIODIC_CHECKPOINT.fullmatch(path.name))
    ]
    for *_, path in sorted(found, reverse=True):
        if is_intact(path):
            return str(path)
        print_log(
            f"{path} is damaged and is passed over; looking for the checkpoint before it.",
            logger="current",
            level=logging.ERROR,
        )
    return None


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's `CheckpointHook` on :class:`AtomicLocalBackend`.

    A run that resumes at a point where it has to validate does so first, because the run that wrote the checkpoint may
    have been killed before it had the result.

    Args:
        max_keep_ckpts: how many periodic checkpoints stay, -1 for all. At least 2: the oldest one is removed before
            the next one is written.
        kwargs: as of `CheckpointHook`.
    """

    def __init__(self, *args, max_keep_ckpts: int = 3, **kwargs) -> None:
        if 0 <= max_keep_ckpts < 2:
            raise ValueError(
                f"max_keep_ckpts must be -1 (all) or at least 2, since a run that is killed while it "
                f"writes a checkpoint resumes from the one before; got {max_keep_ckpts}"
            )
        kwargs.setdefault("backend_args", {"backend": "atomic_local"})
        super().__init__(*args, max_keep_ckpts=max_keep_ckpts, **kwargs)

    def before_train(self, runner: Runner) -> None:
        """Prepare the folder; validate if the run resumes where a validation is due."""
        super().before_train(runner)
        if runner.rank == 0 and os.path.isdir(self.out_dir):
            for leftover in Path(self.out_dir).glob("*.pth.tmp"):
                leftover.unlink()
        loop = runner.train_loop
        if isinstance(loop, ResumableEpochTrainLoop) and loop.trained_batches:
            return  # within an epoch no validation is due
        done = loop.epoch if isinstance(loop, EpochBasedTrainLoop) else loop.iter
        end = loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters
        if (
            runner.val_loop is not None
            and done >= max(loop.val_begin, 1)
            and (done % loop.val_interval == 0 or done == end)
        ):
            runner.logger.info("Validating the checkpoint that the run resumes from.")
            runner.val_loop.run()

"""Checkpoints that a killed process cannot damage: written atomically, and verified before a run resumes from them."""

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

_PERIODIC_CHECKPOINT = re.compile(r"(epoch|iter)_(\d+)\.pth")


class AtomicLocalBackend(LocalBackend):
    """Local files that appear under their name only when they are complete.

    The bytes are written to `<name>.tmp` and flushed to the disk, then the file is renamed. A process that is killed
    before the end leaves an earlier file of that name unchanged.
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
    """Load a local file of `torch.save`; every part of mmengine that loads checkpoints calls this function.

    Checkpoints of runs contain mmengine's message hub, which `torch.load` refuses unless it gets `weights_only=False`.
    The maintained mmengine passes that argument, the original 0.10.7 does not. Unpickling can run any code, so load
    trusted files only.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {filename} does not exist")
    return torch.load(path, map_location=map_location, weights_only=False)


def is_intact(checkpoint: str | Path) -> bool:
    """Whether `checkpoint` is a complete file of `torch.save` that would load with the values it was written with.

    `torch.load` does not verify the checksums of the records and may return wrong weights from a damaged file; this
    function verifies them. The checksums do not cover the archive's directory, where one wrong bit marks a record as a
    folder, so it checks those marks too. It unpickles the file, so pass trusted files only.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            if archive.testzip() is not None or any(record.external_attr for record in archive.infolist()):
                return False
        torch.load(checkpoint, map_location="meta", mmap=True, weights_only=False)
    except Exception:  # the type of the error depends on which byte is wrong
        return False
    return True


def find_intact_checkpoint(folder: str | Path) -> str | None:
    """The intact `epoch_N.pth` or `iter_N.pth` in `folder` with the largest N, or None.

    Each damaged file that it skips is logged.
    """
    found = [
        (int(match[2]), path)
        for path in Path(folder).glob("*.pth")
        if (match := _PERIODIC_CHECKPOINT.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        if is_intact(path):
            return str(path)
        print_log(
            f"{path} is damaged and is skipped; trying the checkpoint before it.",
            logger="current",
            level=logging.ERROR,
        )
    return None


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's `CheckpointHook`, which here writes through :class:`AtomicLocalBackend`.

    If a validation is due at the point where a run resumes, the run validates first: the process that wrote the
    checkpoint may have been killed before the validation ended.

    Args:
        max_keep_ckpts: number of periodic checkpoints to keep, -1 for all. Otherwise at least 2, because the oldest
            one is removed before the next one is written.
        kwargs: further arguments of `CheckpointHook`.

    Raises:
        ValueError: `max_keep_ckpts` is 0 or 1.
    """

    def __init__(self, *args, max_keep_ckpts: int = 3, **kwargs) -> None:
        if 0 <= max_keep_ckpts < 2:
            raise ValueError(
                f"max_keep_ckpts must be -1 (all) or at least 2, because a run that is killed while it "
                f"writes a checkpoint resumes from the one before; got {max_keep_ckpts}"
            )
        kwargs.setdefault("backend_args", {"backend": "atomic_local"})
        super().__init__(*args, max_keep_ckpts=max_keep_ckpts, **kwargs)

    def before_train(self, runner: Runner) -> None:
        """Remove unfinished files; validate if a validation is due where the run resumes."""
        super().before_train(runner)
        if runner.rank == 0 and os.path.isdir(self.out_dir):
            for leftover in Path(self.out_dir).glob("*.pth.tmp"):
                leftover.unlink()
        loop = runner.train_loop
        done = loop.epoch if isinstance(loop, EpochBasedTrainLoop) else loop.iter
        end = loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters
        if (
            runner.val_loop is not None
            and done >= max(loop.val_begin, 1)
            and (done % loop.val_interval == 0 or done == end)
        ):
            runner.logger.info("Validating the checkpoint that the run resumes from.")
            runner.val_loop.run()

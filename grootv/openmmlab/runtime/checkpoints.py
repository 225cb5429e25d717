"""Checkpoints that a killed process cannot damage: written atomically, holding plain data, and verified when read."""

import io
import logging
import os
import re
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.dist import barrier, get_rank
from mmengine.fileio import LocalBackend, register_backend, register_handler
from mmengine.fileio.handlers import PickleHandler
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, Runner

from grootv.models.safe_loading import DamagedCheckpointError, read_checkpoint, read_pickle

from .finite import finite_metrics
from .termination import ResumableEpochTrainLoop

_PERIODIC_CHECKPOINT = re.compile(r"(?:epoch|iter)_(\d+)(?:_iter_(\d+))?\.pth")


class AtomicLocalBackend(LocalBackend):
    """Local files that appear under their name only when they are complete.

    The bytes are written to a file of another name and flushed to the disk, then that file is renamed. A process that
    is killed before the end leaves an earlier file of that name unchanged, and so does a full disk.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write `obj` to `filepath`.

        Raises:
            OSError: it cannot be written; nothing of it is left.
        """
        filepath = Path(filepath)
        filepath.parent.mkdir(parents=True, exist_ok=True)
        # Each writer has its own temporary file: two processes may write the same name at the same time.
        temporary = filepath.with_name(f".{filepath.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, filepath)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno is not None:
                raise OSError(error.errno, error.strerror, str(filepath)) from error
            raise

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write the text `obj` to `filepath`."""
        self.put(obj.encode(encoding), filepath)


register_backend("atomic_local", AtomicLocalBackend, force=True)


@register_handler(["pkl", "pickle"])
class DataPickleHandler(PickleHandler):
    """Pickles of annotations, class names and results, read without running code from them."""

    def load_from_fileobj(self, file: io.BufferedIOBase, **kwargs: Any) -> Any:
        """Read a pickle as `grootv.models.safe_loading.read_pickle` does."""
        return read_pickle(file)

    def load_from_path(self, filepath: str | Path, **kwargs: Any) -> Any:
        """Read the pickle at `filepath`."""
        with open(filepath, "rb") as file:
            return read_pickle(file)


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_local_checkpoint(filename: str, map_location: Any = None) -> dict:
    """Load a local file of `torch.save`; every part of mmengine that loads checkpoints calls this function.

    Raises:
        OSError, CheckpointError: as of `grootv.models.safe_loading.read_checkpoint`.
    """
    return _restore_histories(read_checkpoint(filename, map_location))


@CheckpointLoader.register_scheme(prefixes=("http://", "https://"), force=True)
def load_from_http(
    filename: str, map_location: Any = None, model_dir: str | None = None, progress: bool = False
) -> dict:
    """Load a checkpoint from an address; the first process stores it in PyTorch's cache, where the others read it.

    Raises:
        OSError, CheckpointError: as of `grootv.models.safe_loading.read_checkpoint`.
    """
    folder = Path(model_dir or Path(torch.hub.get_dir(), "checkpoints"))
    path = folder / Path(urlparse(filename).path).name
    for turn in (get_rank() == 0, True):
        if turn and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(filename, str(path), progress=progress)
        barrier()
    return load_local_checkpoint(str(path), map_location)


def _load_other(file: str | io.BytesIO, map_location: Any = None, weights_only: bool | None = None) -> dict:
    if isinstance(file, str):
        return load_local_checkpoint(file, map_location)
    return _restore_histories(read_checkpoint("from a remote store", map_location, file))


# The loaders of the other schemes call these two functions. mmengine's own fall back to running code from the file.
mmengine.runner.checkpoint.load_from_http = load_from_http
mmengine.runner.checkpoint._safe_torch_load = _load_other


def _restore_histories(checkpoint: dict) -> dict:
    """Make mmengine's HistoryBuffer of each logged scalar of a run, from the plain data that stand for it in files."""
    hub = checkpoint.get("message_hub")
    scalars = hub.get("log_scalars") if isinstance(hub, dict) else None
    for name, history in (scalars or {}).items():
        if isinstance(history, dict):
            logs, counts = (history[key].cpu().numpy() for key in ("log_history", "count_history"))
            scalars[name] = HistoryBuffer(logs, counts, history["max_length"])
    return checkpoint


def _as_data(value: Any) -> Any:
    """`value` with plain data in the place of mmengine's and NumPy's classes."""
    if isinstance(value, HistoryBuffer):
        logs, counts = (torch.from_numpy(values) for values in value.data)
        return {"log_history": logs, "count_history": counts, "max_length": value.max_length}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {_as_data(key): _as_data(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_as_data(item) for item in value)
    return value


def is_intact(checkpoint: str | Path) -> bool:
    """Whether `checkpoint` is a complete file of `torch.save` that would load with the values it was written with.

    Raises:
        CheckpointError: the file is complete, but holds something other than plain data.
    """
    try:
        read_checkpoint(checkpoint, "meta")
    except (DamagedCheckpointError, FileNotFoundError):
        return False
    return True


def find_intact_checkpoint(folder: str | Path) -> str | None:
    """The intact `epoch_N.pth`, `epoch_N_iter_I.pth` or `iter_N.pth` in `folder` with the largest N, then I, or None.

    Each damaged file that it skips is logged.

    Raises:
        CheckpointError: a file is complete, but holds something other than plain data.
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
            f"{path} is damaged and is skipped; trying the checkpoint before it.",
            logger="current",
            level=logging.ERROR,
        )
    return None


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's `CheckpointHook`, which here writes plain data through :class:`AtomicLocalBackend`.

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

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Replace mmengine's and NumPy's objects by plain data, so that reading the file need not run any code."""
        for key in checkpoint.keys() - {"state_dict", "ema_state_dict"}:
            checkpoint[key] = _as_data(checkpoint[key])

    def before_train(self, runner: Runner) -> None:
        """Remove unfinished files; validate if a validation is due where the run resumes."""
        super().before_train(runner)
        if runner.rank == 0 and os.path.isdir(self.out_dir):
            for leftover in Path(self.out_dir).glob(".*.pth.*.tmp"):
                if leftover.is_file():
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

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoint, unless the metric that decides is not finite: nothing could beat infinity."""
        super().after_val_epoch(runner, finite_metrics(metrics))

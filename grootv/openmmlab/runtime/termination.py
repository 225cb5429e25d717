"""Runs that end on SIGTERM with a checkpoint, and epochs that go on where such a checkpoint left them.

Schedulers of clusters send SIGTERM some time before they kill a job: Slurm by default 30 seconds (`KillWait`).
"""

import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from threading import Thread
from types import FrameType

import torch
from mmengine.dist import all_reduce, barrier
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a run that SIGTERM has ended: 143, what shells report for a process that the signal has killed."""

_EPOCH_PART = "trained_part_of_epoch"
_LEFT_CHECKPOINT = "checkpoint_left_on_sigterm"


class ResumableBatchSampler:
    """A batch sampler that leaves out the first `skip` batches, without loading them.

    Args:
        batch_sampler: any batch sampler of a `DataLoader`; its attributes remain accessible.
    """

    def __init__(self, batch_sampler: object) -> None:
        self.batch_sampler = batch_sampler
        self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self.batch_sampler), self.skip, None)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> object:
        if name == "batch_sampler":  # absent while the object is unpickled
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


@LOOPS.register_module()
class ResumableEpochTrainLoop(EpochBasedTrainLoop):
    """mmengine's `EpochBasedTrainLoop`, which also resumes from checkpoints that :class:`TerminationHook` has saved
    within an epoch: it leaves out the batches on which the model was trained before.

    Data loaders without a batch sampler (`batch_size=None`) begin such an epoch anew.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._skipped = 0
        self._batches: ResumableBatchSampler | None = None
        if self.dataloader.batch_sampler is not None:
            self._batches = ResumableBatchSampler(self.dataloader.batch_sampler)
            # `DataLoader` refuses the assignment, which has no effect on iterators that exist; here none exists yet.
            vars(self.dataloader)["batch_sampler"] = self._batches

    @property
    def trained_batches(self) -> int:
        """How many batches of the epoch that comes next the model was trained on before the run resumed."""
        if self._batches is None:
            return 0
        return round(self.runner.message_hub.get_info(_EPOCH_PART, 0.0) * len(self.dataloader))

    def run_epoch(self) -> None:
        """Train on what is left of one epoch."""
        self._skipped = self.trained_batches
        if self._batches is not None:
            self._batches.skip = self._skipped
        if self._skipped:
            self.runner.logger.info(f"{self._skipped} batches of epoch {self._epoch + 1} are done and left out.")
        self.runner.message_hub.update_info(_EPOCH_PART, 0.0)
        super().run_epoch()

    def run_iter(self, idx: int, data_batch: object) -> None:
        """Train on one batch, the `idx`-th of those that are left."""
        super().run_iter(idx + self._skipped, data_batch)


def _obey_parent_alone() -> None:
    """Wait for SIGTERM and end the process if its parent sent it."""
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)


class _ProtectedStart:
    """Initialises a process of a data loader, which then takes SIGTERM from the training process alone.

    Schedulers signal all processes of a job. Without its loading processes the run could not finish its iteration.
    """

    def __init__(self, initialise: Callable[[int], None] | None) -> None:
        self.initialise = initialise

    def __call__(self, worker: int) -> None:
        # A handler would not learn who sent the signal, so a thread waits for it while it is blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_obey_parent_alone, daemon=True).start()
        if self.initialise is not None:
            self.initialise(worker)

    @classmethod
    def apply(cls, loader: DataLoader) -> None:
        """Protect the processes that `loader` starts from now on."""
        if not isinstance(loader.worker_init_fn, cls):
            loader.worker_init_fn = cls(loader.worker_init_fn)


@HOOKS.register_module()
class TerminationHook(Hook):
    """On SIGTERM, save a checkpoint after the iteration and end with :data:`EXIT_CODE`.

    All processes of a distributed run end after the same iteration, also if only one of them got the signal. While
    gradients are accumulated, they go on to the update first. During validation they end without a checkpoint, because
    the weights may be averaged ones then; the last one is from before the validation.

    The checkpoint is `epoch_<complete epochs>_iter_<iterations>.pth` in the work directory, or `iter_<iterations>.pth`
    in runs that count iterations. The resumed run removes it as soon as there is a later one.
    """

    priority = "LOWEST"  # after the hooks that make the iteration complete, such as EMA and learning rate

    def __init__(self) -> None:
        self._signalled = False
        self._previous_handler: object = None
        self._left: str | None = None
        self._last_periodic: str | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def before_train(self, runner: Runner) -> None:
        """Catch SIGTERM from now on."""
        self._previous_handler = signal.signal(signal.SIGTERM, self._handle)
        self._left = runner.message_hub.get_info(_LEFT_CHECKPOINT, None)
        self._last_periodic = runner.message_hub.get_info("last_ckpt", None)
        _ProtectedStart.apply(runner.train_dataloader)
        if runner.val_loop is not None:
            _ProtectedStart.apply(runner.val_dataloader)

    def before_train_epoch(self, runner: Runner) -> None:
        """Protect the processes of the data loader, which another hook may have given a new initialisation."""
        _ProtectedStart.apply(runner.train_dataloader)

    def after_train(self, runner: Runner) -> None:
        """Leave SIGTERM to what handled it before."""
        signal.signal(signal.SIGTERM, self._previous_handler)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """End the run if a process got the signal.

        Raises:
            SystemExit: with :data:`EXIT_CODE`.
        """
        self._remove_left_checkpoint(runner)
        accumulating = isinstance(runner.optim_wrapper, OptimWrapper) and not runner.optim_wrapper.should_update()
        if accumulating or not self._signalled_anywhere():
            return
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        iteration = runner.iter + 1
        name = f"epoch_{runner.epoch}_iter_{iteration}.pth" if by_epoch else f"iter_{iteration}.pth"
        if by_epoch:
            runner.message_hub.update_info(_EPOCH_PART, (batch_idx + 1) / len(runner.train_dataloader))
        runner.message_hub.update_info(_LEFT_CHECKPOINT, name)
        runner.save_checkpoint(
            runner.work_dir,
            name,
            meta={"epoch": runner.epoch, "iter": iteration},
            backend_args={"backend": "atomic_local"},
        )
        if self._left not in (None, name) and runner.rank == 0:
            Path(runner.work_dir, self._left).unlink(missing_ok=True)
        barrier()  # who ends first makes launchers kill the others
        runner.logger.warning(
            f"SIGTERM: the run ends after iteration {iteration} with exit code {EXIT_CODE}. --resume continues it from "
            f"{Path(runner.work_dir, name)}."
        )
        raise SystemExit(EXIT_CODE)

    def after_train_epoch(self, runner: Runner) -> None:
        """Remove the checkpoint that the run resumed from, if it is out of date."""
        self._remove_left_checkpoint(runner)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None) -> None:
        """End the process during validation if it got the signal. Launchers then end the other processes.

        Raises:
            SystemExit: with :data:`EXIT_CODE`.
        """
        if self._signalled:
            runner.logger.warning(
                f"SIGTERM: the run ends during validation with exit code {EXIT_CODE}. --resume continues it from the "
                f"last checkpoint."
            )
            raise SystemExit(EXIT_CODE)

    def _signalled_anywhere(self) -> bool:
        signalled = torch.tensor(int(self._signalled))
        all_reduce(signalled, op="max")
        return bool(signalled)

    def _remove_left_checkpoint(self, runner: Runner) -> None:
        """Remove the checkpoint that SIGTERM left before, once a periodic one is later."""
        if self._left is None or runner.message_hub.get_info("last_ckpt", None) == self._last_periodic:
            return
        runner.message_hub.update_info(_LEFT_CHECKPOINT, None)
        if runner.rank == 0:
            Path(runner.work_dir, self._left).unlink(missing_ok=True)
        self._left = None

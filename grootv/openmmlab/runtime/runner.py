"""mmengine's Runner with additions for long runs and for machines without a GPU. It runs every task."""

import copy

from mmengine.device import is_cuda_available
from mmengine.dist import broadcast_object_list, is_distributed
from mmengine.evaluator import Evaluator
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop
from mmengine.runner import Runner as MMEngineRunner
from torch import nn
from torch.utils.data import DataLoader

from .checkpoints import find_intact_checkpoint
from .compilation import compile_backbone
from .data_errors import name_files, naming_annotations
from .distributed import GlooSyncBatchNorm2d, init_gloo, set_slurm_environment
from .finite import FiniteValuesHook
from .termination import ResumableEpochTrainLoop, TerminationHook
from .work_dir_lock import WorkDirInUseError, WorkDirLock


class Runner(MMEngineRunner):
    """mmengine's `Runner`, with these differences:

    - Resuming takes the last intact checkpoint, and logs which damaged ones it skips.
    - On SIGTERM, training ends after the iteration, with a checkpoint (:class:`TerminationHook`).
    - Without a GPU, distributed runs use gloo, and mixed precision is bfloat16 autocast.
    - `compile` in the config compiles the model's backbone (:func:`compile_backbone`), for training, validation and
      testing. mmengine's compiles `train_step`, with the data preprocessor and the optimizer, for training alone.
    - With a GPU, mixed precision logs the steps that it skips (:class:`~.optim.GPUAmpOptimWrapper`).
    - `auto_scale_lr` scales the learning rate linearly with the batch, including accumulated batches.
    - Errors in images and annotations name the file.
    - A run has its work directory to itself.
    - Testing raises an error if the checkpoint has missing or unexpected parameters.
    - :class:`FiniteValuesHook` is in every run: NaN stops an evaluation, and is not saved.
    """

    _strict_load = False

    def setup_env(self, env_cfg: dict) -> None:
        """Set up the environment and the process group."""
        if self.launcher == "slurm":
            set_slurm_environment()
        if self.launcher in ("pytorch", "slurm") and not is_cuda_available() and not is_distributed():
            init_gloo()
        super().setup_env(env_cfg)

    def register_hooks(self, default_hooks: dict | None = None, custom_hooks: list | None = None) -> None:
        """Register the hooks of the config, and `FiniteValuesHook`."""
        super().register_hooks(default_hooks, custom_hooks)
        self.register_hook(FiniteValuesHook())

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Compile the backbone if the config says so, move the model to its device, and wrap it for other processes."""
        if self.cfg.get("compile"):
            compile_backbone(model, self.cfg.compile)
        if self.distributed and not is_cuda_available():
            model_wrapper_cfg = {
                "type": "MMDistributedDataParallel",
                "broadcast_buffers": False,
                "find_unused_parameters": self.cfg.get("find_unused_parameters", False),
                **(model_wrapper_cfg or {}),
                "device_ids": None,
            }
            # norm_cfg=dict(type="SyncBN") in a config makes layers that PyTorch runs on GPUs only.
            kinds = {type(module) for module in model.modules() if isinstance(module, nn.SyncBatchNorm)}
            model = GlooSyncBatchNorm2d.convert(model, tuple(kinds))
        return super().wrap_model(model_wrapper_cfg, model)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the training loop; one that counts epochs can resume within an epoch."""
        if isinstance(loop, dict) and loop.get("by_epoch"):
            loop = {"type": ResumableEpochTrainLoop, **{key: loop[key] for key in loop if key != "by_epoch"}}
        return super().build_train_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper | dict) -> OptimWrapper:
        """Build the optimizer."""
        if isinstance(optim_wrapper, dict) and optim_wrapper.get("type") == "AmpOptimWrapper":
            optim_wrapper = copy.deepcopy(optim_wrapper)
            optim_wrapper["type"] = "GPUAmpOptimWrapper"
            if not is_cuda_available():
                optim_wrapper["type"] = "CPUAmpOptimWrapper"
                for gpu_only in ("loss_scale", "dtype", "use_fsdp"):
                    optim_wrapper.pop(gpu_only, None)
                self.logger.info("Mixed precision on a CPU: bfloat16, without loss scaling.")
        return super().build_optim_wrapper(optim_wrapper)

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        """Build a data loader whose errors name the file."""
        with naming_annotations(dataloader):
            loader = MMEngineRunner.build_dataloader(dataloader, *args, **kwargs)
        name_files(loader.dataset)
        return loader

    def build_evaluator(self, evaluator: dict | list | Evaluator) -> Evaluator:
        """Build the metrics."""
        with naming_annotations(evaluator):
            return super().build_evaluator(evaluator)

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rate with processes x batch x accumulation / `auto_scale_lr.base_batch_size`."""
        if not (auto_scale_lr and auto_scale_lr.get("enable", False)):
            return
        accumulation = optim_wrapper._accumulative_counts
        batch = self.world_size * self.train_dataloader.batch_size * accumulation
        base_batch = auto_scale_lr["base_batch_size"]
        self.logger.info(
            f"The learning rate is for batches of {base_batch}; {self.world_size} processes x "
            f"{self.train_dataloader.batch_size} images x {accumulation} accumulated make {batch}: "
            f"scaled by {batch / base_batch:g}."
        )
        groups = list(optim_wrapper.optimizer.param_groups)
        if optim_wrapper.base_param_settings is not None:
            groups.append(optim_wrapper.base_param_settings)
        for group in groups:
            group["lr"] *= batch / base_batch

    def load_or_resume(self) -> None:
        """Load weights or resume a run, as the config says."""
        if self._resume and self._load_from is None and not self._has_loaded:
            self._load_from = find_intact_checkpoint(self.work_dir)
            if self._load_from is None:
                self.logger.info(f"No checkpoint to resume from in {self.work_dir}; starting from the beginning.")
                self._resume = False
        super().load_or_resume()

    def load_checkpoint(self, filename: str, *args, strict: bool = False, **kwargs) -> dict:
        """Load weights; missing or unexpected ones are an error while testing.

        Raises:
            OSError, CheckpointError: as of `grootv.models.safe_loading.read_checkpoint`.
            RuntimeError: the weights do not fit the model; the message names the file.
        """
        try:
            return super().load_checkpoint(filename, *args, strict=strict or self._strict_load, **kwargs)
        except (RuntimeError, ValueError) as error:
            if str(filename) in str(error):
                raise
            raise RuntimeError(f"checkpoint {filename} cannot be used: {error}") from error

    def resume(self, filename: str, *args, **kwargs) -> None:
        """Resume a run.

        Raises:
            OSError, CheckpointError: as of `load_checkpoint`.
            RuntimeError: the file is no checkpoint of a run.
        """
        try:
            super().resume(filename, *args, **kwargs)
        except KeyError as error:
            raise RuntimeError(
                f"cannot resume from {filename}: it is no checkpoint of a run, because it has no {error}. "
                "load_from in the config starts a run from weights alone."
            ) from error

    def train(self) -> nn.Module:
        """Train.

        Raises:
            WorkDirInUseError: another run trains in the work directory.
        """
        lock = WorkDirLock(self.work_dir)
        refusals: list[str | None] = [None]
        if self.rank == 0:
            try:
                lock.acquire()
            except WorkDirInUseError as error:
                refusals = [str(error)]
        broadcast_object_list(refusals)
        if refusals[0] is not None:
            raise WorkDirInUseError(refusals[0])
        try:
            return self._train()
        finally:
            lock.release()

    def _train(self) -> nn.Module:
        loop = self._train_loop = self.build_train_loop(self._train_loop)
        accumulation = (
            self.optim_wrapper._accumulative_counts
            if isinstance(self.optim_wrapper, OptimWrapper)
            else self.optim_wrapper.get("accumulative_counts", 1)
        )
        if accumulation > 1 and len(loop.dataloader) % accumulation:
            self.logger.warning(
                f"An epoch has {len(loop.dataloader)} iterations, which is no multiple of "
                f"accumulative_counts={accumulation}: the gradients accumulated at its end are not in the "
                f"checkpoint, so a resumed run will differ slightly."
            )
        self.register_hook(TerminationHook())
        return super().train()

    def _maybe_compile(self, target: str) -> None:
        """Nothing is left to compile, where mmengine would compile `target`."""

    def test(self) -> dict:
        """Evaluate."""
        self._strict_load = True
        return super().test()

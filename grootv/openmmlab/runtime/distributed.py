"""Data-parallel training: under Slurm, and on CPUs through gloo."""

import os
import subprocess

import torch
import torch.distributed as dist
from mmengine.device import is_cuda_available
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def set_slurm_environment() -> None:
    """Describe the processes of a Slurm step in the environment, with the variables that `torchrun` sets.

    The process of rank 0 is on the first node of the step. `MASTER_ADDR` and `MASTER_PORT` that are set already stay
    as they are. Otherwise the port is 20000 + job id modulo 10000, so that jobs on one node do not meet.

    Raises:
        RuntimeError: the process is not a task of a step.
    """
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    missing = [name for name in (*names.values(), "SLURM_STEP_NODELIST", "SLURM_JOB_ID") if name not in os.environ]
    if missing:
        raise RuntimeError(f"--launcher slurm needs a task that srun has started: {', '.join(missing)} not set")
    os.environ.update({name: os.environ[slurm_name] for name, slurm_name in names.items()})
    if "MASTER_ADDR" not in os.environ:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        nodes = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        os.environ["MASTER_ADDR"] = nodes[0]
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000))


def init_gloo() -> None:
    """Join the process group that `torchrun` describes in the environment, with gloo.

    mmengine's own initialisation selects a CUDA device first, so it fails on a machine without one.

    Raises:
        RuntimeError: environment variables that torchrun sets are missing; the message names them.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"distributed training on CPUs needs the environment variables that torchrun sets; missing: "
            f"{', '.join(missing)}. Start it with tools/dist_train.sh"
        )
    dist.init_process_group("gloo")


class GlooSyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the batches of all processes, on CPUs, where `torch.nn.SyncBatchNorm` does not run.

    Input and output (B, C, H, W). Mean and variance are computed over the batches of all processes together, and
    gradients flow through both.
    """

    drop: nn.Module | None = None
    act: nn.Module | None = None

    # torch.compile would lose the exchange between the processes in the backward pass: wrong gradients, silently.
    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (B, C, H, W), then apply dropout and activation where the replaced layer had them."""
        output = self._normalise(input) if self.training and self.track_running_stats else super().forward(input)
        for module in (self.drop, self.act):
            if module is not None:
                output = module(output)
        return output

    def _normalise(self, input: Tensor) -> Tensor:
        dims = (0, 2, 3)
        count = torch.tensor([input.numel() / input.shape[1]], dtype=torch.float64)
        # Sums in float64: the variance is the difference of two large numbers.
        wide = input.double()
        total = all_reduce(torch.cat([wide.sum(dims), wide.square().sum(dims), count]))
        count = total[-1].item()
        mean, square = (total[:-1] / count).chunk(2)
        variance = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            self.running_var.lerp_((variance * count / max(count - 1, 1)).to(self.running_var), momentum)
        scale = (variance + self.eps).rsqrt()
        output = (wide - mean[:, None, None]) * scale[:, None, None]
        if self.affine:
            output = output * self.weight[:, None, None] + self.bias[:, None, None]
        return output.to(input.dtype)

    @classmethod
    def convert(
        cls, module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, BatchNormAct2d)
    ) -> nn.Module:
        """Replace each layer of one of `kinds` in `module`; parameters, buffers and names stay the same."""
        if type(module) in kinds:
            converted = cls(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
            converted._parameters, converted._buffers = module._parameters, module._buffers
            converted.drop, converted.act = getattr(module, "drop", None), getattr(module, "act", None)
            return converted.train(module.training)
        for name, child in module.named_children():
            module.add_module(name, cls.convert(child, kinds))
        return module


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Make every batch normalisation in `module` use the batches of all processes.

    On GPUs it uses `torch.nn.SyncBatchNorm` (by timm's conversion, which keeps the activations inside timm's layers),
    on CPUs :class:`GlooSyncBatchNorm2d`.
    """
    return convert_sync_batchnorm(module) if is_cuda_available() else GlooSyncBatchNorm2d.convert(module)

"""Training on 1, 2, 4 and 8 GPUs of one host: images a second, speed-up, communication that is not hidden, memory.

    torchrun --standalone --nproc-per-node 4 benchmarks/distributed.py
    torchrun --standalone --nproc-per-node 4 benchmarks/distributed.py --rows eager --gpus 1 4 --batches 256
    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --device cpu --rows eager compiled fsdp \\
        --models grootv_nano --sharded grootv_nano --batches 2 --size 64 --steps 5      # a trial without GPUs

Each process trains on its own GPU, on a batch of its own: forward, loss, backward and AdamW, float16 by autocast (on
CPUs bfloat16). With fewer GPUs than processes, the other processes wait. The rows:

* eager: classifiers under DistributedDataParallel.
* compiled: the same, each model compiled as one graph. All its gradients are there at the same time, so that no
  all-reduce overlaps with the backward pass.
* split: the same, compiled by the first step under DistributedDataParallel, as in `tools/dist_train.sh` with
  `--compile`. PyTorch then splits the graph wherever a bucket of gradients is full, so that all-reduces overlap.
* mask_rcnn: Mask R-CNN, eager, in mixed precision, as in benchmarks/detection.py.
* fsdp: a larger classifier, eager, under DistributedDataParallel, and by FSDP2: parameters, gradients and states of
  the optimizer are sharded over the GPUs, block by block.

The report is written again after each measurement. So a run that is cut keeps what it has.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from report import publish, shown_arguments, table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import grootv  # noqa: F401  registers the models

PEER = "swin_tiny_patch4_window7_224"
ROWS = ("eager", "mask_rcnn", "fsdp", "compiled", "split")
HEAD = ("model", "how", "images a GPU", "GPUs", "images/s", "speed-up", "communication not hidden", "GiB a GPU")


class Classifier:
    """A classifier with its batch and optimizer; `start` spreads it over a group of processes."""

    how = "eager"
    weights_format = torch.channels_last
    memory_is_counted = True
    """Whether PyTorch counts the memory of a step. That of CUDA graphs it counts only while they are recorded."""

    def __init__(self, name: str, batch: int, size: int, device: torch.device) -> None:
        torch.backends.cudnn.benchmark = True
        self.device = device
        sized = {"img_size": size} if name == PEER and size != 224 else {}
        self.model: nn.Module = timm.create_model(name, **sized).to(device, memory_format=self.weights_format)
        self.images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (batch,), device=device)
        self.make_optimizer()

    def make_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def start(self, group: dist.ProcessGroup) -> None:
        """Train with the processes of `group` from now on."""
        self.parallel = self.model
        if dist.get_world_size(group) > 1:
            devices = None if self.device.type == "cpu" else [self.device]
            self.parallel = DistributedDataParallel(
                self.model, devices, process_group=group, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def step(self) -> None:
        """One step of training."""
        half = torch.bfloat16 if self.device.type == "cpu" else torch.float16
        with torch.autocast(self.device.type, half):
            loss = F.cross_entropy(self.parallel(self.images), self.labels)
        (loss * 1024.0).backward()  # as a gradient scaler would
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class CompiledClassifier(Classifier):
    """A classifier that is compiled as one graph, outside of DistributedDataParallel."""

    how = "compiled"
    mode: str | None = None
    """Of torch.compile."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.compile()
        self.parallel = self.model
        self.step()

    def compile(self) -> None:
        """Have the model compiled by the next step."""
        torch._dynamo.reset()
        self.model = torch.compile(self.model, fullgraph=True, dynamic=False, mode=self.mode)


class SplitClassifier(CompiledClassifier):
    """A classifier that is compiled in the first step under DistributedDataParallel, for all later groups too."""

    how = "compiled, split"

    def __init__(self, *args) -> None:
        Classifier.__init__(self, *args)
        self.compile()
        self.start(dist.group.WORLD)
        self.step()


class ShardedClassifier(Classifier):
    """A classifier whose blocks share out parameters, gradients and states of the optimizer (FSDP2)."""

    how = "FSDP2"
    weights_format = torch.contiguous_format  # FSDP2 takes no other

    def start(self, group: dist.ProcessGroup) -> None:
        """Shard the model over the processes of `group`: once."""
        mesh = DeviceMesh.from_group(group, self.device.type)
        for stage in self.model.stages:
            for block in stage.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.make_optimizer()
        self.parallel = self.model


class MaskRCNN:
    """Mask R-CNN of benchmarks/detection.py with its batch and optimizer."""

    how = "Mask R-CNN, eager"
    memory_is_counted = True

    def __init__(self, name: str, batch: int, size: tuple[int, int], device: torch.device) -> None:
        from detection import build, make_batch  # needs mmdet

        # The mask head sees another number of objects in each step, for each of which cuDNN would try all its kernels.
        torch.backends.cudnn.benchmark = False
        self.device = device
        self.batch = make_batch(batch, *size)
        self.model, self.optimizer = build(name, size)

    def start(self, group: dist.ProcessGroup) -> None:
        """Train with the processes of `group` from now on."""
        from mmengine.model import MMDistributedDataParallel

        self.parallel = self.model
        if dist.get_world_size(group) > 1:
            devices = None if self.device.type == "cpu" else [self.device]
            self.parallel = MMDistributedDataParallel(
                self.model,
                device_ids=devices,
                process_group=group,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )

    def step(self) -> None:
        """One step of training."""
        self.parallel.train_step(self.batch, self.optimizer)


Trained = Classifier | MaskRCNN


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(trained: Trained, group: dist.ProcessGroup, steps: int) -> dict[str, float]:
    """Seconds of a step; on a GPU, also the peak memory in GiB and the share of communication that is not hidden."""
    cuda = trained.device.type == "cuda"
    trained.start(group)
    for _ in range(5):
        trained.step()
    synchronise(trained.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    in_a_row = 5
    for _ in range(max(steps // in_a_row, 1)):
        dist.barrier(group)
        synchronise(trained.device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            trained.step()
        synchronise(trained.device)
        times.append((time.perf_counter() - start) / in_a_row)
    measured = {"seconds": statistics.median(times)}
    if cuda:
        if trained.memory_is_counted:
            measured["memory"] = torch.cuda.max_memory_allocated() / 2**30
        measured["exposed"] = exposed_communication(trained.step, group)
    return measured


def exposed_communication(step: Callable[[], None], group: dist.ProcessGroup, steps: int = 3) -> float:
    """Share of the time of `steps` steps in which a kernel of NCCL runs, and no other kernel."""
    dist.barrier(group)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, event.name.startswith("nccl"))
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    total = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    busy = _length((start, end) for start, end, _ in spans)
    return (busy - _length((start, end) for start, end, nccl in spans if not nccl)) / total


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


class Row(NamedTuple):
    """What is measured for each number of GPUs: `kind(model, batch, size, device)`."""

    kind: type[Trained]
    model: str
    batch: int
    size: int | tuple[int, int]
    baseline: str
    """`how` of the row whose measurement on one GPU the speed-up refers to."""


def planned(args: argparse.Namespace) -> Iterator[Row]:
    """The rows that were asked for, in their order."""
    classifiers = {"eager": Classifier, "compiled": CompiledClassifier, "split": SplitClassifier}
    for row in args.rows:
        if row == "mask_rcnn":
            for model in args.models:
                yield Row(MaskRCNN, model, args.dense_batch, tuple(args.dense_size), MaskRCNN.how)
        elif row == "fsdp":
            for kind in (Classifier, ShardedClassifier):
                yield Row(kind, args.sharded, args.sharded_batch, args.size, Classifier.how)
        else:
            kind = classifiers[row]
            baseline = CompiledClassifier.how if row == "split" else kind.how
            for batch in args.batches:
                for model in args.models:
                    yield Row(kind, model, batch, args.size, baseline)


class Host:
    """The processes of this run, one for each GPU, and what each of them does in turn."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        if args.device == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", device_id=self.device, timeout=timedelta(minutes=3))
        else:
            dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Processes that wait for the others to measure must leave their GPU and its links alone.
        self.control = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        gpus = args.gpus or [n for n in (1, 2, 4, 8) if n <= self.size]
        if max(gpus) > self.size:
            raise SystemExit(f"--gpus: at most the {self.size} processes that torchrun started, got {max(gpus)}")
        self.groups = {n: dist.new_group(range(n)) for n in gpus}

    def together(self, processes: int, call: Callable[[], Any]) -> list[Any]:
        """What `call` returns in each of the first `processes` processes.

        Raises:
            RuntimeError: in all of them, if it raises an exception in one.
        """
        result, error = None, None
        if self.rank < processes:
            try:
                result = call()
            except Exception as exception:  # such as a missing package, or memory that is too small
                error = f"{type(exception).__name__}: {str(exception).splitlines()[0] if str(exception) else ''}"
        both: list[Any] = [None] * self.size
        dist.all_gather_object(both, (result, error), group=self.control)
        errors = [error for _, error in both if error]
        if errors:
            raise RuntimeError(errors[0])
        return [result for result, _ in both[:processes]]

    def run(self, row: Row) -> Iterator[tuple[int, dict[str, float]]]:
        """Measure a row: pairs of a number of GPUs and its results."""

        def make() -> Trained:
            return row.kind(row.model, row.batch, row.size, self.device)

        once = row.kind is not ShardedClassifier
        try:
            trained = self.together(self.size, make)[self.rank] if once else None
            for gpus, group in self.groups.items():
                if gpus == 1 and row.kind in (ShardedClassifier, SplitClassifier):
                    continue  # without other processes there is nothing to shard, and nothing to split
                if not once:
                    trained = self.together(self.size, make)[self.rank]
                results = self.together(gpus, partial(measure, trained, group, self.args.steps))
                summary = {"images": gpus * row.batch / max(result["seconds"] for result in results)}
                if "memory" in results[0]:
                    summary["memory"] = max(result["memory"] for result in results)
                if "exposed" in results[0]:
                    summary["exposed"] = statistics.mean(result["exposed"] for result in results)
                yield gpus, summary
        finally:
            trained = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def main() -> None:
    """Parse the arguments, measure row by row, and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="what to measure, in this order")
    parser.add_argument("--gpus", nargs="+", type=int, help="numbers of GPUs; default: 1, 2, 4 and 8, as far as there")
    parser.add_argument("--models", nargs="+", default=["grootv_tiny", PEER])
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 128], help="images a GPU, of classifiers")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--sharded", default="grootv_base", help="the model of fsdp")
    parser.add_argument("--sharded-batch", type=int, default=128)
    parser.add_argument("--dense-batch", type=int, default=2, help="images a GPU, of Mask R-CNN")
    parser.add_argument("--dense-size", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--mode", choices=["default", "reduce-overhead"], help="of torch.compile, for compiled rows")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each measurement")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--name", default="distributed", help="of the file of results, before the number of processes")
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.mode:
        CompiledClassifier.mode = args.mode
        CompiledClassifier.memory_is_counted = args.mode != "reduce-overhead"
        CompiledClassifier.how = f"compiled, {args.mode}"
    host = Host(args)
    report = Report(host)
    for row in planned(args):
        try:
            for gpus, result in host.run(row):
                report.add(row, gpus, result)
        except RuntimeError as error:
            report.skip(row, error)
    report.write(show=True)
    dist.destroy_process_group()


class Report:
    """The table so far, which the first process writes."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.lines: list[list[object]] = []
        self.notes: list[str] = []
        self.alone: dict[tuple[str, str, int], float] = {}
        self.topology = ""
        if host.device.type == "cuda" and host.rank == 0:
            shown = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True).stdout
            self.topology = re.sub(r"\x1b\[[0-9;]*m", "", shown).strip()

    def add(self, row: Row, gpus: int, result: dict[str, float]) -> None:
        """Append a measurement."""
        if gpus == 1:
            self.alone[row.model, row.kind.how, row.batch] = result["images"]
        alone = self.alone.get((row.model, row.baseline, row.batch))
        speed_up = f"{result['images'] / alone:.2f} ×" if alone else "–"
        exposed = f"{100 * result['exposed']:.1f} %" if "exposed" in result else "–"
        memory = f"{result['memory']:.1f}" if "memory" in result else "–"
        images = f"{result['images']:.{0 if result['images'] > 200 else 1}f}"
        self.lines.append([row.model, row.kind.how, row.batch, gpus, images, speed_up, exposed, memory])
        self.write()

    def skip(self, row: Row, error: Exception) -> None:
        """Note why a row has no further measurements."""
        self.notes.append(f"* {row.model}, {row.kind.how}, {row.batch} images a GPU: not measured ({error})")
        self.write()

    def write(self, show: bool = False) -> None:
        """Write the report."""
        host, args = self.host, self.host.args
        if host.rank:
            return
        half = "float16" if args.device == "cuda" else "bfloat16"
        height, width = args.dense_size
        text = (
            f"Training steps with AdamW, {half} by autocast: classifiers at {args.size} × {args.size}, Mask R-CNN at "
            f"{height} × {width}. Speed-up over one GPU of the same host. Communication is not hidden while kernels of "
            "NCCL run and no others, as a share of the step, mean of the GPUs; it includes waiting for slower GPUs. "
            "Memory is the highest peak of a GPU. What the rows are: the docstring of the script."
        )
        sections = [text, table(HEAD, self.lines), *(["\n".join(self.notes)] if self.notes else [])]
        if self.topology:
            sections.append(f"Links between the GPUs (`nvidia-smi topo -m`):\n\n```text\n{self.topology}\n```")
        launcher = f"torchrun --standalone --nproc-per-node {host.size} benchmarks/distributed.py"
        command = " ".join([launcher, *shown_arguments()])
        title = f"Training on up to {host.size} {'GPUs' if args.device == 'cuda' else 'processes'} of one host"
        publish(title, f"{args.name}-{host.size}", sections, command, args.commit, show=show)


if __name__ == "__main__":
    main()

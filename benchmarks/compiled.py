"""GrootV against timm's Swin and ConvNeXt on one GPU, eager and with torch.compile, in one table.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --parts models large --modes eager default max-autotune
    python benchmarks/compiled.py --parts models --jobs 6    # six models compile at a time, and are measured alone
    python benchmarks/compiled.py --parts largest

Float16 by autocast, batch 128 of 224 x 224 unless stated otherwise. Each ratio is to the peer of the same size, in the
same mode and the same run. Training is forward, loss and backward, without an optimizer; its stochastic depth is 0.1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier, Lock
from typing import NamedTuple

import timm
import torch
from report import copy_bandwidth, graph_milliseconds, prepare, publish, shown_arguments, table
from throughput import PEER, Run
from torch.profiler import ProfilerActivity, profile

PEERS = {
    "grootv_tiny": PEER,
    "grootv_small": "swin_small_patch4_window7_224",
    "grootv_base": "swin_base_patch4_window7_224",
    "convnext_tiny": PEER,
    "vmamba_tiny_s1l8": PEER,
}
LARGE = ((2, (800, 1344)), (16, (512, 512)))
Row = list[str]


def compile_mode(mode: str) -> str | None:
    """What `Run` takes for a mode, of which "eager" is one."""
    return None if mode == "eager" else mode


def forget() -> None:
    """Free the memory of models, of their graphs and of compiled code."""
    torch.compiler.reset()
    torch.cuda.empty_cache()


class Case(NamedTuple):
    """A model in a mode, with a batch of images."""

    name: str
    mode: str
    batch: int = 128
    size: tuple[int, int] = (224, 224)


class Measured(NamedTuple):
    """Images a second, and the peak memory of training in GiB."""

    inference: float
    training: float
    memory: float


def measure(case: Case, repeats: int, ready: Barrier, turn: Lock, results: Connection) -> None:
    """In a process of its own: compile, wait until all processes have, and send a `Measured` or an error."""
    try:
        prepare()
        run = Run(case.name, case.batch, case.size, compile_mode(case.mode))
        run.milliseconds(False, True, 1)
        _, memory = run.throughput(True, True, 1)  # here, since CUDA graphs allocate when they are recorded
        torch.cuda.empty_cache()
        ready.wait()
        with turn:
            inference, _ = run.throughput(False, True, repeats)
            training, _ = run.throughput(True, True, repeats)
            del run
            torch.cuda.empty_cache()
        results.send(Measured(inference, training, memory))
    except Exception as error:
        ready.abort()  # the others measure no longer beside processes that may still compile
        results.send(f"{case.name}, {case.mode}: {type(error).__name__}: {error}")


def measure_all(cases: list[Case], repeats: int, jobs: int) -> dict[Case, Measured]:
    """Measure each case in a process of its own, alone on the GPU; `jobs` of them compile at a time.

    Raises:
        RuntimeError: a case failed.
    """
    context = multiprocessing.get_context("spawn")
    done: dict[Case, Measured] = {}
    cases = list(dict.fromkeys(cases))
    for some in (cases[start : start + jobs] for start in range(0, len(cases), jobs)):
        ready, turn = context.Barrier(len(some)), context.Lock()
        running: dict[Connection, Case] = {}
        for case in some:
            receive, send = context.Pipe(duplex=False)
            context.Process(target=measure, args=(case, repeats, ready, turn, send), daemon=True).start()
            send.close()  # so that reading ends if the process dies
            running[receive] = case
        errors = []
        while running:
            for receive in wait(list(running)):
                case = running.pop(receive)
                try:
                    result = receive.recv()
                except EOFError:
                    result = f"{case.name}, {case.mode}: the process ended without a result"
                    ready.abort()
                if isinstance(result, Measured):
                    done[case] = result
                else:
                    errors.append(result)
        if errors:
            raise RuntimeError("; ".join(error for error in errors if "BrokenBarrierError" not in error))
    return done


def model_rows(models: list[str], modes: list[str], repeats: int, jobs: int) -> Iterator[Row]:
    """Throughput and memory of the models and their peers."""
    for mode in modes:
        names = [name for model in models for name in (PEERS[model], model)]
        done = measure_all([Case(name, mode) for name in names], repeats, jobs)
        for name in models:
            own, peer = done[Case(name, mode)], done[Case(PEERS[name], mode)]
            for what, unit, digits in (("inference", "images/s", 0), ("training", "images/s", 0), ("memory", "GiB", 1)):
                value = getattr(own, what)
                ratio = f"{value / getattr(peer, what):.2f} × {PEERS[name]}"
                yield [f"{name}, {what}", mode, f"{value:.{digits}f} {unit}", ratio]


def large_rows(modes: list[str], repeats: int, jobs: int) -> Iterator[Row]:
    """Training at the sizes of detection and segmentation."""
    for mode in modes:
        pairs = [[Case(name, mode, *images) for name in ("grootv_tiny", PEER)] for images in LARGE]
        done = measure_all([case for pair in pairs for case in pair], repeats, jobs)
        for pair in pairs:
            own, peer = (1e3 * case.batch / done[case].training for case in pair)
            shape = "×".join(map(str, (pair[0].batch, 3, *pair[0].size)))
            yield [f"grootv_tiny, training, {shape}", mode, f"{own:.1f} ms", f"{own / peer:.2f} × the time of {PEER}"]


def latency_rows() -> Iterator[Row]:
    """Batch 1, from replays of a CUDA graph."""
    times = []
    for name in ("grootv_tiny", PEER):
        run = Run(name, 1)
        run.model.eval()
        times.append(graph_milliseconds([lambda run=run: run.infer(True)], rounds=1))
    ratio = f"{times[0] / times[1]:.2f} × the time of {PEER}"
    yield ["grootv_tiny, batch 1", "CUDA graph", f"{times[0]:.2f} ms", ratio]


def host_rows() -> Iterator[Row]:
    """How long the host needs to launch a training step, and for how long kernels run in one with 128 images.

    The time of the host is the shortest of 100 steps with four images, which launch the same kernels: what makes a step
    longer is not the program's. With 128 images it would wait for the GPU, whose queue of kernels has a limited length.
    """
    for name in ("grootv_tiny", PEER):
        small = Run(name, 4)
        small.model.train()
        for _ in range(8):
            small.train(True)
        on_host = []
        for _ in range(100):
            torch.cuda.synchronize()
            start = time.perf_counter()
            small.train(True)
            on_host.append(1e3 * (time.perf_counter() - start))
        host, kernels = min(on_host), kernel_milliseconds(name, "eager", training=True)
        yield [
            f"{name}, host in a training step",
            "eager",
            f"{host:.1f} ms",
            f"{host / kernels:.2f} × the {kernels:.1f} ms of its kernels",
        ]


def block_bytes(channels: int) -> int:
    """Bytes of a pixel that must pass through memory in a block, each tensor once.

    The stream of the residual additions is float32, the rest half precision. D is twice C.

    * addition and norm, twice: the stream is read and written, the branch read, and its norm written: 2 x 12 C
    * in_proj 2 C + 8 C; convolution with SiLU and edge weights 4 C + 4 C; x_proj 4 C
    * scan: each sweep reads x, 2 x 4 C, one writes and one reads its float32 sums, 2 x 8 C, and h is written, 4 C
    * gated norm 12 C + 4 C; out_proj 4 C + 2 C; fc1 2 C + 8 C; fc2 8 C + 2 C
    """
    return channels * (24 + 10 + 8 + 4 + 28 + 16 + 6 + 20)


def kernel_milliseconds(name: str, mode: str, training: bool) -> float:
    """The time in which kernels of a batch of 128 run. Where two run at once, it counts once: kernels are set up early,
    and wait for the one before them."""
    run = Run(name, 128, compile=compile_mode(mode))
    run.model.train(training)
    step = run.train if training else run.infer
    for _ in range(8):
        step(True)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(5):
            step(True)
        torch.cuda.synchronize()
    del run
    forget()
    ranges = [
        (event.time_range.start, event.time_range.end)
        for event in record.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    busy, end = 0.0, 0.0
    for start, stop in sorted(ranges):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 5e3


def kernel_rows(mode: str) -> Iterator[Row]:
    """The time of all kernels of a batch: in inference beside the time that the bytes of its blocks need at the copy
    bandwidth, in training beside that of the peer's kernels."""
    model = timm.create_model("grootv_tiny")
    pixels = [128 * (224 // info["reduction"]) ** 2 for info in model.feature_info]
    blocks = [
        (len(stage.blocks), info["num_chs"]) for stage, info in zip(model.stages, model.feature_info, strict=True)
    ]
    total = sum(count * n * block_bytes(channels) for n, (count, channels) in zip(pixels, blocks, strict=True))
    floor = 1e3 * total / copy_bandwidth()
    spent = kernel_milliseconds("grootv_tiny", mode, False)
    yield ["grootv_tiny, kernels of inference", mode, f"{spent:.2f} ms", f"{spent / floor:.2f} × {floor:.2f} ms"]
    own, peer = (kernel_milliseconds(name, mode, True) for name in ("grootv_tiny", PEER))
    against = f"{own / peer:.2f} × the {peer:.2f} ms of {PEER}"
    yield ["grootv_tiny, kernels of a training step", mode, f"{own:.2f} ms", against]


def fits(name: str, side: int) -> bool:
    """Whether a training step of one image fits into the memory of the GPU."""
    try:
        Run(name, 1, (side, side)).train(True)
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def largest_rows() -> Iterator[Row]:
    """The largest square image in training, of a side that is a multiple of 224."""
    sides = []
    for name in ("grootv_tiny", PEER):
        low, high = 4, 8
        while fits(name, 224 * high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(name, 224 * middle) else (low, middle)
        sides.append(224 * low)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    yield [f"grootv_tiny, largest image in training, {memory:.0f} GiB", "eager", f"{sides[0]}²", f"{PEER}: {sides[1]}²"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["models", "large", "latency", "host", "kernels", "largest"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--models", nargs="+", choices=PEERS, default=list(PEERS))
    modes = ["eager", "default", "reduce-overhead", "max-autotune"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes[:3])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="models that are compiled at a time; memory limits it")
    parser.add_argument("--name", default="compiled", help="of the file of results")
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    prepare()
    compiled = [mode for mode in args.modes if mode != "eager"]
    sources = {
        "models": lambda: model_rows(args.models, args.modes, args.repeats, args.jobs),
        "large": lambda: large_rows(args.modes[:2], args.repeats, args.jobs),
        "latency": latency_rows,
        "host": host_rows,
        "kernels": lambda: kernel_rows(compiled[0] if compiled else "eager"),
        "largest": largest_rows,
    }
    text = __doc__.partition("\n\n    python")[0] + "\n\n" + __doc__.rpartition("\n\n")[2].strip()
    command = " ".join(["python benchmarks/compiled.py", *shown_arguments()])
    head = ["what", "mode", "measured", "against"]
    rows: list[Row] = []

    def write(show: bool) -> None:
        sections = [text, table(head, rows)]
        publish("GrootV and its peers, eager and compiled", args.name, sections, command, args.commit, show=show)

    for part in args.parts:
        for row in sources[part]():
            print(" | ".join(row), flush=True)
            rows.append(row)
            write(show=False)  # the table so far, since what is compiled next can take long
    write(show=True)


if __name__ == "__main__":
    main()

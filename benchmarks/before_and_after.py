"""Eager training of two versions of a model in turn on one GPU: images a second, and the host's time for a step.

    pip install --no-deps --target BEFORE OTHER_CHECKOUT/ops OTHER_CHECKOUT
    python benchmarks/before_and_after.py BEFORE
    # A trial without a GPU:
    python benchmarks/before_and_after.py BEFORE --device cpu --model grootv_nano --peer resnet18 --batch 2 --turns 2

BEFORE is a folder with the packages `grootv` and `grootvl_ops` of the other version and its compiled libraries. Each
version trains in a process of its own, and a model of timm's as a control: forward, loss and backward in float16 by
autocast (on a CPU bfloat16). The three take turns of ten steps, since the speed of a shared host changes within a
minute. The host's time is the smallest of four steps that each begin with an idle GPU. The ratios are medians of those
of neighbouring turns, with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from report import prepare, publish, shown_arguments, table
from throughput import PEER, Run

ROOT = Path(__file__).resolve().parents[1]
IN_A_ROW = 10


def work(args: argparse.Namespace) -> None:
    """Train when a line arrives; print milliseconds of a step, and of the host for one."""
    prepare()
    run = Run(args.model, args.batch, (args.size, args.size), device=args.device)
    run.model.train()

    def wait() -> None:
        if args.device == "cuda":
            torch.cuda.synchronize()

    for _ in range(8 if args.device == "cuda" else 1):
        run.train(True)
    wait()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            run.train(True)
        wait()
        of_step = (time.perf_counter() - start) / IN_A_ROW
        of_host = []
        for _ in range(4):
            start = time.perf_counter()
            run.train(True)
            of_host.append(time.perf_counter() - start)
            wait()
        print(json.dumps([1e3 * of_step, 1e3 * min(of_host)]), flush=True)


class Turns:
    """A process that trains one model, with packages from some folders before all others."""

    def __init__(self, model: str, folders: list[Path], args: argparse.Namespace) -> None:
        settings = ["--model", model, "--batch", args.batch, "--size", args.size, "--device", args.device]
        command = [sys.executable, str(Path(__file__).resolve()), "-", "--work", *map(str, settings)]
        path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.milliseconds: list[tuple[float, float]] = []

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a training process ended with exit status {self.process.wait()}")
        return line

    def take(self) -> None:
        """Train for one turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.milliseconds.append(tuple(json.loads(self.read())))


def quartiles(values: list[float]) -> str:
    """The median, and in brackets the quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a folder with the packages of the other version")
    parser.add_argument("--model", default="grootv_tiny")
    parser.add_argument("--peer", default=PEER)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--turns", type=int, default=14)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--commit", help="the commits to name in the results")
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    if not (args.before / "grootv").is_dir():
        parser.error(f"{args.before} has no package grootv")
    if args.turns < 2:
        parser.error(f"--turns must be at least 2, got {args.turns}")
    kinds = {
        "before": Turns(args.model, [args.before.resolve()], args),
        "after": Turns(args.model, [ROOT], args),
        args.peer: Turns(args.peer, [ROOT], args),
    }
    try:
        for turns in kinds.values():
            turns.read()
        for _ in range(args.turns):
            for turns in kinds.values():
                turns.take()
    finally:
        for turns in kinds.values():
            turns.process.kill()
    rows = []
    for name, turns in kinds.items():
        of_step, of_host = zip(*turns.milliseconds, strict=True)
        images = 1e3 * args.batch / statistics.median(of_step)
        rows.append([name, f"{images:.0f}", quartiles(of_step), f"{min(of_host):.1f}", quartiles(of_host)])
    before, after = kinds["before"].milliseconds, kinds["after"].milliseconds
    faster, host = ([b[i] / a[i] for b, a in zip(before, after, strict=True)] for i in range(2))
    text = (
        f"Before divided by after, of turns that follow one another: a step {quartiles(faster)}, the host "
        f"{quartiles(host)}. More than one: the version after is faster."
    )
    head = ["", "images/s", "a step, ms", "host, least, ms", "host, ms"]
    command = " ".join(["python benchmarks/before_and_after.py", *shown_arguments()])
    title = f"Eager training of {args.model} before and after, {args.batch} images of {args.size}²"
    publish(title, f"before-and-after-{args.batch}", [table(head, rows), text], command, args.commit)


if __name__ == "__main__":
    main()

"""Timing on the GPU, and reports with hardware, versions and commit, for all benchmarks."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def prepare() -> None:
    """Settings of a process that measures models: a seed, TF32 products, and the fastest convolutions of cuDNN."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def hardware() -> str:
    """The GPU, or without one the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {len(names) or 'unknown'} cores"


def commit() -> str:
    """The checked-out commit, with a mark if files differ from it."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + " --- |" * len(head))
    return "\n".join(lines)


def shown_arguments() -> list[str]:
    """The arguments of this run without the name of the commit."""
    arguments = sys.argv[1:]
    if "--commit" in arguments:
        at = arguments.index("--commit")
        del arguments[at : at + 2]
    return arguments


def circumstances(commit_name: str | None = None) -> dict[str, str]:
    """Hardware, versions, commit and date of a measurement; `machine` is the hardware in a file's name."""
    machine = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-") if torch.cuda.is_available() else "cpu"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    return {
        "hardware": hardware(),
        "machine": machine,
        "versions": versions,
        "commit": commit_name or commit(),
        "date": str(datetime.date.today()),
    }


def publish(
    title: str,
    name: str,
    sections: Sequence[str],
    command: str,
    commit_name: str | None = None,
    measured: dict[str, str] | None = None,
    show: bool = True,
) -> Path:
    """Write a report to benchmarks/results/NAME-MACHINE.md, with hardware, versions, commit and date; `show` prints it.

    They are those of now, or the `circumstances` of an earlier measurement.
    """
    at = measured or circumstances(commit_name)
    facts = f"Measured on {at['hardware']}; {at['versions']}; commit {at['commit']}; {at['date']}.\n\n    {command}"
    text = "\n\n".join([f"# {title}", facts, *sections]) + "\n"
    if show:
        print(text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{at['machine']}.md"
    path.write_text(text)
    return path


def graph_milliseconds(calls: Sequence[Callable[[], object]], rounds: int = 10, repeats: int = 15) -> float:
    """Median milliseconds of one call, from replays of a CUDA graph of all `calls`, each on its own data.

    The graph contains the calls `rounds` times, because its start takes some microseconds.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
    graph.replay()
    return event_milliseconds(graph.replay, repeats) / (rounds * len(calls))


def event_milliseconds(call: Callable[[], object], repeats: int, warmup: int = 1, in_a_row: int = 1) -> float:
    """Median milliseconds of a call on the GPU, from events around `in_a_row` calls."""
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(in_a_row):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / in_a_row)
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes a second that a large copy on the GPU reads and writes."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * event_milliseconds(lambda: target.copy_(source), 9))

"""GrootV against timm's Swin and ConvNeXt on one GPU, eager and with torch.compile, in one table.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --parts models large --modes eager default max-autotune
    python benchmarks/compiled.py --parts largest

Float16 by autocast, batch 128 of 224 x 224 unless stated otherwise. Each ratio is to the peer of the same size, in the
same mode and the same run. Training is forward, loss and backward, without an optimizer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import timm
import torch
from report import copy_bandwidth, event_milliseconds, graph_milliseconds, publish, shown_arguments, table
from throughput import PEER, Run
from torch.profiler import ProfilerActivity, profile

PEERS = {
    "grootv_tiny": PEER,
    "grootv_small": "swin_small_patch4_window7_224",
    "grootv_base": "swin_base_patch4_window7_224",
    "convnext_tiny": PEER,
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


def measure(name: str, mode: str, batch: int, size: tuple[int, int], repeats: int) -> tuple[float, float, float]:
    """Images a second in inference and in training, and the peak memory of training in GiB."""
    run = Run(name, batch, size, compile_mode(mode))
    inference, _ = run.throughput(False, True, repeats)
    training, memory = run.throughput(True, True, repeats)
    del run
    forget()
    return inference, training, memory


def model_rows(models: list[str], modes: list[str], repeats: int) -> Iterator[Row]:
    """Throughput and memory of the models and their peers."""
    for mode in modes:
        done: dict[str, tuple[float, float, float]] = {}
        for name in models:
            for wanted in (PEERS[name], name):
                if wanted not in done:
                    done[wanted] = measure(wanted, mode, 128, (224, 224), repeats)
            units = ("images/s", "images/s", "GiB")
            for what, unit, own, peer in zip(
                ("inference", "training", "memory"), units, done[name], done[PEERS[name]], strict=True
            ):
                digits = 1 if unit == "GiB" else 0
                yield [f"{name}, {what}", mode, f"{own:.{digits}f} {unit}", f"{own / peer:.2f} × {PEERS[name]}"]


def large_rows(modes: list[str], repeats: int) -> Iterator[Row]:
    """Training at the sizes of detection and segmentation."""
    for mode in modes:
        for batch, size in LARGE:
            own, peer = (1e3 * batch / measure(name, mode, batch, size, repeats)[1] for name in ("grootv_tiny", PEER))
            shape = "×".join(map(str, (batch, 3, *size)))
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
    """How long the host needs to launch a training step, and the GPU to run it."""
    run = Run("grootv_tiny", 128)
    run.model.train()
    on_gpu = event_milliseconds(lambda: run.train(True), 7, warmup=8, in_a_row=5)
    on_host = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run.train(True)
        on_host.append(1e3 * (time.perf_counter() - start))
    host = sorted(on_host)[len(on_host) // 2]
    yield ["grootv_tiny, host in a training step", "eager", f"{host:.1f} ms", f"{host / on_gpu:.2f} × {on_gpu:.1f} ms"]


def block_bytes(channels: int) -> int:
    """Bytes of a pixel that must pass through memory in a block, each tensor once.

    The stream of the residual additions is float32, the rest half precision. D is twice C.

    * addition and norm, twice: the stream is read and written, the branch read, and its norm written: 2 x 12 C
    * in_proj 2 C + 8 C; convolution with SiLU and edge weights 4 C + 4 C; x_proj 4 C
    * scan: each sweep reads x, 2 x 4 C, one writes and one reads its float32 sums, 2 x 8 C, and h is written, 4 C
    * gated norm 12 C + 4 C; out_proj 4 C + 2 C; fc1 2 C + 8 C; fc2 8 C + 2 C
    """
    return channels * (24 + 10 + 8 + 4 + 28 + 16 + 6 + 20)


def kernel_rows(mode: str) -> Iterator[Row]:
    """The time of all kernels of a batch, beside the time that the bytes of its blocks need at the copy bandwidth."""
    run = Run("grootv_tiny", 128, compile=compile_mode(mode))
    model = timm.create_model("grootv_tiny")
    pixels = [128 * (224 // info["reduction"]) ** 2 for info in model.feature_info]
    blocks = [
        (len(stage.blocks), info["num_chs"]) for stage, info in zip(model.stages, model.feature_info, strict=True)
    ]
    total = sum(count * n * block_bytes(channels) for n, (count, channels) in zip(pixels, blocks, strict=True))
    floor = 1e3 * total / copy_bandwidth()
    run.model.eval()
    for _ in range(8):
        run.infer(True)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(5):
            run.infer(True)
        torch.cuda.synchronize()
    spent = sum(event.self_device_time_total for event in record.key_averages()) / 5e3
    del run
    forget()
    yield ["grootv_tiny, kernels of inference", mode, f"{spent:.2f} ms", f"{spent / floor:.2f} × {floor:.2f} ms"]


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
    parser.add_argument("--name", default="compiled", help="of the file of results")
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    compiled = [mode for mode in args.modes if mode != "eager"]
    sources = {
        "models": lambda: model_rows(args.models, args.modes, args.repeats),
        "large": lambda: large_rows(args.modes[:2], args.repeats),
        "latency": latency_rows,
        "host": host_rows,
        "kernels": lambda: kernel_rows(compiled[0] if compiled else "eager"),
        "largest": largest_rows,
    }
    rows = []
    for part in args.parts:
        for row in sources[part]():
            print(" | ".join(row), flush=True)
            rows.append(row)
    text = __doc__.partition("\n\n    python")[0] + "\n\n" + __doc__.rpartition("\n\n")[2].strip()
    command = " ".join(["python benchmarks/compiled.py", *shown_arguments()])
    head = ["what", "mode", "measured", "against"]
    publish("GrootV and its peers, eager and compiled", args.name, [text, table(head, rows)], command, args.commit)


if __name__ == "__main__":
    main()

"""Latency of one image on the CPU: GrootV against a peer of timm's, in turns.

    python benchmarks/cpu_latency.py                     # grootv_tiny against swin_tiny, 224 x 224, two threads
    python benchmarks/cpu_latency.py --model grootv_nano --peer mambaout_femto --size 160
    python benchmarks/cpu_latency.py --int8              # linear layers by PyTorch's dynamic quantisation
    python benchmarks/cpu_latency.py --compile           # by torch.compile

Each model has a process of its own, since models that share a process share a heap: what one of them gives back to the
system, the other has to ask for again. They take turns, so that both see the same machine. The weights pass through a
file, as in use. Prints the median latencies and their ratio, how much int8 changes the logits, and the share of the
operations of `grootvl_ops` in the model's forward pass. Run it on a machine that does nothing else.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.profiler import ProfilerActivity, profile

import grootv  # noqa: F401 (registers the models)
import grootvl_ops


def operation_shares(model: Callable[[Tensor], Tensor], image: Tensor, rounds: int = 5) -> dict[str, float]:
    """Share of each tree operation in the time of the model's forward pass."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            model(image)
    averages = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    return {
        event.key.removeprefix("grootvl_ops::"): event.cpu_time_total / total
        for event in averages
        if event.key.startswith("grootvl_ops::")
    }


def serve(name: str, size: int, threads: int, int8: bool, compile: bool) -> None:
    """Answer each line of the standard input with the milliseconds of a forward pass, and its end with the rest.

    The pass before is not counted: it wakes up the threads, and fills the caches that the other model has used.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    image, model = torch.randn(1, 3, size, size), timm.create_model(name).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    del file
    with torch.inference_mode():
        exact = model(image)
        run = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8) if int8 else model
        change = (run(image) - exact).norm() / exact.norm()
        if compile:
            run = torch.compile(run)
        for _ in sys.stdin:
            run(image)
            start = time.perf_counter()
            run(image)
            print(1e3 * (time.perf_counter() - start), flush=True)
        print(json.dumps({"change": change.item(), "shares": operation_shares(run, image)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="grootv_tiny")
    parser.add_argument("--peer", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--size", type=int, default=224, help="side of the square image, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--int8", action="store_true", help="quantise the linear layers")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.size, args.threads, args.int8, args.compile)
        return

    names = (args.model, args.peer)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--serve", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    latencies: list[list[float]] = [[] for _ in names]
    for i in range(3 + args.rounds):  # three to warm up
        for process, record in zip(processes, latencies, strict=True):
            process.stdin.write("\n")
            process.stdin.flush()
            milliseconds = float(process.stdout.readline())
            if i >= 3:
                record.append(milliseconds)
    results = [json.loads(process.communicate()[0]) for process in processes]

    latency, peer_latency = map(statistics.median, latencies)
    precision = "int8 linear layers" if args.int8 else "float32"
    compiled = ", compiled" if args.compile else ""
    print(f"torch {torch.__version__}, {args.threads} threads, {precision}{compiled}, one image of {args.size}²")
    print(f"operations: {grootvl_ops.backend('cpu')}")
    for name, result, milliseconds in zip(names, results, (latency, peer_latency), strict=True):
        change = f", logits change by {result['change']:.1%}" if args.int8 else ""
        print(f"{name:32s} {milliseconds:8.1f} ms{change}")
    print(f"ratio {latency / peer_latency:.2f} (medians of {args.rounds})")
    shares = results[0]["shares"]
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    print(f"operations of grootvl_ops: {sum(shares.values()):.1%} of the forward pass ({parts})")


if __name__ == "__main__":
    main()

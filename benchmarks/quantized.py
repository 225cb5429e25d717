"""Inference with int8 and float8 linear layers by torchao, beside bfloat16, on one GPU.

    python benchmarks/quantized.py
    python benchmarks/quantized.py --jobs 6              # six models compile at a time, and are measured alone
    python benchmarks/quantized.py --models grootv_tiny --precisions int8 float8 --layers large --mode max-autotune
    python benchmarks/quantized.py --search              # with torchao's settings of the compiler: takes much longer
    python benchmarks/quantized.py --device cpu --models grootv_nano --batch 2 --size 64 --mode default \\
        --precisions int8 float8                         # a trial without a GPU

Needs torchao: pip install torchao. The whole model is in bfloat16, without autocast, and compiled, in the same way for
all but the precisions that say otherwise. With --search, the quantised ones are compiled with torchao's settings: the
compiler searches for the fastest shape of each Triton kernel, and int8 products and their scales are one such kernel.
The precisions:

* bfloat16: the model as it is. The others are compared with it, and it is always measured.
* tuned: bfloat16, with the settings that torchao makes for the compiler, which then searches for faster Triton kernels.
* int8: activations, quantised in each call, and weights (Int8DynamicActivationInt8WeightConfig).
* int8-weights: weights alone (Int8WeightOnlyConfig).
* int8-weights-mm: the same, where the compiler converts the weights and multiplies in bfloat16. Otherwise it calls
  PyTorch's kernel for int8 weights, if PyTorch has oneDNN.
* float8: activations and weights, each with a scale for a row (Float8DynamicActivationFloat8WeightConfig).
* float8-weights: weights alone (Float8WeightOnlyConfig).

With the layers "all", torchao chooses: for float8 activations the linear layers whose sizes are multiples of 16,
otherwise every one. With "large", x_proj and dt_proj of the mixers stay in bfloat16. They are small, the scan takes the
weights of a plain dt_proj, and PyTorch's int8 products on a GPU need multiples of eight, which most of them lack.
Where both are the same, "large" is left out.

Each measurement has a process of its own. One that fails is a row with the reason; its traceback goes to stderr. The
report is written again after each measurement, so that a run that is cut keeps what it has. If --jobs is larger than 1,
the search for faster kernels times them while other models compile.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import re
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from report import event_milliseconds, prepare, publish, shown_arguments, table
from throughput import PEER, Run
from torch import Tensor, nn

# The name in the table, and torchao's configuration.
PRECISIONS: dict[str, tuple[str, str | None]] = {
    "bfloat16": ("bfloat16", None),
    "tuned": ("bfloat16, torchao's settings of the compiler", None),
    "int8": ("int8 activations and weights", "Int8DynamicActivationInt8WeightConfig"),
    "int8-weights": ("int8 weights", "Int8WeightOnlyConfig"),
    "int8-weights-mm": ("int8 weights, multiplied in bfloat16", "Int8WeightOnlyConfig"),
    "float8": ("float8 activations and weights, per row", "Float8DynamicActivationFloat8WeightConfig"),
    "float8-weights": ("float8 weights", "Float8WeightOnlyConfig"),
}
SMALL = ("x_proj", "dt_proj")
HEAD = ("model", "precision", "layers", "quantised", "images/s", "÷ bfloat16", "change of the logits", "weights, MiB")


class Setting(NamedTuple):
    """What all measurements of a run have in common."""

    batch: int
    size: int
    mode: str
    search: bool
    device: str
    repeats: int


class Case(NamedTuple):
    """A model in a precision."""

    model: str
    precision: str
    layers: str = "all"


class Measured(NamedTuple):
    """Images a second, the logits of the compiled model, MiB of its weights, and its linear layers."""

    images: float
    logits: np.ndarray
    weights: float
    quantised: list[str]
    others: list[str]


def quantise(model: nn.Module, precision: str, layers: str, search: bool) -> None:
    """Replace the weights of linear layers by those of a precision, and make settings of the compiler for it."""
    from torch._inductor import config as compiler
    from torchao import quantization
    from torchao.quantization.utils import recommended_inductor_config_setter

    if precision == "tuned":
        recommended_inductor_config_setter()
    if precision == "int8-weights-mm":
        torch.backends.mkldnn.set_flags(False)  # without oneDNN, the compiler does not look for such products
        compiler.force_disable_caches = True  # they do not tell such code from other code
    name = PRECISIONS[precision][1]
    if name is None:
        return
    options: dict[str, Any] = {"set_inductor_config": search}
    if precision == "float8":
        options["granularity"] = quantization.PerRow()
    chosen: dict[str, Any] = {}
    if layers == "large":
        chosen["filter_fn"] = lambda module, path: isinstance(module, nn.Linear) and not path.endswith(SMALL)
    with torch.no_grad():
        quantization.quantize_(model, getattr(quantization, name)(**options), **chosen)


def is_quantised(weight: Tensor) -> bool:
    """Whether it is a tensor of torchao's, which consists of others."""
    return hasattr(type(weight), "__tensor_flatten__")


def nbytes(weight: Any) -> int:
    """Of a tensor, or of those that a quantised one consists of."""
    if not is_quantised(weight):
        return weight.nbytes
    return sum(nbytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])


def milliseconds(run: Run, repeats: int) -> float:
    """Median time of a batch, on a GPU as of `Run`. What is very slow runs fewer times."""
    start = time.perf_counter()
    run.infer(False)
    if run.device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run.infer(False)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    torch.cuda.synchronize()
    if time.perf_counter() - start > 0.5:
        return event_milliseconds(lambda: run.infer(False), 3)
    return run.milliseconds(False, False, repeats)


def measure(case: Case, setting: Setting, parent: Connection) -> None:
    """In a process of its own: compile, say so, wait for the turn, and send a `Measured`; or why there is none."""
    try:
        prepare()
        start = time.perf_counter()
        run = Run(case.model, setting.batch, (setting.size, setting.size), device=setting.device)
        model = run.model.eval().to(torch.bfloat16)
        run.images = run.images.to(torch.bfloat16)
        quantise(model, case.precision, case.layers, setting.search)
        linear = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        quantised = [name for name, weight in linear.items() if is_quantised(weight)]
        if setting.mode != "eager":
            run.model = torch.compile(model, fullgraph=True, dynamic=False, mode=setting.mode)
        for _ in range(3):  # the third is the first that replays CUDA graphs
            run.infer(False)
        with torch.inference_mode():
            logits = run.model(run.images).float().cpu().numpy()
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        name = " ".join(case)
        print(f"{name}: compiled after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        parent.send(None)
        parent.recv()
        images = 1e3 * setting.batch / milliseconds(run, setting.repeats)
        weights = sum(map(nbytes, model.parameters())) / 2**20
        parent.send(Measured(images, logits, weights, quantised, [name for name in linear if name not in quantised]))
    except Exception as error:
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        parent.send(f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__)


def answer(process: BaseProcess, child: Connection, turn: bool = False) -> Any:
    """What a process sends next, with `turn` after it was told to measure; or how it ended without."""
    try:
        if turn:
            child.send(None)
        return child.recv()
    except (EOFError, OSError):
        process.join()
        return f"the process ended with exit code {process.exitcode}"


def measure_all(cases: list[Case], setting: Setting, jobs: int) -> Iterator[tuple[Case, Measured | str]]:
    """Measure each case in a process of its own, alone on the GPU; `jobs` of them compile at a time."""
    context = multiprocessing.get_context("spawn")
    for some in (cases[start : start + jobs] for start in range(0, len(cases), jobs)):
        running: list[tuple[Case, BaseProcess, Connection]] = []
        for case in some:
            child, parent = context.Pipe()
            process = context.Process(target=measure, args=(case, setting, parent), daemon=True)
            process.start()
            parent.close()  # so that reading ends if the process dies
            running.append((case, process, child))
        failures = [answer(process, child) for _, process, child in running]  # all compile before one is measured
        for (case, process, child), failure in zip(running, failures, strict=True):
            yield case, failure or answer(process, child, turn=True)
            process.join(60)


class Report:
    """The table so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.done: dict[Case, Measured | str] = {}

    def add(self, case: Case, result: Measured | str) -> None:
        """Append a measurement, or the reason why there is none, and write the report."""
        self.done[case] = result
        print(" | ".join(self.row(case)), flush=True)
        self.write()

    def differs(self, case: Case) -> bool:
        """Whether all layers, which are done, are others than the large ones; if they failed, whether they may be."""
        whole = self.done[case._replace(layers="all")]
        if isinstance(whole, Measured):
            return any(name.endswith(SMALL) for name in whole.quantised)
        base = self.done[Case(case.model, "bfloat16")]
        return isinstance(base, Measured) and any(name.endswith(SMALL) for name in base.others)

    def row(self, case: Case) -> list[str]:
        """Of the table."""
        result, base = self.done[case], self.done[Case(case.model, "bfloat16")]
        shown = [case.model, PRECISIONS[case.precision][0], case.layers if PRECISIONS[case.precision][1] else "–"]
        if isinstance(result, str):
            return [*shown, "–", "not measured: " + result.replace("|", "\\|"), "–", "–", "–"]
        count = f"{len(result.quantised)} of {len(result.quantised) + len(result.others)}"
        if result.quantised and result.others:
            # Without the numbers of stage and block.
            count += f", not {', '.join(dict.fromkeys(re.sub(r'.*[0-9][.]', '', name) for name in result.others))}"
        ratio, change = "–", "–"
        if isinstance(base, Measured):
            ratio = f"{result.images / base.images:.2f} ×"
            if case.precision != "bfloat16":
                change = f"{np.linalg.norm(result.logits - base.logits) / np.linalg.norm(base.logits):.2%}"
        images = f"{result.images:.{0 if result.images > 200 else 1}f}"
        return [*shown, count, images, ratio, change, f"{result.weights:.1f}"]

    def write(self, show: bool = False) -> None:
        """Write the report."""
        args = self.args
        compiled = "in eager mode" if args.mode == "eager" else f"compiled in the mode {args.mode}"
        if args.search:
            compiled += ", quantised models with torchao's settings of the compiler"
        text = (
            f"Inference, batch {args.batch}, {args.size} × {args.size}, {compiled}, by torchao "
            f"{importlib.metadata.version('torchao')}. All else is in bfloat16, without autocast. Quantised: how many "
            "linear layers, of how many. Change of the logits: the norm of the difference from those of bfloat16, over "
            "their norm, with the same random weights and images. Weights: all parameters. What the precisions and "
            "layers are: the docstring of the script."
        )
        order = list(PRECISIONS)
        cases = sorted(self.done, key=lambda c: (args.models.index(c.model), order.index(c.precision), c.layers))
        command = " ".join(["python benchmarks/quantized.py", *shown_arguments()])
        sections = [text, table(HEAD, [self.row(case) for case in cases])]
        publish("Int8 and float8 linear layers by torchao", args.name, sections, command, args.commit, show=show)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["grootv_tiny", PEER])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--layers", nargs="+", choices=["all", "large"], default=["all", "large"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="side of the square images, in pixels")
    modes = ["eager", "default", "reduce-overhead", "max-autotune"]
    parser.add_argument("--mode", choices=modes, default="reduce-overhead", help="of torch.compile")
    parser.add_argument("--search", action="store_true", help="torchao's settings of the compiler")
    parser.add_argument("--repeats", type=int, default=5, help="of five batches in a row each, on a CPU of one")
    parser.add_argument("--jobs", type=int, default=1, help="models that are compiled at a time; memory limits it")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--name", default="quantized", help="of the file of results")
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    args.models = list(dict.fromkeys(args.models))
    unknown = [name for name in args.models if not timm.is_model(name)]
    if unknown:
        parser.error(f"timm has no model {', '.join(unknown)}")
    try:
        importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("torchao is not installed: pip install torchao") from None
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU; --device cpu makes a trial without one")

    setting = Setting(args.batch, args.size, args.mode, args.search, args.device, args.repeats)
    report = Report(args)
    plain = ["bfloat16", "tuned"] if "tuned" in args.precisions else ["bfloat16"]
    precisions = [precision for precision in dict.fromkeys(args.precisions) if PRECISIONS[precision][1]]
    first = "all" if "all" in args.layers else "large"
    cases = [Case(model, precision) for model in args.models for precision in plain]
    cases += [Case(model, precision, first) for model in args.models for precision in precisions]
    for case, result in measure_all(cases, setting, args.jobs):
        report.add(case, result)
    if {"all", "large"} <= set(args.layers):
        cases = [Case(model, precision, "large") for model in args.models for precision in precisions]
        for case, result in measure_all(list(filter(report.differs, cases)), setting, args.jobs):
            report.add(case, result)
    report.write(show=True)


if __name__ == "__main__":
    main()

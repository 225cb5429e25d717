"""GrootL beside transformers' Mamba on one GPU, with the shapes of Mamba-130M and random weights, in bfloat16.

    python benchmarks/language.py
    python benchmarks/language.py --lengths      # only GrootL's prompts from 128 to 65,536 tokens

Mamba runs as transformers has it: with its fused kernels where the packages mamba-ssm and causal-conv1d are there, else
one token after the other, so that its prefill and training are slow.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from report import event_milliseconds, publish, table
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import grootl
from grootl.trees import prompt_edges, prompt_tree

SHAPE = {"vocab_size": 50_280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16}
LENGTHS = (128, 512, 2048, 8192, 32_768, 65_536)
DECODED = 64


def make(kind: str, layers: int) -> nn.Module:
    shape = SHAPE | {"num_hidden_layers": layers}
    if kind == "Mamba":
        model = MambaForCausalLM(MambaConfig(**shape))
    else:
        model = grootl.GrootLForCausalLM(grootl.GrootLConfig(**shape))
    return model.cuda().bfloat16()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (batch, length), device="cuda")


@torch.no_grad()
def prefill_milliseconds(model: nn.Module, batch: int, length: int, repeats: int) -> float:
    """A whole prompt, and the logits of its last token."""
    ids = tokens(batch, length)
    warmup = 2 if repeats > 1 else 0
    return event_milliseconds(lambda: model.eval()(ids, use_cache=False, logits_to_keep=1), repeats, warmup)


def training(model: nn.Module, batch: int, length: int, repeats: int) -> tuple[float, float]:
    """Milliseconds of forward, loss and backward, of which the first half of each row is the prompt, and GiB."""
    ids = tokens(batch, length)
    labels = ids.clone()
    labels[:, : length // 2] = -100

    def step() -> None:
        model.train()(ids, labels=labels, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    milliseconds = event_milliseconds(step, repeats, 2 if repeats > 1 else 0)
    return milliseconds, torch.cuda.max_memory_allocated() / 2**30


@torch.no_grad()
def decoding_milliseconds(models: list[nn.Module], batch: int, repeats: int) -> list[float]:
    """Of each token after the first, greedily, for each of the models.

    This waits for the host, whose speed changes: the models take turns, and the fastest of some runs counts.
    """
    ids = tokens(batch, 64)

    def seconds(model: nn.Module, count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.eval().generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for model in models:
        seconds(model, 2)
    turns = [[(seconds(model, 1), seconds(model, 1 + DECODED)) for model in models] for _ in range(repeats)]
    fastest = [[min(times) for times in zip(*of_model, strict=True)] for of_model in zip(*turns, strict=True)]
    return [1e3 * (more - one) / DECODED for one, more in fastest]


@torch.no_grad()
def tree_milliseconds(batch: int, length: int, repeats: int) -> float:
    """The trees of all layers of a prompt, as the mixers build them."""
    config = grootl.GrootLConfig(**SHAPE)
    u, dt = torch.randn(2, batch, length, config.intermediate_size, device="cuda")
    B = torch.randn(batch, length, config.state_size, device="cuda")
    start = torch.zeros(batch, dtype=torch.long, device="cuda")

    def build() -> None:
        edges = prompt_edges(start, start + length, length, config.neighbours)
        for _ in range(config.num_hidden_layers):
            prompt_tree(F.softplus(dt) * u, B, edges, config.neighbours)

    return event_milliseconds(build, repeats, 2)


def measure(
    name: str, measurement: Callable[..., object], layers: int, *arguments: object, compiled: bool = False
) -> object:
    """One measurement of a new model, whose memory is free again afterwards."""
    torch.manual_seed(0)
    model = make(name, layers)
    if compiled:
        compile_layers(model)
    result = measurement(model, *arguments)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return result


def compile_layers(model: nn.Module) -> None:
    """The layers have the same code. It is compiled twice for each size, because the first layer's input is in half
    precision."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.backbone.layers:
        layer.compile(dynamic=False)


def fused_kernels() -> str | None:
    """The packages whose kernels transformers' Mamba runs on, or None if it has none."""
    packages = ("mamba-ssm", "causal-conv1d")
    try:
        for package in packages:
            importlib.import_module(package.replace("-", "_"))
    except ImportError:
        return None
    return " and ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


@torch.no_grad()
def captured_milliseconds(model: nn.Module, batch: int, length: int, repeats: int) -> float:
    """As `prefill_milliseconds`, by a CUDA graph: what the GPU needs without the host."""
    ids = tokens(batch, length)

    def run() -> object:
        return model.eval()(ids, use_cache=False, logits_to_keep=1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return event_milliseconds(graph.replay, repeats, 2)


def of_lengths(
    milliseconds: Callable[..., float], model: nn.Module, repeats: int, total: int | None = None
) -> list[str]:
    """A cell for each length: the time, the time a token, and its ratio to the best length.

    Of one prompt, or of as many as have `total` tokens together.
    """
    batches = [1 if total is None else total // length for length in LENGTHS]
    shapes = list(zip(batches, LENGTHS, strict=True))
    times = [milliseconds(model, batch, length, repeats) for batch, length in shapes]
    per_token = [1e3 * ms / (batch * length) for ms, (batch, length) in zip(times, shapes, strict=True)]
    best = min(per_token)
    return [f"{ms:.1f} ms, {each:.1f} µs ({each / best:.1f} ×)" for ms, each in zip(times, per_token, strict=True)]


class Control(nn.Module):
    """The blocks of ViT-B on a sequence of tokens. They have 85 million parameters, 24 layers of Mamba-130M have 91."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = timm.create_model("vit_base_patch16_224").blocks

    def forward(self, ids: torch.Tensor, **_: object) -> torch.Tensor:
        weight = self.blocks[0].norm1.weight
        return self.blocks(torch.zeros(*ids.shape, len(weight), dtype=weight.dtype, device=weight.device))


def prefill_of_lengths(layers: int, repeats: int) -> list[str]:
    """Sections of a report: the time a token for prompts of several lengths, of one prompt and of many."""
    torch.manual_seed(0)
    model, control = make("GrootL", layers), Control().cuda().bfloat16()
    total = max(LENGTHS)
    of_one = {
        "eager": of_lengths(prefill_milliseconds, model, repeats),
        "CUDA graph": of_lengths(captured_milliseconds, model, repeats),
    }
    of_many = of_lengths(prefill_milliseconds, model, repeats, total)
    compile_layers(model)
    of_one["compiled, CUDA graph"] = of_lengths(captured_milliseconds, model, repeats)
    of_one["ViT-B, CUDA graph"] = of_lengths(captured_milliseconds, control, repeats)
    return [
        "Prefill of one prompt by GrootL, and as many tokens through the blocks of ViT-B (timm): time, and time a "
        "token; in brackets the ratio to the best length.",
        table(["tokens", *of_one], list(zip(LENGTHS, *of_one.values(), strict=True))),
        f"Prefill of {total} tokens in prompts of one length by GrootL.",
        table(["tokens a prompt", "eager"], list(zip(LENGTHS, of_many, strict=True))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--lengths", action="store_true", help="only the time of prompts of several lengths")
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    repeats, layers = args.repeats, args.layers
    fused = fused_kernels()

    def both(measurement: Callable[..., object], *arguments: int) -> tuple[object, object]:
        mamba = measure("Mamba", measurement, layers, *arguments, repeats if fused else 1)
        return mamba, measure("GrootL", measurement, layers, *arguments, repeats)

    def compiled(measurement: Callable[..., object], *arguments: int) -> object:
        return measure("GrootL", measurement, layers, *arguments, repeats, compiled=True)

    if args.lengths:
        sections = [f"{layers} layers, bfloat16.", *prefill_of_lengths(layers, repeats)]
        publish(
            "Prompts of several lengths", "language-lengths", sections, "python benchmarks/language.py --lengths",
            args.commit,
        )  # fmt: skip
        return
    rows = []
    mamba, ours = both(prefill_milliseconds, 8, 2048)
    rows.append(["prefill, 8×2048", f"{mamba:.0f} ms", f"{ours:.1f} ms", f"{ours / mamba:.3f} × the time"])
    trees = tree_milliseconds(8, 2048, repeats) * layers / SHAPE["num_hidden_layers"]
    rows.append(["of which trees", "", f"{trees:.1f} ms", f"{100 * trees / ours:.0f} % of GrootL's prefill"])
    ours = compiled(prefill_milliseconds, 8, 2048)
    rows.append(["GrootL's layers compiled", "", f"{ours:.1f} ms", f"{ours / mamba:.3f} × the time"])
    for batch in (8, 2):  # of 8 rows, the peer may need more memory than the GPU has
        try:
            (mamba, peer_memory), (ours, memory) = both(training, batch, 512)
        except torch.OutOfMemoryError:
            ours, memory = measure("GrootL", training, layers, batch, 512, repeats)
            rows.append([f"training, {batch}×512", "out of memory", f"{ours:.1f} ms, {memory:.1f} GiB", ""])
            continue
        rows.append(
            [f"training, {batch}×512", f"{mamba:.0f} ms, {peer_memory:.1f} GiB", f"{ours:.1f} ms, {memory:.1f} GiB",
             f"{ours / mamba:.3f} × the time, {memory / peer_memory:.2f} × the memory"]
        )  # fmt: skip
        ours, memory = compiled(training, batch, 512)
        rows.append(
            ["GrootL's layers compiled", "", f"{ours:.1f} ms, {memory:.1f} GiB",
             f"{ours / mamba:.3f} × the time, {memory / peer_memory:.2f} × the memory"]
        )  # fmt: skip
    models = [make(kind, layers) for kind in ("Mamba", "GrootL")]
    for batch in (1, 8):
        mamba, ours = decoding_milliseconds(models, batch, repeats)
        rows.append(
            [f"decoding, batch {batch}", f"{mamba:.2f} ms a token", f"{ours:.2f} ms a token",
             f"{ours / mamba:.2f} × the time"]
        )  # fmt: skip
    del models
    torch.cuda.empty_cache()

    how = f"with the kernels of {fused}" if fused else "without fused kernels, which this machine lacks"
    text = f"{layers} layers, bfloat16. Mamba is transformers' {how}. Training: forward, loss and backward."
    sections = [
        text,
        table(["what", "Mamba", "GrootL", "GrootL against Mamba"], rows),
        *prefill_of_lengths(layers, repeats),
    ]
    publish("GrootL beside Mamba", "language", sections, "python benchmarks/language.py", args.commit)


if __name__ == "__main__":
    main()

"""The scans side by side: small models under one recipe, on emoji by an artist that they have not seen.

    python tools/make_emoji.py data/emoji.npz
    python benchmarks/compare_scans.py train data/emoji.npz --jobs 4          # every row with three seeds
    python benchmarks/compare_scans.py speed                                  # alone on the GPU
    python benchmarks/compare_scans.py report                                 # table and plot

`train` writes one file for each row and seed into --work-dir and leaves out those that are there, so that it continues
where it was stopped. Rows are `ROWS`: sizes are chosen so that all have about the parameters of `grootv_nano`.

The recipe is the same for all: AdamW, 1500 steps of 256 images (see `--help` for the rest), linear warm-up and cosine,
label smoothing 0.1, stochastic depth 0.1, random zoom, rotation, shift, mirroring and colours, bfloat16 by autocast.
The whole data set is in the GPU's memory, where it is augmented.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import textwrap
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from report import RESULTS, circumstances, graph_milliseconds, prepare, publish, table
from scipy.stats import t as student
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import grootv  # noqa: F401 (registers the models)
from grootv.layers import SS2D
from grootv.sample_data.emoji import HELD_OUT_ARTIST, load_emoji

# timm's arguments of each row: GrootV's scans, GrootV with the mixer of VMamba, and other networks. The sizes of the
# last two give about the parameters of `grootv_nano`.
ROWS: dict[str, dict[str, Any]] = {
    "tree": {"model_name": "grootv_nano"},
    "raster": {"model_name": "grootv_nano", "scan": "raster"},
    "bidirectional": {"model_name": "grootv_nano", "scan": "bidirectional"},
    "cross": {"model_name": "grootv_nano", "scan": "cross"},
    "tree, Euclidean": {"model_name": "grootv_nano", "metric": "euclidean"},
    "tree, Manhattan": {"model_name": "grootv_nano", "metric": "manhattan"},
    "tree, first root": {"model_name": "grootv_nano", "root": "first"},
    "tree, last root": {"model_name": "grootv_nano", "root": "last"},
    "tree per stage": {"model_name": "grootv_nano", "tree_per": "stage"},
    "SS2D": {"model_name": "grootv_nano", "mixer": partial(SS2D, expand=2)},
    "VMamba": {"model_name": "vmamba_nano"},
    "MambaOut": {"model_name": "mambaout_femto", "depths": (1, 1, 4, 1), "dims": (48, 96, 160, 256)},
    "ConvNeXt": {"model_name": "convnext_atto", "depths": (2, 2, 8, 2), "dims": (32, 64, 128, 256)},
}
SIZE = 128
PAGE = RESULTS.parents[1] / "docs" / "scans.md"
PICTURES = PAGE.parent / "images"


def make(row: str, num_classes: int) -> nn.Module:
    """The model of a row, with random weights."""
    return timm.create_model(**ROWS[row], num_classes=num_classes, drop_path_rate=0.1)


@cache
def data_on(device: str, file: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor, int]:
    """Images (N, 3, S, S) uint8, labels (N,), and the number of classes."""
    emoji = load_emoji(file, split)
    images = torch.from_numpy(emoji.images[:limit]).permute(0, 3, 1, 2)
    return images.to(device), torch.from_numpy(emoji.labels[:limit]).to(device), len(emoji.classes)


def normalised(images: Tensor) -> Tensor:
    """uint8 as float32 from -1 to 1."""
    return images.float() / 127.5 - 1


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W) uint8 as float32 from about -1 to 1, each image zoomed, turned, shifted, mirrored and recoloured."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator, device=images.device)

    x = normalised(images)
    zoom, angle, shift = uniform(0.8, 1.3), uniform(-0.35, 0.35), uniform(-0.15, 0.15, 2)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    transform = torch.stack((mirror * cos, -sin, shift[:, 0], mirror * sin, cos, shift[:, 1]), 1).view(-1, 2, 3)
    x = F.grid_sample(x, F.affine_grid(transform, list(x.shape), False), padding_mode="border", align_corners=False)
    # Hue is an angle around the axis of greys, saturation the distance from it.
    hue, saturation = uniform(-0.8, 0.8), uniform(0.0, 1.5)
    grey = torch.full((3, 3), 1 / 3, device=x.device)
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=x.device) / math.sqrt(3)
    around = torch.eye(3, device=x.device) - grey
    colours = (saturation * hue.cos())[:, None, None] * around + (saturation * hue.sin())[:, None, None] * turn + grey
    x = torch.einsum("bij,bjhw->bihw", colours, x)
    return x * uniform(0.6, 1.2, 1, 1, 1) + uniform(-0.3, 0.3, 1, 1, 1)


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: str) -> float:
    """Percentage of images whose class has the highest score."""
    model.eval()
    right = torch.zeros((), dtype=torch.long, device=device)
    for x, y in zip(images.split(512), labels.split(512), strict=True):
        with autocast(device):
            right += (model(normalised(x).contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum()
    return 100 * right.item() / len(labels)


def train(row: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train the model of a row from a seed: accuracies, and what it took."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = partial(data_on, device, args.data, limit=args.limit)
    images, labels, num_classes = load("train")
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    model = make(row, num_classes).to(device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=0.05, fused=device == "cuda")
    warmup = max(1, args.steps // 20)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, losses = time.perf_counter(), []
    order = torch.empty(0, dtype=torch.long, device=device)
    for _ in range(args.steps):
        while len(order) < args.batch:
            order = torch.cat((order, torch.randperm(len(images), generator=generator, device=device)))
        chosen, order = order[: args.batch], order[args.batch :]
        x = augmented(images[chosen], generator).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            loss = F.cross_entropy(model(x).float(), labels[chosen], label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-50:]).mean().item()
    seconds = time.perf_counter() - start
    if not math.isfinite(last):
        raise ValueError(f"{row}, seed {seed}: the loss is {last}")
    tests = {split: accuracy(model, *load(split)[:2], device) for split in ("artist", "subjects")}
    if seed == 0:
        state = model.state_dict().items()
        weights = {name: value.half() if value.is_floating_point() else value for name, value in state}
        torch.save(weights, args.work_dir / f"{file_name(row)}.pth")
    recipe = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "images": len(images), "classes": num_classes}
    result = {"row": row, "seed": seed, **tests, "loss": last, "seconds": round(seconds, 1), "recipe": recipe}
    return result | {"circumstances": circumstances(args.commit)}


def file_name(row: str) -> str:
    """A row's name in file names."""
    return row.lower().replace(",", "").replace(" ", "-")


def write(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that is complete or does not exist."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def train_and_write(row: str, seed: int, args: argparse.Namespace) -> None:
    """A file for a row and a seed, unless it is there."""
    path = args.work_dir / f"{file_name(row)}-{seed}.json"
    if path.exists():
        return
    result = train(row, seed, args)
    write(path, result)
    artist, subjects, seconds = result["artist"], result["subjects"], result["seconds"]
    print(f"{row}, seed {seed}: {artist:.1f} % and {subjects:.1f} % after {seconds} s", flush=True)


def train_all(args: argparse.Namespace) -> None:
    """Every row and seed, seed by seed, so that an interrupted run has whole columns."""
    tasks = [(row, seed, args) for seed in range(args.seeds) for row in args.rows]
    if args.jobs == 1:
        for task in tasks:
            train_and_write(*task)
        return
    with multiprocessing.get_context("spawn").Pool(args.jobs, prepare) as pool:
        pool.starmap(train_and_write, tasks, chunksize=1)


def measure(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Parameters and FLOPs of the model of a row; on a GPU also images a second and peak memory.

    Speeds are those of replayed CUDA graphs: models of this size would otherwise wait for the host.
    """
    model = make(row, args.classes)
    result = {"parameters": sum(p.numel() for p in model.parameters())}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, SIZE, SIZE))
    result["flops"] = counter.get_total_flops() // 2  # it counts multiplications and additions
    if not torch.cuda.is_available():
        return result
    before = torch.cuda.memory_allocated()  # what cuBLAS keeps for the streams of other rows' graphs
    model = model.to("cuda", memory_format=torch.channels_last)
    x = torch.randn(args.batch, 3, SIZE, SIZE, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(args.classes, (args.batch,), device="cuda")

    @torch.inference_mode()
    def infer() -> None:
        with autocast("cuda"):
            model(x)

    def step() -> None:
        with autocast("cuda"):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        model.zero_grad()

    def images_a_second(call: Callable[[], None], training: bool) -> float:
        model.train(training)
        call()  # outside of the graph, so that cuDNN may choose its kernels
        return 1e3 * args.batch / graph_milliseconds([call], rounds=4)

    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    result["gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {**result, "inference": images_a_second(infer, False), "training": images_a_second(step, True)}


def measure_all(args: argparse.Namespace) -> None:
    """The file of all rows' speeds."""
    speeds = {}
    for row in args.rows:
        speeds[row] = measure(row, args)
        print(row, speeds[row], flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    measured = {"rows": speeds, "batch": args.batch, "circumstances": circumstances(args.commit)}
    write(args.work_dir / "speed.json", measured)


def shown(values: list[float]) -> str:
    """Mean and standard error."""
    mean = round(statistics.mean(values), 1) + 0.0  # no "-0.0"
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def the_only(values: list[Any], what: str) -> Any:
    """The value that all are equal to."""
    if any(value != values[0] for value in values):
        raise ValueError(f"the runs have several {what}: {values}")
    return values[0]


def trained_on(runs: list[dict]) -> str:
    """The machines and commits of runs."""
    machines, commits = (sorted({run["circumstances"][key] for run in runs}) for key in ("hardware", "commit"))
    return f"Trained on {', '.join(machines)}, commit {', '.join(commits)}."


def difference(better: list[dict], worse: list[dict], test: str) -> list[float]:
    """Of the accuracies of two rows, for each seed that both have."""
    others = {run["seed"]: run[test] for run in worse}
    return [run[test] - others[run["seed"]] for run in better if run["seed"] in others]


def verdict(by_row: dict[str, list[dict]], better: str, worse: str, test: str) -> str:
    """Whether one row is better than another, by the 95 % interval of Student's t over the seeds."""
    values = difference(by_row[better], by_row[worse], test)
    if len(values) < 2:
        return f"{better} − {worse} {shown(values)}, of one seed"
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    bound = student.ppf(0.975, len(values) - 1) * error
    found = "inside the noise" if abs(mean) <= bound else "shows" if mean > 0 else "reversed"
    return f"{better} − {worse} {mean:+.1f} ± {error:.1f}: {found}"


def report(args: argparse.Namespace) -> None:
    """benchmarks/results/scans-MACHINE.md, with its figures as .json, a plot, and the section of docs/scans.md."""
    speeds = json.loads((args.work_dir / "speed.json").read_text())
    runs = [json.loads(path.read_text()) for path in sorted(args.work_dir.glob("*-[0-9].json"))]
    by_row = {row: [run for run in runs if run["row"] == row] for row in ROWS}
    by_row = {row: found for row, found in by_row.items() if found}
    recipe = the_only([run["recipe"] for run in runs], "recipes")
    head = ["row", f"{HELD_OUT_ARTIST}, %", "minus tree", "new subjects, %", "minus tree", "seeds"]
    head += ["parameters", "FLOPs", "images/s, inference", "images/s, training", "GiB, training"]
    rows = []
    for row, found in by_row.items():
        speed, cells = speeds["rows"][row], [row]
        for test in ("artist", "subjects"):
            cells.append(shown([run[test] for run in found]))
            cells.append(shown(difference(found, by_row["tree"], test)) if row != "tree" else "")
        cells += [len(found), f"{speed['parameters'] / 1e6:.2f} M", f"{speed['flops'] / 1e9:.3f} G"]
        cells += [f"{speed[key]:.0f}" if key in speed else "" for key in ("inference", "training")]
        rows.append([*cells, f"{speed['gib']:.1f}" if "gib" in speed else ""])
    text = (
        f"Accuracy, as mean and standard error over the seeds, of small models on {recipe['images']} emoji in "
        f"{recipe['classes']} classes, after {recipe['steps']} steps of {recipe['batch']} images at {SIZE} × {SIZE}, "
        f"AdamW with a peak rate of {recipe['lr']}. The first test has all drawings of an artist that training has not "
        "seen. The second has subjects that training has not seen, by its artists. *Minus tree* is the difference to "
        "the tree scan with the same seed: the same images in the same order, and for rows of GrootV the same initial "
        f"weights. {trained_on(runs)} Speed and memory: batch {speeds['batch']}, {SIZE} × {SIZE}, bfloat16 autocast; "
        "training is forward, loss and backward. Speed is that of replayed CUDA graphs, which do not wait for the host."
    )
    pairs = [(a, b) for a, b in (("tree", "cross"), ("cross", "raster"), ("tree", "raster")) if {a, b} <= by_row.keys()]
    judged = []
    for title, test in (("Unseen artist", "artist"), ("Unseen subjects", "subjects")):
        verdicts = "; ".join(verdict(by_row, better, worse, test) for better, worse in pairs)
        judged.append(textwrap.fill(f"* {title}: {verdicts}.", 120, subsequent_indent="  "))
    order = (
        "The paper's order on ImageNet is tree 83.4, cross 83.1, raster 82.6. Here, in percent, with the standard "
        "error of the difference; *shows* and *reversed* mean that zero is outside its 95 % interval (Student's t, by "
        "seed):"
    )
    sections = [textwrap.fill(text, 120), table(head, rows), textwrap.fill(order, 120), "\n".join(judged)]
    command = "python benchmarks/compare_scans.py train data/emoji.npz; python benchmarks/compare_scans.py speed"
    path = publish("Scans side by side", "scans", sections, command, measured=speeds["circumstances"])
    write(path.with_suffix(".json"), {"runs": runs, "speed": speeds})
    plot(by_row, speeds["rows"]).savefig(PICTURES / "scans.png", dpi=150)
    pictures = {
        "scans": "Accuracy over throughput",
        "receptive_fields": "Effective receptive fields, before and after training",
        "affinities": "Affinity maps of trained models",
    }
    pictures = {name: title for name, title in pictures.items() if (PICTURES / f"{name}.png").exists()}
    links = [f"![{title}](images/{name}.png)" for name, title in pictures.items()]
    source = f"These are the figures of [{path.name}](../benchmarks/results/{path.name})."
    replace_section(PAGE, "\n\n".join([source, *sections, *links]))


def replace_section(page: Path, text: str) -> None:
    """Put `text` between the marks of a page for what was measured."""
    begin, end = "<!-- measured -->", "<!-- end of measured -->"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


# Colour and marker of the scans, which are filled; options of the tree are hollow, other networks black.
MARKS = {
    "tree": ("#0072b2", "o"),
    "raster": ("#e69f00", "s"),
    "bidirectional": ("#009e73", "D"),
    "cross": ("#d55e00", "X"),
}


def plot(by_row: dict[str, list[dict]], speeds: dict[str, dict]):
    """Accuracy over throughput, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    options, others = iter("v^<>p"), iter("*Phd")
    marks = {
        row: MARKS.get(row)
        or ((MARKS["tree"][0], next(options)) if row.startswith("tree") else ("#000000", next(others)))
        for row in by_row
    }
    titles = ("an unseen artist", "unseen subjects")
    for test, title, ax in zip(("artist", "subjects"), titles, axes, strict=True):
        for row, found in by_row.items():
            if "inference" not in speeds[row]:
                continue
            values = [run[test] for run in found]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0
            at = speeds[row]["inference"] / 1000, statistics.mean(values)
            colour, marker = marks[row]
            hollow = row.startswith("tree") and row != "tree"
            ax.errorbar(
                *at, yerr=error, fmt=marker, color=colour, markerfacecolor="white" if hollow else colour,
                markersize=9, markeredgewidth=1.5, elinewidth=1, capsize=3, label=row,
            )  # fmt: skip
        ax.set(xlabel="inference, thousand images a second", ylabel="accuracy, %", title=f"Accuracy on {title}")
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("Means and standard errors over the seeds", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    trainer = commands.add_parser("train", help="train every row with every seed")
    trainer.add_argument("data", type=Path, help="file of tools/make_emoji.py")
    trainer.add_argument("--seeds", type=int, default=3)
    trainer.add_argument("--steps", type=int, default=1500)
    trainer.add_argument("--lr", type=float, default=2e-3, help="peak rate")
    trainer.add_argument("--jobs", type=int, default=1, help="processes beside each other on the GPU")
    trainer.add_argument("--limit", type=int, help="images of each split, for a first try")
    speed = commands.add_parser("speed", help="parameters, FLOPs, speed and memory of every row")
    speed.add_argument("--classes", type=int, default=80)
    for command in (trainer, speed):
        command.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
        command.add_argument("--batch", type=int, default=256)
        command.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    for command in (trainer, speed, commands.add_parser("report", help="table, figures and plot")):
        command.add_argument("--work-dir", type=Path, default=Path("work_dirs/compare_scans"))
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    prepare()
    {"train": train_all, "speed": measure_all, "report": report}[args.command](args)


if __name__ == "__main__":
    main()

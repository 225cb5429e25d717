#!/usr/bin/env python
"""Train a small Mamba on Python's documentation, fine-tune it in three ways on held-out text, and compare.

Nothing is downloaded. For each of several seeds, a Mamba is trained on the language reference and the docstrings of the
standard library. Pairs of a paragraph's beginning and its rest, from modules and topics that are held out, are the
instructions: some are for fine-tuning, others for the comparison. Prints the perplexity of the responses and how often
a response is more probable than three copies with two neighbouring words swapped, with standard errors over the seeds,
and a sample; draws the tree over a prompt. Finished seeds are reused, unless --fresh is given.
"""

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

# OpenMP's threads otherwise spin while they wait, which takes the cores from the other seeds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from lm_eval.api.instance import Instance
from transformers import PreTrainedTokenizerFast, set_seed

from grootl import GrootLConfig, GrootLForCausalLM
from grootl.evaluation import GrootLLM
from grootl.finetuning import METHODS, add_lora, finetune, load_model, recipe
from grootl.instructions import InstructionData, collate, prompt_of
from grootl.sample_data import continuation_tasks, documentation, train_tokenizer
from grootl.visualization import plot_arcs, prompt_trees

ROOT = Path(__file__).resolve().parents[1]
ROWS = {None: "Mamba", "full": "+ all weights", "lora": "+ LoRA", "grootl": "+ GrootL"}
LEARNING_RATE = 1e-3  # much larger than the recipe's, for so small a model and so few steps
VOCABULARY, WINDOW, BATCH = 1024, 128, 16
SHOWN_TOKENS = 40


def quiet() -> None:
    """Leave the output to this demo."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, default=ROOT / "work_dirs/demo_language", help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="train again, whatever an earlier demo left")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--pretrain-steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--records", type=int, default=300, help="for fine-tuning; default: %(default)s")
    parser.add_argument("--test-records", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    return parser.parse_args()


def pretrain(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, texts: list[str], folder: Path) -> None:
    """Train a Mamba on windows of the texts, and write it to the folder."""
    config = GrootLConfig(
        vocab_size=VOCABULARY, hidden_size=args.hidden_size, num_hidden_layers=args.layers, state_size=8, tree_scale=0
    )
    model = GrootLForCausalLM(config).train()
    tokens = torch.tensor([token for text in texts for token in tokenizer(text + tokenizer.eos_token)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    warmup = max(1, args.pretrain_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.pretrain_steps)),
    )
    for step in range(args.pretrain_steps):
        starts = torch.randint(len(tokens) - WINDOW, (BATCH,))
        ids = torch.stack([tokens[start : start + WINDOW] for start in starts.tolist()])
        loss = model(ids, labels=ids, prompt_length=1).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"demo: {folder.parent.name}, step {step + 1}: loss {loss.item():.2f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def evaluate(model: GrootLForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[dict]) -> dict[str, float]:
    """Perplexity of the responses, and how often in percent the right one of the choices is the most probable."""
    data = InstructionData(records, tokenizer, max_length=1024)
    model.eval()
    total = count = 0
    for first in range(0, len(data), BATCH):
        batch = collate([data[index] for index in range(first, min(first + BATCH, len(data)))])
        predicted = int((batch["labels"] != -100).sum())
        total += model(**batch).loss.item() * predicted
        count += predicted
    harness = GrootLLM(pretrained=model, tokenizer=tokenizer, batch_size=2 * BATCH)
    requests = [
        Instance("loglikelihood", {}, (prompt_of(record), choice), number)
        for number, record in enumerate(records)
        for choice in record["choices"]
    ]
    scores = torch.tensor([score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)])
    chosen = scores.view(len(records), -1).argmax(1)
    right = chosen == torch.tensor([record["answer"] for record in records])
    return {"perplexity": math.exp(total / count), "right": 100 * right.float().mean().item()}


def sample(model: GrootLForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict) -> str:
    """A continuation of a record's text, drawn from the model."""
    set_seed(0)
    prompt = tokenizer(prompt_of(record), return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=True, top_p=0.9, temperature=0.7)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def run_seed(args: argparse.Namespace, seed: int, threads: int) -> None:
    """Everything for one seed; leaves `results.json` in its folder."""
    quiet()
    torch.set_num_threads(threads)
    folder = args.out_dir / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out_dir / "tokenizer")
    texts = json.loads((args.out_dir / "texts.json").read_text())
    tasks = json.loads((args.out_dir / "tasks.json").read_text())
    training, test = tasks[: args.records], tasks[args.records :][: args.test_records]
    set_seed(seed)
    pretrain(args, tokenizer, texts, folder / "mamba")
    results = {}
    for method in ROWS:
        set_seed(seed)
        model = load_model(folder / "mamba", METHODS[method].tree_scale if method else 0.0)
        if method is not None:
            if METHODS[method].lora:
                model = add_lora(model)
            arguments = recipe(
                folder / method,
                batch_size=8,
                micro_batch_size=8,
                learning_rate=LEARNING_RATE,
                warmup_steps=4,
                gradient_checkpointing=False,
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
            )
            data = InstructionData(training, tokenizer, max_length=1024)
            model = finetune(model, tokenizer, data, arguments, merge=True)
        results[ROWS[method]] = {
            **evaluate(model, tokenizer, test),
            "sample": sample(model, tokenizer, test[0]),
        }
        print(f"demo: seed {seed}, {ROWS[method]}: {results[ROWS[method]]}", flush=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2))


def mean_and_error(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def table(results: list[dict]) -> str:
    """Markdown, with means and standard errors over the seeds."""
    lines = ["| model | perplexity of responses | right order of 4 (%) |", "|---|---|---|"]
    for row in ROWS.values():
        cells = [mean_and_error([of_seed[row][name] for of_seed in results]) for name in ("perplexity", "right")]
        lines.append(f"| {row} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def draw(out_dir: Path, record: dict) -> Path:
    """The chain and the trees of the first and the last layer over a prompt."""
    folder = out_dir / "seed-0" / "grootl" / "model"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = GrootLForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(record["input"], return_tensors="pt")["input_ids"][:, :SHOWN_TOKENS]
    trees = prompt_trees(model, ids)
    length = ids.shape[1]
    parents = [[*range(1, length), length - 1], trees[0].parent[0].tolist(), trees[-1].parent[0].tolist()]
    titles = ["Chain (Mamba)", "Tree, first layer", f"Tree, layer {len(trees)}"]
    path = out_dir / "language_tree.png"
    plot_arcs([tokenizer.decode([token]) for token in ids[0].tolist()], parents, titles).savefig(path, dpi=120)
    return path


def prepare(args: argparse.Namespace) -> dict:
    """Write tokenizer, texts and tasks, and return the settings that results depend on."""
    texts, held_out = documentation()
    tasks = continuation_tasks(held_out)
    if len(tasks) < args.records + 1:
        raise SystemExit(f"--records must be less than {len(tasks)}, the tasks that this Python's documentation gives")
    train_tokenizer(texts, VOCABULARY).save_pretrained(args.out_dir / "tokenizer")
    (args.out_dir / "texts.json").write_text(json.dumps(texts))
    (args.out_dir / "tasks.json").write_text(json.dumps(tasks))
    names = ("pretrain_steps", "records", "test_records", "hidden_size", "layers")
    return {"python": sys.version, **{name: getattr(args, name) for name in names}}


def main() -> None:
    args = parse_args()
    quiet()
    started = time.time()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    settings = prepare(args)
    known = args.out_dir / "settings.json"
    if args.fresh or not known.is_file() or json.loads(known.read_text()) != settings:
        for folder in args.out_dir.glob("seed-*"):
            shutil.rmtree(folder)
        known.write_text(json.dumps(settings))
    paths = [args.out_dir / f"seed-{seed}" / "results.json" for seed in range(args.seeds)]
    missing = [seed for seed, path in enumerate(paths) if not path.is_file()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if missing:
        # The same number of threads however many seeds are missing, because sums round by it.
        threads = max(1, cores // args.seeds)
        with ProcessPoolExecutor(min(cores, len(missing)), mp_context=get_context("spawn")) as pool:
            for future in [pool.submit(run_seed, args, seed, threads) for seed in missing]:
                future.result()

    results = [json.loads(path.read_text()) for path in paths]
    test = json.loads((args.out_dir / "tasks.json").read_text())[args.records :][: args.test_records]
    print(f"\n{test[0]['input']}")
    for row, of_row in results[0].items():
        print(f"  {row}: {of_row['sample'].strip()!r}")
    print(f"\n{table(results)}\n")
    (args.out_dir / "table.md").write_text(table(results) + "\n")
    picture = draw(args.out_dir, max(test, key=lambda record: len(record["input"])))
    print(f"demo: the trees over a prompt are drawn in {picture}")
    print(f"demo: {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()

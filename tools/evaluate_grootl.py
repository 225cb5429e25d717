#!/usr/bin/env python
"""Zero-shot evaluation of a GrootL or a Mamba with lm-evaluation-harness, beside the paper's figures.

    tools/evaluate_grootl.py work_dirs/grootl/grootl/model
    tools/evaluate_grootl.py state-spaces/mamba-130m-hf --tree-scale 0
    tools/evaluate_grootl.py MODEL --tasks --choices questions.jsonl      # without a hub

A file of --choices has records of `context`, `choices` (a list of texts) and `answer` (the number of the right one).
The score is how often the right choice has the largest log-likelihood after the context.
"""

import argparse
import json
from pathlib import Path

import torch
from lm_eval import simple_evaluate

from grootl.evaluation import GrootLLM

# Task: the paper's name for it, the harness's metric, and figures for Mamba-130M, + LoRA, + GrootL (paper, table 4).
PUBLISHED = {
    "piqa": ("PIQA", "acc", (64.5, 64.7, 65.0)),
    "arc_easy": ("Arc-E", "acc", (48.0, 48.3, 49.8)),
    "sst2": ("SST", "acc", (65.6, 65.1, 69.5)),
    "winogrande": ("WinoGrande", "acc", (51.8, 52.2, 51.1)),
    "lambada_openai": ("LAMBADA ppl", "perplexity", (16.1, 17.7, 15.9)),
    "race": ("RACE", "acc", (27.4, 28.6, 28.9)),
    "openbookqa": ("OpenBookQA", "acc", (16.8, 17.8, 19.2)),
}
PUBLISHED_ROWS = ("Mamba-130M", "+ LoRA", "+ GrootL")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--tokenizer", help="default: that of the model")
    parser.add_argument("--tasks", nargs="*", default=list(PUBLISHED), help="of the harness; default: the paper's")
    parser.add_argument("--choices", type=Path, help="JSONL file of multiple-choice questions")
    parser.add_argument("--tree-scale", type=float, help="default: that of the model; 0 is Mamba")
    parser.add_argument("--batch-size", default="16", help="a number, or auto; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="of the weights; default: that they are stored in")
    parser.add_argument("--limit", type=float, help="number, or share, of the questions of each task")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if not args.tasks and args.choices is None:
        parser.error("there is nothing to evaluate: --tasks or --choices must name something")
    return args


def choices_task(path: Path) -> dict:
    """A task of the harness over a file of questions.

    Raises:
        ValueError: a record that is no question.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no questions")
    for number, line in enumerate(lines):
        record = json.loads(line)
        right = record.get("answer")
        if not record.get("context") or not isinstance(right, int) or not 0 <= right < len(record.get("choices", [])):
            raise ValueError(f"question {number} of {path} must have a context, choices, and the number of the answer")
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path.resolve())}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def measured(results: dict, metric: str) -> tuple[float, float]:
    """A metric of one task and its standard error; accuracies in percent."""
    scale = 1 if metric == "perplexity" else 100
    value, error = results[f"{metric},none"], results.get(f"{metric}_stderr,none")
    return scale * value, scale * error if isinstance(error, (int, float)) else float("nan")


def table(results: dict[str, dict]) -> str:
    """The results in Markdown, with the paper's rows above."""
    columns, ours = [], []
    published = [[] for _ in PUBLISHED_ROWS]
    for task, of_task in results.items():
        name, metric, figures = PUBLISHED.get(task, (task, "acc", (None,) * len(PUBLISHED_ROWS)))
        columns.append(name)
        ours.append(measured(of_task, metric))
        for row, figure in zip(published, figures, strict=True):
            row.append("" if figure is None else f"{figure:.1f}")
    lines = [["zero-shot", *columns], ["---"] * (1 + len(columns))]
    lines += [[f"{name} (published)", *row] for name, row in zip(PUBLISHED_ROWS, published, strict=True) if any(row)]
    lines.append(["this model (measured)", *(f"{value:.1f} ± {error:.1f}" for value, error in ours)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    args = parse_args()
    settings = {} if args.tree_scale is None else {"tree_scale": args.tree_scale}
    model = GrootLLM(
        pretrained=args.model,
        tokenizer=args.tokenizer,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        **settings,
    )
    tasks = [*args.tasks, *([] if args.choices is None else [choices_task(args.choices)])]
    limit = int(args.limit) if args.limit is not None and args.limit >= 1 else args.limit
    results = simple_evaluate(model, tasks=tasks, limit=limit, log_samples=False)
    if results is None:  # another process has them
        return
    print(table(results["results"]))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results["results"], indent=2, default=str))


if __name__ == "__main__":
    main()

"""Data of instructions, inputs and outputs, as Alpaca's: reading, prompts, tokens, batches."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["InstructionData", "collate", "encode", "prompt_of", "read_records"]

FIELDS = ("instruction", "output")
IGNORED = -100

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = "### Instruction:\n{instruction}\n\n### Response:"


def read_records(source: str, split: str = "train") -> list[dict[str, str]]:
    """Records of `instruction`, `output`, and perhaps `input`.

    Args:
        source: a JSON file (a list of records), a JSONL file (one record a line), or the name or folder of a data set
            for `datasets.load_dataset`.
        split: of such a data set.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: a file without records, or a record that lacks a field.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {source}")
        records = _read_file(path)
    else:
        from datasets import load_dataset

        records: list[Any] = list(load_dataset(source, split=split))
    if not records:
        raise ValueError(f"{source} holds no records")
    for number, record in enumerate(records):
        lacking = [field for field in FIELDS if not isinstance(record, dict) or not isinstance(record.get(field), str)]
        if lacking:
            raise ValueError(f"record {number} of {source} must have texts for {', '.join(FIELDS)}, lacks {lacking[0]}")
    return records


def _read_file(path: Path) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of records, got {type(records).__name__}")
    return records


def prompt_of(record: dict[str, str]) -> str:
    """The published prompt for Mamba: the introduction stands only where there is an input."""
    return (_WITH_INPUT if record.get("input") else _WITHOUT_INPUT).format_map(record)


def encode(record: dict[str, str], tokenizer: Any, max_length: int) -> dict[str, list[int]] | None:
    """Tokens and labels of a record: prompt, response, end of text; labels of -100 on the prompt.

    The end is cut off beyond `max_length` tokens. None if nothing of the response is left.
    """
    prompt = tokenizer(prompt_of(record), add_special_tokens=False)["input_ids"]
    response = [*tokenizer(record["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if len(prompt) >= max_length or not record["output"]:
        return None
    ids = (prompt + response)[:max_length]
    return {"input_ids": ids, "labels": ([IGNORED] * len(prompt) + response)[:max_length]}


class InstructionData(torch.utils.data.Dataset):
    """Encoded records. `skipped` counts those that left no response within `max_length`.

    Raises:
        ValueError: no record is left.
    """

    def __init__(self, records: Iterable[dict[str, str]], tokenizer: Any, max_length: int) -> None:
        encoded = [encode(record, tokenizer, max_length) for record in records]
        self.examples = [example for example in encoded if example is not None]
        self.skipped = len(encoded) - len(self.examples)
        if not self.examples:
            raise ValueError(f"no record has a response within {max_length} tokens; max_length must be larger")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


def collate(examples: list[dict[str, list[int]]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """A batch with padding on the right: input_ids, attention_mask and labels, (B, L) each."""
    length = max(len(example["input_ids"]) for example in examples)

    def rows(name: str, filler: int) -> Tensor:
        return torch.tensor([example[name] + [filler] * (length - len(example[name])) for example in examples])

    mask = [[1] * len(example["input_ids"]) + [0] * (length - len(example["input_ids"])) for example in examples]
    return {
        "input_ids": rows("input_ids", pad_token_id),
        "attention_mask": torch.tensor(mask),
        "labels": rows("labels", IGNORED),
    }

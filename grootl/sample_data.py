"""English text that comes with every Python, its language reference and docstrings, and tasks made of it."""

from __future__ import annotations

import ast
import inspect
import random
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["continuation_tasks", "documentation", "paragraphs", "train_tokenizer"]

INSTRUCTION = "Continue the text."


def documentation(held_out: float = 0.3, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts of Python's documentation: those to train on, and the share that is held out.

    A text is a topic of the language reference, as `help()` shows it, or the docstrings of a module of the standard
    library. A paragraph that occurs several times stays in one text only, so that none of those to train on is held
    out. The texts depend on the release of Python, and the choice on the seed.
    """
    texts = [re.sub(r"[*`]+", "", text) for _, text in sorted(topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        folders = set(path.relative_to(library).parts[:-1])
        if not folders & {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}:
            docstrings = _docstrings(path)
            if docstrings:
                texts.append("\n\n".join(docstrings))
    seen: set[str] = set()
    unique = []
    for text in texts:
        blocks = [block for block in re.split(r"\n\s*\n", text) if " ".join(block.split()) not in seen]
        seen.update(" ".join(block.split()) for block in blocks)
        if blocks:
            unique.append("\n\n".join(blocks))
    random.Random(seed).shuffle(unique)
    count = round(held_out * len(unique))
    return unique[count:], unique[:count]


def _docstrings(path: Path, shortest: int = 120) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    found = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)]
    return [inspect.cleandoc(text) for text in found if text and len(text) >= shortest]


def paragraphs(text: str, shortest: int = 160) -> list[str]:
    """The paragraphs of prose of a text, each as one line: those that are not indented and have several sentences."""
    blocks = re.split(r"\n\s*\n", text)
    prose = [" ".join(block.split()) for block in blocks if not block.startswith((" ", "\t"))]
    return [block for block in prose if len(block) >= shortest and len(re.findall(r"[.:] ", block)) >= 1]


def continuation_tasks(
    texts: Iterable[str], choices: int = 4, longest: int = 240, seed: int = 0
) -> list[dict[str, Any]]:
    """Records of `instruction`, `input` (the beginning of a paragraph), `output` (what follows it), and `choices`.

    Args:
        texts: where the paragraphs are from.
        choices: how many endings to choose from: the right one, and those with two neighbouring words swapped.
        longest: characters of an input and of an output.
        seed: of the order.

    Returns:
        The records; `answer` is the number of the right one of the `choices`.
    """
    generator = random.Random(seed)
    pairs = {}
    for text in texts:
        for paragraph in paragraphs(text):
            sentences = re.split(r"(?<=[.:]) ", paragraph)
            beginning, rest = sentences[0][-longest:], " ".join(sentences[1:])[:longest]
            if min(len(beginning), len(rest)) >= 30 and len(set(rest.split())) >= 5:
                pairs[beginning] = rest.rsplit(" ", 1)[0] if len(rest) == longest else rest
    records = [{"instruction": INSTRUCTION, "input": first, "output": " " + rest} for first, rest in pairs.items()]
    generator.shuffle(records)
    for record in records:
        words = record["output"].split()
        swapped = {
            " ".join(["", *words[:at], words[at + 1], words[at], *words[at + 2 :]]) for at in range(len(words) - 1)
        }
        endings = [record["output"], *generator.sample(sorted(swapped - {record["output"]}), choices - 1)]
        generator.shuffle(endings)
        record["choices"], record["answer"] = endings, endings.index(record["output"])
    return records


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, whose token 0 is end of text and padding. It can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, padding_side="left")

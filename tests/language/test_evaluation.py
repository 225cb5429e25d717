"""Log-likelihoods in lm-evaluation-harness, the evaluation tool, and a task from a local file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from language_helpers import byte_tokenizer, filled, save_mamba
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from grootl import GrootLConfig, GrootLForCausalLM
from grootl.evaluation import GrootLLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

PAIRS = [
    ("A tree has a root", " and leaves"),
    ("A tree", " has a root and leaves"),
    ("A tree has a root and", " leaves"),  # the text of the two before, with another boundary
    ("A chain has none, but it has a beginning, an end, and everything between them;", " that is a lot"),
    ("", "no context"),
    ("x", "y"),
]


def model() -> GrootLForCausalLM:
    return filled(GrootLForCausalLM(GrootLConfig(vocab_size=260, hidden_size=32, state_size=4, num_hidden_layers=2)))


def harness(batch_size, **options) -> GrootLLM:
    return GrootLLM(pretrained=model(), tokenizer=byte_tokenizer(), batch_size=batch_size, **options)


def score(evaluated: GrootLLM, pairs=PAIRS) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return evaluated.loglikelihood(requests, disable_tqdm=True)


@torch.no_grad()
def test_log_likelihoods_use_the_context_as_prompt():
    tokenizer, network = byte_tokenizer(), model()
    for (context, continuation), (found, greedy) in zip(PAIRS, score(harness(1)), strict=True):
        before = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]
        after = tokenizer(continuation)["input_ids"]
        logits = network(torch.tensor([before + after]), prompt_length=len(before)).logits[0, len(before) - 1 : -1]
        logs = logits.log_softmax(-1)
        assert found == pytest.approx(logs.gather(1, torch.tensor(after).unsqueeze(1)).sum().item(), abs=1e-3)
        assert greedy == (logs.argmax(-1).tolist() == after)


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_any_batch_size_gives_the_result_of_batch_size_one(batch_size):
    alone, together = score(harness(1)), score(harness(batch_size))
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-3)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


def test_contexts_that_are_too_long_lose_their_beginning():
    short = score(harness(4, max_length=20), [("many tokens before the last words", " of all")])
    assert short[0][0] == pytest.approx(score(harness(1), [("re the last words"[-14:], " of all")])[0][0], abs=1e-3)
    with pytest.raises(ValueError, match="must leave room for one token of context in max_length, 4"):
        harness(1, max_length=4)._loglikelihood_tokens([(None, [1], [2, 3, 4, 5, 6])])


def test_rolling_log_likelihoods():
    text = "A tree has a root."
    found = harness(3).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    tokens = [0, *byte_tokenizer()(text)["input_ids"]]
    with torch.no_grad():
        logs = model()(torch.tensor([tokens]), prompt_length=1).logits[0].log_softmax(-1)
    expected = sum(logs[at, token].item() for at, token in enumerate(tokens[1:]))
    assert found[0] == pytest.approx(expected, abs=1e-3)


def test_generation_of_the_harness():
    request = Instance("generate_until", {}, ("A tree", {"until": ["."], "max_gen_toks": 6}), 0)
    other = Instance("generate_until", {}, ("A chain has an end", {"until": ["."], "max_gen_toks": 6}), 1)
    together = harness(2).generate_until([request, other], disable_tqdm=True)
    assert together == [harness(1).generate_until([one], disable_tqdm=True)[0] for one in (request, other)]


def test_it_is_registered():
    assert get_model("grootl") is GrootLLM


def test_folders_of_mamba_load(tmp_path):
    save_mamba(tmp_path)
    for scale in (0, 0.3):
        evaluated = GrootLLM(pretrained=str(tmp_path), tree_scale=scale, device="cpu")
        assert isinstance(evaluated.model, GrootLForCausalLM) and evaluated.model.config.tree_scale == scale


def questions(path: Path) -> list[dict]:
    """Of which every right answer is what the model itself finds most probable; one is turned into a wrong one."""
    choices = [" leaves", " a root", " edges", " no cycles"]
    records = []
    for context in ("A tree has", "A path has", "A forest has", "Every vertex has", "The graph has"):
        scores = [value for value, _ in score(harness(1), [(context, choice) for choice in choices])]
        records.append({"context": context, "choices": choices, "answer": scores.index(max(scores))})
    records[0]["answer"] = (records[0]["answer"] + 1) % 4
    path.write_text("\n".join(map(json.dumps, records)))
    return records


def environment(tmp_path) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_the_tool_evaluates_a_local_file(tmp_path):
    model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    questions(tmp_path / "trees.jsonl")
    command = [sys.executable, str(ROOT / "tools" / "evaluate_grootl.py"), str(tmp_path / "model"), "--device", "cpu"]
    command += ["--tasks", "--choices", str(tmp_path / "trees.jsonl"), "--out", str(tmp_path / "results.json")]
    result = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert "| this model (measured) | 80.0 ± 20.0 |" in result.stdout
    assert json.loads((tmp_path / "results.json").read_text())["trees"]["acc,none"] == 0.8


@pytest.mark.slow
def test_the_command_line_of_the_harness_knows_the_model(tmp_path):
    from evaluate_grootl import choices_task

    model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    questions(tmp_path / "trees.jsonl")
    (tmp_path / "trees.yaml").write_text(json.dumps(choices_task(tmp_path / "trees.jsonl")))
    command = [sys.executable, "-m", "grootl.evaluation", "run", "--model", "grootl", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "trees", "--batch_size", "2"]
    command += ["--include_path", str(tmp_path)]
    result = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert "0.8" in result.stdout


@pytest.mark.parametrize(
    "record",
    [{"choices": ["a"], "answer": 0}, {"context": "a", "choices": ["b"], "answer": 1}, {"context": "a"}],
    ids=str,
)
def test_records_that_are_no_questions_raise(tmp_path, record):
    from evaluate_grootl import choices_task

    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="question 0 of .* must have a context, choices, and the number of the answer"):
        choices_task(tmp_path / "a.jsonl")


def test_the_table_has_the_papers_rows():
    from evaluate_grootl import table

    results = {
        "piqa": {"acc,none": 0.5, "acc_stderr,none": 0.01},
        "lambada_openai": {"perplexity,none": 20.0, "perplexity_stderr,none": 0.5},
    }
    assert table(results).splitlines()[2:] == [
        "| Mamba-130M (published) | 64.5 | 16.1 |",
        "| + LoRA (published) | 64.7 | 17.7 |",
        "| + GrootL (published) | 65.0 | 15.9 |",
        "| this model (measured) | 50.0 ± 1.0 | 20.0 ± 0.5 |",
    ]

"""Records, prompts, tokens and batches."""

import json

import pytest
from language_helpers import byte_tokenizer

from grootl.instructions import InstructionData, collate, encode, prompt_of, read_records
from grootl.sample_data import continuation_tasks, documentation, paragraphs

RECORDS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "Hello"},
]


def test_files_of_json_and_jsonl(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    assert read_records(str(tmp_path / "a.json")) == RECORDS == read_records(str(tmp_path / "a.jsonl"))


def test_data_sets_by_name(tmp_path):
    """A folder is what datasets.load_dataset takes as a name without a hub."""
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    assert read_records(str(tmp_path)) == RECORDS


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "there is no file"),
        ("[]", ValueError, "holds no records"),
        ("[{", ValueError, "is not JSON"),
        ('{"instruction": "a"}', ValueError, "must hold a list of records, got dict"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', ValueError, "record 1 of .* lacks output"),
        ('["a"]', ValueError, "record 0 of .* lacks instruction"),
    ],
)
def test_files_without_records_raise(tmp_path, text, error, message):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=message):
        read_records(str(path))


def test_the_introduction_stands_only_where_there_is_an_input():
    with_input, without = map(prompt_of, RECORDS)
    assert with_input.startswith("Below is an instruction") and "### Input:\n1 and 2\n\n### Response:" in with_input
    assert without == "### Instruction:\nSay hello.\n\n### Response:"


def test_labels_are_the_response_and_its_end():
    tokenizer = byte_tokenizer()
    example = encode(RECORDS[1], tokenizer, 1000)
    prompt = len(prompt_of(RECORDS[1]))  # one token a byte
    assert example["labels"][:prompt] == [-100] * prompt
    assert tokenizer.decode(example["labels"][prompt:]) == "Hello" + tokenizer.eos_token
    assert example["labels"][prompt:] == example["input_ids"][prompt:]
    cut = encode(RECORDS[1], tokenizer, prompt + 2)
    assert tokenizer.decode(cut["labels"][prompt:]) == "He"
    assert encode(RECORDS[1], tokenizer, prompt) is None


def test_records_without_room_for_a_response_are_left_out():
    data = InstructionData(RECORDS, byte_tokenizer(), 60)
    assert (len(data), data.skipped) == (1, 1)
    with pytest.raises(ValueError, match="no record has a response within 10 tokens"):
        InstructionData(RECORDS, byte_tokenizer(), 10)


def test_batches_are_padded_on_the_right():
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}], 9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_the_documentation_gives_tasks_that_training_has_not_seen():
    training, held_out = documentation(seed=3)
    assert sum(map(len, training)) > 3e5
    prose = {block for text in training for block in paragraphs(text)}
    assert len(prose) > 500
    assert not prose & {block for text in held_out for block in paragraphs(text)}
    tasks = continuation_tasks(held_out, choices=3)
    assert len(tasks) > 100
    held_out_prose = " ".join(block for text in held_out for block in paragraphs(text))
    for task in tasks:
        assert task["choices"][task["answer"]] == task["output"]
        assert len(set(task["choices"])) == 3
        assert task["input"] + task["output"] in held_out_prose
    assert documentation(seed=3) == (training, held_out) and continuation_tasks(held_out, choices=3) == tasks

"""Methods, adapters and their merging, checkpoints, and the fine-tuning tool from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from language_helpers import byte_tokenizer, pad, random_ids, save_mamba, small_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from grootl import GrootLForCausalLM
from grootl.finetuning import (
    LORA_TARGETS,
    InstructionTrainer,
    add_lora,
    find_complete_checkpoint,
    finetune,
    load_model,
    merge_lora,
    recipe,
)
from grootl.instructions import InstructionData

ROOT = Path(__file__).parents[2]
RECORDS = [
    {"instruction": f"Say {word}.", "input": "" if len(word) % 2 else word[::-1], "output": word * 2}
    for word in ("tree", "chain", "leaf", "root", "branch", "edge", "vertex", "path", "scan", "state")
]


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def tool_command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "finetune_grootl.py"), *map(str, arguments)]


def run(*arguments, check=True) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(tool_command(*arguments), env=environment, capture_output=True, text=True, timeout=500)
    if check and result.returncode:
        raise AssertionError(result.stdout + result.stderr)
    return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return GrootLForCausalLM.from_pretrained(folder).state_dict()


# Adapters


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_adapters_have_gradients(checkpointing):
    model = add_lora(small_model()).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, mask = pad([random_ids(14), random_ids(9)], "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * (1 + 3 * 3)  # two factors each: embeddings, and three layers of each of three mixers
    for name, value in trained.items():
        # One factor of each adapter is zero at first, so that the gradient of the other is zero, but not None.
        assert value.grad is not None, name
        zero_first = "lora_B" in name or "lora_embedding_A" in name
        assert bool(value.grad.any()) == zero_first, name


def random_adapters(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return model.eval()


@torch.no_grad()
def test_merging_changes_no_output(tmp_path):
    """Also where the embeddings were tied to the output head, and after saving and loading."""
    ids = random_ids(2, 15)
    plain = small_model()
    before_training = plain(ids, prompt_length=8).logits
    assert plain.config.tie_word_embeddings
    model = random_adapters(add_lora(plain))
    adapted = model(input_ids=ids, prompt_length=8).logits
    assert (adapted - before_training).abs().max() > 0.1
    merged = merge_lora(model)
    torch.testing.assert_close(merged(ids, prompt_length=8).logits, adapted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, GrootLForCausalLM) and not again.config.tie_word_embeddings
    torch.testing.assert_close(again(ids, prompt_length=8).logits, adapted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_adapters_that_were_saved_load_into_the_base_model(tmp_path):
    """Into one whose head is still tied, too: then merging separates it."""
    ids = random_ids(1, 12)
    model = random_adapters(add_lora(small_model()))
    expected = model(input_ids=ids, prompt_length=6).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_model(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids, prompt_length=6).logits, expected)
    torch.testing.assert_close(merge_lora(loaded)(ids, prompt_length=6).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_adapters_generate(tmp_path):
    model = random_adapters(add_lora(small_model()))
    ids = random_ids(1, 7)
    options = {"max_new_tokens": 6, "do_sample": False}
    found = model.generate(input_ids=ids, **options)
    assert found.tolist() == merge_lora(model).generate(ids, **options).tolist()


# The recipe


def test_the_published_recipe_is_the_default(tmp_path):
    args = recipe(tmp_path)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    assert (args.learning_rate, args.warmup_steps, args.weight_decay, args.num_train_epochs) == (2e-5, 20, 0, 1)
    assert args.lr_scheduler_type == "constant_with_warmup" and args.gradient_checkpointing
    config = add_lora(small_model()).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0)
    assert config.target_modules == set(LORA_TARGETS)
    with pytest.raises(ValueError, match="multiple of micro_batch_size times the processes, 3, got 16"):
        recipe(tmp_path, micro_batch_size=3)


def test_a_loss_of_nan_ends_the_run_before_a_checkpoint(tmp_path):
    save_mamba(tmp_path / "mamba")
    model = load_model(tmp_path / "mamba", 0.3)
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = float("nan")
    tokenizer = byte_tokenizer()
    args = recipe(tmp_path / "run", max_steps=2, save_steps=1, micro_batch_size=16)
    with pytest.raises(FloatingPointError, match="the loss became nan after step 0"):
        finetune(model, tokenizer, InstructionData(RECORDS, tokenizer, 300), args)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_training_learns(tmp_path):
    """And the loss is that of the model, padding and accumulation or not."""
    save_mamba(tmp_path / "mamba")
    tokenizer = byte_tokenizer()
    data = InstructionData(RECORDS, tokenizer, 300)
    losses = []
    for micro_batch_size in (10, 5):
        args = recipe(tmp_path / "run", 10, micro_batch_size, max_steps=12, learning_rate=1e-2, warmup_steps=0, seed=0)
        args.logging_steps, args.save_strategy = 1, "no"
        trainer = InstructionTrainer(load_model(tmp_path / "mamba", 0.3), args, data, tokenizer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert any("train_tokens_per_second" in entry for entry in trainer.state.log_history)
    assert losses[0][-1] < 0.6 * losses[0][0]
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-4, atol=1e-4)


def test_the_last_complete_checkpoint_is_found(tmp_path, capsys):
    assert find_complete_checkpoint(tmp_path) is None
    for step, state in ((9, "{}"), (10, "{}"), (11, '{"epo'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert find_complete_checkpoint(tmp_path).name == "checkpoint-10"
    assert capsys.readouterr().out.count("is incomplete") == 2


# The tool


@pytest.mark.slow
def test_a_killed_run_ends_where_an_unbroken_one_does(tmp_path, data_file):
    save_mamba(tmp_path / "mamba")
    common = (tmp_path / "mamba", data_file, "--max-steps", 6, "--batch-size", 4, "--micro-batch-size", 2)
    common += ("--save-steps", 2, "--log-steps", 1, "--lr", "1e-2", "--warmup-steps", 2, "--merge")
    run(*common, "--out-dir", tmp_path / "whole")

    # Killed while it writes its second checkpoint, which stays incomplete.
    killer = (
        "import os, signal, runpy, sys, transformers\n"
        "save = transformers.trainer_callback.TrainerState.save_to_json\n"
        "def killing(self, path):\n"
        "    if self.global_step == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(self, path)\n"
        "transformers.trainer_callback.TrainerState.save_to_json = killing\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = tool_command(*common, "--out-dir", tmp_path / "broken")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    killed = subprocess.run(
        [command[0], "-c", killer, *command[1:]], env=environment, capture_output=True, text=True, timeout=500
    )
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / "broken" / "checkpoint-4").is_dir() and not (tmp_path / "broken" / "model").exists()

    refused = run(*common, "--out-dir", tmp_path / "broken", check=False)
    assert refused.returncode == 2 and "--resume continues it" in refused.stderr
    resumed = run(*common, "--out-dir", tmp_path / "broken", "--resume")
    assert "checkpoint-4 is incomplete" in resumed.stdout and "continuing from" in resumed.stdout
    whole, broken = weights(tmp_path / "whole" / "model"), weights(tmp_path / "broken" / "model")
    start = load_model(tmp_path / "mamba", 0.3).state_dict()
    assert not torch.equal(whole["backbone.embeddings.weight"], start["backbone.embeddings.weight"])
    for name, value in whole.items():
        assert torch.equal(broken[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grootl", "lora", "full"])
def test_the_methods_of_the_paper(tmp_path, data_file, method):
    original = save_mamba(tmp_path / "mamba").state_dict()
    run(
        *(tmp_path / "mamba", data_file, "--method", method, "--max-steps", 2, "--batch-size", 4, "--merge"),
        *("--warmup-steps", 0, "--lr", "1e-2", "--out-dir", tmp_path / "run"),
    )
    model = GrootLForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.tree_scale == (0.3 if method == "grootl" else 0)
    trained = model.state_dict()
    changed = {name.split(".")[-2] for name in trained if not torch.equal(trained[name], original[name])}
    if method == "full":
        assert {"conv1d", "norm", "embeddings", "lm_head", "x_proj", "dt_proj"} <= changed
        assert model.config.tie_word_embeddings
    else:
        assert changed == set(LORA_TARGETS)


@pytest.mark.slow
def test_a_tokenizer_of_another_model_raises(tmp_path, data_file):
    save_mamba(tmp_path / "mamba", vocab_size=200)
    result = run(tmp_path / "mamba", data_file, "--out-dir", tmp_path / "run", check=False)
    assert result.returncode == 1
    assert "the tokenizer has 257 tokens, but the model only 200" in result.stderr


@pytest.mark.slow
def test_two_processes(tmp_path, data_file):
    """By torchrun, on CPUs: the loss of the first step is that of one process."""
    save_mamba(tmp_path / "mamba")
    common = (tmp_path / "mamba", data_file, "--max-steps", 2, "--batch-size", 4, "--micro-batch-size", 2)
    common += ("--lr", "1e-2", "--warmup-steps", 0, "--method", "full", "--save-steps", 2)
    run(*common, "--out-dir", tmp_path / "one")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    _, *rest = tool_command(*common, "--out-dir", tmp_path / "two")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *rest],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    state = json.loads((tmp_path / "two" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    one, two = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)

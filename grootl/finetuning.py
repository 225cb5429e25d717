"""Fine-tuning on instructions: methods, the published recipe, the trainer, checkpoints, and merging of adapters."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .instructions import InstructionData, collate
from .modeling_grootl import GrootLForCausalLM

__all__ = [
    "LORA_TARGETS",
    "METHODS",
    "InstructionTrainer",
    "Method",
    "add_lora",
    "find_complete_checkpoint",
    "finetune",
    "load_model",
    "merge_lora",
    "recipe",
]

LORA_TARGETS = ("x_proj", "embeddings", "in_proj", "out_proj")


class Method(NamedTuple):
    """What is trained, and on which network."""

    lora: bool
    """Whether adapters are trained, or all weights."""
    tree_scale: float
    """Of the network; 0 is Mamba."""


METHODS = {
    "grootl": Method(lora=True, tree_scale=0.3),
    "lora": Method(lora=True, tree_scale=0.0),
    "full": Method(lora=False, tree_scale=0.0),
}


def load_model(name: str, tree_scale: float, **settings: Any) -> GrootLForCausalLM:
    """A Mamba or GrootL with the given share of the tree. Its weights are float32 unless `settings` say otherwise."""
    return GrootLForCausalLM.from_pretrained(name, tree_scale=tree_scale, **{"dtype": torch.float32, **settings})


def add_lora(model: GrootLForCausalLM, rank: int = 8, alpha: int = 16) -> PeftModel:
    """The model with trainable low-rank adapters on the published layers: x_proj, embeddings, in_proj and out_proj.

    The output head gets none, so its weights are separated from those of the embeddings first. Otherwise, merging the
    adapter of the embeddings would change the head as well.
    """
    _untie(model)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def merge_lora(model: PeftModel) -> GrootLForCausalLM:
    """The model with its adapters added to its weights; its outputs are those with adapters."""
    base: Any = model.get_base_model()
    _untie(base)
    return model.merge_and_unload(safe_merge=True)


def _untie(model: GrootLForCausalLM) -> None:
    """Give the output head weights of its own."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def recipe(out_dir: Path, batch_size: int = 16, micro_batch_size: int = 4, **changes: Any) -> TrainingArguments:
    """The published recipe: 16 records a step for one epoch, AdamW without weight decay, a learning rate of 2e-5 after
    20 steps of warm-up, gradient checkpointing, and bfloat16 where there is a GPU.

    Args:
        out_dir: folder of the run.
        batch_size: records a step, of all processes together.
        micro_batch_size: records at a time in each process.
        changes: other arguments of `transformers.TrainingArguments`.

    Raises:
        ValueError: a batch that its parts do not make up.
    """
    at_a_time = micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
    if batch_size < 1 or micro_batch_size < 1 or batch_size % at_a_time:
        raise ValueError(
            f"batch_size must be a multiple of micro_batch_size times the processes, {at_a_time}, got {batch_size}"
        )
    arguments = {
        "num_train_epochs": 1,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": True,
        "save_total_limit": 2,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",  # for the tokens a second in the log
        "remove_unused_columns": False,
        "report_to": "none",
        **changes,
    }
    return TrainingArguments(
        output_dir=str(out_dir),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=batch_size // at_a_time,
        **arguments,
    )


class InstructionTrainer(Trainer):
    """transformers' Trainer for `InstructionData`.

    Batches are padded on the right. A loss that is not finite ends the run before another checkpoint is written.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, data: InstructionData, tokenizer: Any) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id or 0),
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch; FloatingPointError if it is NaN or infinite."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss.item()} after step {self.state.global_step}; the last checkpoint is from before"
            )
        return result


def find_complete_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run that was written to its end. The trainer writes its state last."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            print(f"{checkpoint} is incomplete and is left out", flush=True)
            continue
        return checkpoint
    return None


def finetune(
    model: GrootLForCausalLM | PeftModel,
    tokenizer: Any,
    data: InstructionData,
    args: TrainingArguments,
    resume: bool = False,
    merge: bool = False,
) -> GrootLForCausalLM | PeftModel:
    """Train, and write model and tokenizer to `model` in the folder of the run.

    Args:
        model: with adapters (`add_lora`), which then are all that is trained; or without.
        tokenizer: the model's.
        data: what is trained on.
        args: of `recipe`.
        resume: continue from the last complete checkpoint of the folder, if there is one.
        merge: add the adapters to the weights at the end, and write the whole model. Else the adapters are written.

    Returns:
        The model that was written.
    """
    assert args.output_dir is not None  # transformers gives it a default
    out_dir = Path(args.output_dir)
    trainer = InstructionTrainer(model, args, data, tokenizer)
    checkpoint = find_complete_checkpoint(out_dir) if resume else None
    if checkpoint is not None:
        print(f"continuing from {checkpoint}", flush=True)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model = trainer.accelerator.unwrap_model(trainer.model)
    if merge and isinstance(model, PeftModel):
        model = merge_lora(model)
    if trainer.is_world_process_zero():
        _save(model, tokenizer, out_dir / "model")
    return model


def _save(model: PreTrainedModel | PeftModel, tokenizer: Any, folder: Path) -> None:
    """Write to a temporary folder, which is then renamed."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(str(temporary))
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)

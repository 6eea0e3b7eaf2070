"""TRL's SFTTrainer with a LEAML adapter on an image-text model.

    python examples/trl_sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --labeled train.jsonl --output runs/sft

SFTTrainer takes ``LeamlConfig`` as it takes ``LoraConfig``. ``--selection`` is the file that ``leaml adapt`` or
``Selection.save`` wrote; without it neurons are drawn at random, the control.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from leaml_plugin import LeamlConfig, models
from leaml_plugin.data import load_labeled, open_image


def conversations(path: str) -> Dataset:
    """The labels in TRL's form: ``images`` beside ``messages`` in which each picture has its place."""
    rows = []
    for qa in load_labeled(path):
        pictures = [{"type": "image"} for _ in qa.images]
        rows.append(
            {
                "images": [open_image(ref) for ref in qa.images],
                "messages": [
                    {"role": "user", "content": [*pictures, {"type": "text", "text": qa.question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": qa.answer}]},
                ],
            }
        )
    return Dataset.from_list(rows)


def main(argv: Sequence[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub id of an image-text model")
    parser.add_argument("--labeled", required=True, help="JSONL of image, question, answer")
    parser.add_argument("--selection", help="file of a saved selection")
    parser.add_argument("--output", default="runs/sft")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args(argv)

    loaded = models.load(args.model, device=args.device)
    if args.selection:
        adapter = LeamlConfig(selection=args.selection)
    else:
        adapter = LeamlConfig(target_modules=list(models.target_linears(loaded.model)), density=0.05)
    trainer = SFTTrainer(
        loaded.model,
        SFTConfig(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            max_length=None,  # truncation would cut image tokens away
            use_cpu=args.device == "cpu",
            bf16=args.device != "cpu",
            dataloader_pin_memory=False,
            report_to="none",
        ),
        train_dataset=conversations(args.labeled),
        processing_class=loaded.processor,
        peft_config=adapter,
    )
    trainer.train()
    trainer.save_model(f"{args.output}/adapter")
    print(f"adapter: {args.output}/adapter")
    return trainer


if __name__ == "__main__":
    main()

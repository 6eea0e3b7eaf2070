"""Selective distillation of an image-text model with transformers' Trainer.

    python examples/trainer_qwen2_5_vl.py --model Qwen/Qwen2.5-VL-3B-Instruct \\
        --labeled train.jsonl --unlabeled images/ --captions captions.jsonl --output runs/trainer

Neurons are scored on the labelled questions; then only they learn, from the questions and the teacher's captions
together. Everything of ``TrainingArguments`` works (``--bf16``, ``--report_to wandb``, ``torchrun``, ...): this script
passes on the few that it names, add others where they are made. To resume, run the same command with ``--resume``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import TrainingArguments

from leaml_plugin import models
from leaml_plugin.data import Collator, Prompts, load_labeled, load_unlabeled
from leaml_plugin.tuner.trainer import SelectiveTrainer


def main(argv: Sequence[str] | None = None) -> SelectiveTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub id of an image-text model")
    parser.add_argument("--labeled", required=True, help="JSONL of image, question, answer")
    parser.add_argument("--unlabeled", required=True, help="directory of pictures")
    parser.add_argument("--captions", required=True, help="JSONL of image, caption")
    parser.add_argument("--output", default="runs/trainer")
    parser.add_argument("--density", type=float, default=0.05, help="share of each layer's neurons that learn")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output directory")
    args = parser.parse_args(argv)

    loaded = models.load(args.model, device=args.device)
    prompts = Prompts.load()
    collator = Collator(loaded.processor, prompts)
    questions = [prompts.vqa(qa) for qa in load_labeled(args.labeled)]
    captions = [prompts.caption(picture) for picture in load_unlabeled(args.unlabeled, args.captions)]

    trainer = SelectiveTrainer(
        loaded.model,
        TrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.lr,
            save_steps=max(1, args.steps // 4),
            save_total_limit=2,
            remove_unused_columns=False,  # the collator reads whole turns
            dataloader_pin_memory=False,
            use_cpu=args.device == "cpu",
            report_to="none",
        ),
        data_collator=collator,
        train_dataset=questions + captions,
        relevance_dataset=questions,
        targets=models.target_linears(loaded.model),
        density=args.density,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_adapter(f"{args.output}/adapter")
    print(f"adapter: {args.output}/adapter")
    return trainer


if __name__ == "__main__":
    main()

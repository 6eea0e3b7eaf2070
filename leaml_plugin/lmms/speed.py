"""The tokens per second of the model ``leaml`` against plain batched ``generate``: same requests, in turns, medians.

    python -m leaml_plugin.lmms.speed MODEL [--batch-size 16] [--new-tokens 32] [--requests 96] [--rounds 7]

Covers: what the model class adds (messages, pictures, prefetching, decoding) to the loop that anybody would write with
transformers alone. Both encode, generate and decode; greedy, so both write the same. Prints one JSON line with the
machine. Does not cover: lmms-eval's own start-up and scoring.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from leaml_plugin import models
from leaml_plugin.lmms.model import Leaml

QUESTION = "What is in the picture, and where is it?"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m leaml_plugin.lmms.speed")
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)

    loaded = models.load(args.model, device=args.device)
    lm = Leaml(loaded, batch_size=args.batch_size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (args.requests, 12, 12, 3), generator=generator, dtype=torch.uint8)
    pictures = [Image.fromarray(block.numpy()).resize((96, 96), Image.Resampling.BICUBIC) for block in noise]
    ways: dict[str, Callable[[], int]] = {
        "leaml": lambda: _through_lmms(lm, pictures, args.new_tokens),
        "plain": lambda: _plain(lm, pictures, args.batch_size, args.new_tokens),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            tokens = way()
            _wait(loaded.device)
            if number:  # the first round warms up
                speeds[name].append(tokens / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(speeds["leaml"], speeds["plain"])]
    where = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else platform.processor()
    print(
        json.dumps(
            {
                "tokens_per_second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
                "settings": {**vars(args), "threads": torch.get_num_threads(), "hardware": where or platform.machine()},
            }
        )
    )


def _messages(picture: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": QUESTION}]}]


def _through_lmms(lm: Leaml, pictures: list[Image.Image], new_tokens: int) -> int:
    from lmms_eval.api.instance import Instance

    lm.task_dict = {"speed": {"test": [_messages(picture) for picture in pictures]}}
    options = {"max_new_tokens": new_tokens, "until": []}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(QUESTION, lambda doc: doc, options, i, "speed", "test"),
            idx=0,
            metadata={"task": "speed", "doc_id": i, "repeats": 1},
        )
        for i in range(len(pictures))
    ]
    return sum(answer.token_counts.output_tokens for answer in lm.generate_until(requests))


@torch.inference_mode()
def _plain(lm: Leaml, pictures: list[Image.Image], batch_size: int, new_tokens: int) -> int:
    """The loop that one writes with transformers alone; counts tokens up to the end of each answer, as above."""
    processor, config, ends = lm.loaded.processor, lm._config({"max_new_tokens": new_tokens}), set(lm._ends)
    text = processor.apply_chat_template(_messages(None), tokenize=False, add_generation_prompt=True)
    count = 0
    for start in range(0, len(pictures), batch_size):
        some = pictures[start : start + batch_size]
        batch = processor(
            text=[text] * len(some),
            images=[[picture] for picture in some],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        out = lm.model.generate(**lm.loaded.to_device(batch), generation_config=config)
        rows = out[:, batch["input_ids"].shape[1] :]
        processor.batch_decode(rows, skip_special_tokens=True)
        for row in rows.tolist():
            count += next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
    return count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()

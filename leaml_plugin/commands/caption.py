"""``leaml caption``: options to a :class:`~leaml_plugin.captioning.CaptionJob`, and the totals in a line."""

from __future__ import annotations

import argparse
from typing import Any

from leaml_plugin import config

EXAMPLES = """examples:
  leaml caption --images images/ --output captions.jsonl \\
      --teacher http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-VL-72B-Instruct --concurrency 32
  leaml caption --images images/ --output captions.jsonl --teacher model:Qwen/Qwen2.5-VL-7B-Instruct
  leaml caption --images images/ --output captions.jsonl --teacher https://api.example.com/v1 --model large \\
      --api-key-env EXAMPLE_KEY --requests-per-minute 60 --price-prompt 2.5 --price-completion 10 --max-cost 20
every setting:  leaml caption --show-settings
"""

# option -> setting that it fills
_OPTIONS = {
    "images": "images",
    "output": "output",
    "captions": "captions",
    "dtype": "dtype",
    "device": "device",
    "teacher": "caption.teacher",
    "model": "caption.model",
    "prompts": "caption.prompts",
    "temperature": "caption.temperature",
    "max_tokens": "caption.max_tokens",
    "longest_side": "caption.longest_side",
    "batch_size": "caption.batch_size",
    "seed": "caption.seed",
    "concurrency": "caption.server.concurrency",
    "timeout": "caption.server.timeout",
    "total_timeout": "caption.server.total_timeout",
    "requests_per_minute": "caption.server.requests_per_minute",
    "tokens_per_minute": "caption.server.tokens_per_minute",
    "price_prompt": "caption.server.price_prompt",
    "price_completion": "caption.server.price_completion",
    "max_cost": "caption.server.max_cost",
    "api_key_env": "caption.server.api_key_env",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", help="a directory of pictures, a file that lists them, or a Hugging Face dataset")
    add("--output", help="the captions file (.jsonl); the same command takes up an interrupted job")
    add("--teacher", help="http://host:port/v1 (any OpenAI-compatible server), or model:PATH (transformers)")
    add("--model", help="the model's name on the server (default: the only one there)")
    add("--captions", help="captions that are there already; only the other pictures are asked about")
    add("--prompts", help="teacher prompt: a directory of prompt files, or one file")
    add("--temperature", type=float, help="0 is greedy (default)")
    add("--max-tokens", type=int, help="longest caption (default 256)")
    add("--longest-side", type=int, help="pixels to which pictures are scaled down for a server (default 1024)")
    add("--seed", type=int, help="of the draws, where the temperature is not 0 (default 0)")
    add("--concurrency", type=int, help="requests at a time (default 8)")
    add("--timeout", type=float, help="seconds for one try of a request (default 300)")
    add("--total-timeout", type=float, help="seconds for all tries of a request (default 1800)")
    add("--requests-per-minute", type=float, help="limit (default: none)")
    add("--tokens-per-minute", type=float, help="limit of prompt and answer together (default: none)")
    add("--price-prompt", type=float, help="price of a million prompt tokens")
    add("--price-completion", type=float, help="price of a million written tokens")
    add("--max-cost", type=float, help="stop when the captions have cost more")
    add("--api-key-env", help="environment variable with the API key (default LEAML_API_KEY)")
    add("--batch-size", type=int, help="pictures at once, for model:PATH (default 8)")
    add("--dtype", help='weights of model:PATH: "auto" (default), float32, bfloat16 or float16')
    add("--device", help='of model:PATH: "auto" (default), cpu, cuda, cuda:1, ...')
    add("--trust-remote-code", action="store_true", help="run code that comes with model:PATH")
    add("--config", help="JSON or TOML file with settings; options on the command line win over it")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting, by its full name; repeatable")
    add("--show-settings", action="store_true", help="print every setting with its default and stop")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Nested settings: file first, then options, then ``--set``."""
    return config.from_arguments(args, {option: (name,) for option, name in _OPTIONS.items()})


def main(args: argparse.Namespace) -> int:
    from leaml_plugin.artifacts import canonical_json
    from leaml_plugin.captioning import CaptionJob, write_captions
    from leaml_plugin.stages.caption import CaptionConfig
    from leaml_plugin.training import config_dict

    if args.show_settings:
        defaults = CaptionJob("...", "....jsonl", CaptionConfig(teacher="model:..."))
        print(canonical_json(config_dict(defaults)), end="")
        return 0
    job = config.build(CaptionJob, settings(args))
    print(f"{job.output}: {write_captions(job)}")
    return 0

"""Do all forms of an adaptation say the same? Prints the largest difference of logits between each two.

    python examples/parity.py --model Qwen/Qwen2.5-VL-3B-Instruct

A few steps on a fixed text tune the same neurons in place and as an adapter; the adapter is then reloaded, merged,
found again by comparing weights, and exported as LoRA. Differences are of the order of the dtype's rounding: 1e-6 in
float32, a few 1e-2 in bfloat16, whose logits carry three digits.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel, get_peft_model

from leaml_plugin import LeamlConfig, RelevanceScorer, SparseAdamW, attach, select
from leaml_plugin.selection import linears
from leaml_plugin.tuner import diff, export_lora, max_logit_difference, merge, probe, save_adapter
from leaml_plugin.tuner.convert import load_model


def train(model, parameters, batch, steps: int, lr: float) -> None:
    """Decay is off: it pulls tuned rows towards 0 in place, but their deltas towards 0 in an adapter."""
    optimizer = SparseAdamW(parameters, lr=lr, weight_decay=0.0)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub id of a transformers model")
    parser.add_argument(
        "--targets", default=r".*(q|k|v|o|gate|up|down)_proj", help="regular expression of Linear names"
    )
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv)

    model = load_model(args.model)
    inputs = probe(model)
    batch = {**inputs, "labels": inputs["input_ids"]}
    with RelevanceScorer(linears(model, args.targets), gradients="stream", freeze=model) as scorer:
        model(**batch).loss.backward()
        scorer.accumulate()
    selection = select(scorer.scores(), args.density)

    handle = attach(model, selection)
    train(model, handle.parameters(), batch, args.steps, args.lr)
    handle.detach()

    adapted = get_peft_model(load_model(args.model), LeamlConfig(selection=selection))
    train(adapted, [p for p in adapted.parameters() if p.requires_grad], batch, args.steps, args.lr)

    results = {
        "base against tuned in place (what training changed)": max_logit_difference(load_model(args.model), model),
        "tuned in place against tuned as an adapter": max_logit_difference(model, adapted),
    }
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        save_adapter(handle, out / "adapter")
        reloaded = PeftModel.from_pretrained(load_model(args.model), out / "adapter")
        results["tuned in place against its saved adapter"] = max_logit_difference(model, reloaded)
        results["adapter against merged model"] = merge(args.model, out / "adapter", out / "merged")
        results["merged model against the adapter found by diff"] = diff(args.model, out / "merged", out / "found")
        results["adapter against exported LoRA"] = export_lora(out / "adapter", out / "lora", base=args.model)
    for name, value in results.items():
        print(f"{value:10.3g}  {name}")
    return results


if __name__ == "__main__":
    main()

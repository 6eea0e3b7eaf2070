"""LEAML in a plain PyTorch repository: your own model, your own loss, your own loop; nothing from transformers.

    python examples/plain_pytorch.py --output runs/plain

The vision-language model below is a stand-in for yours. What LEAML adds to the loop are the lines marked with ``# <-``:
score the neurons on the labelled questions, select some, train only those on other data, save the selection.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from leaml_plugin import RelevanceScorer, SparseAdamW, attach, select
from leaml_plugin.selection import linears

COLOURS = ("red", "green", "blue")


class TinyVLM(nn.Module):
    """Patches and words go through one transformer; the last position answers."""

    def __init__(self, words: int = 8, dim: int = 48, layers: int = 2):
        super().__init__()
        self.patch = nn.Linear(3 * 8 * 8, dim)
        self.word = nn.Embedding(words, dim)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(dim, words)

    def forward(self, image: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        patches = image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = torch.cat([self.patch(patches), self.word(question)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, -1])


def batch(n: int, seed: int, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures of one colour, the question 'which colour?' and the answer; ``shift`` moves them out of distribution."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randint(3, (n,), generator=generator)
    image = 0.3 * torch.randn(n, 3, 16, 16, generator=generator) + shift
    image[torch.arange(n), colour] += 1.0
    return image, torch.full((n, 1), 3), colour


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/plain", help="where the selection and the weights go")
    parser.add_argument("--density", type=float, default=0.1, help="share of each layer's neurons that learn")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = TinyVLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(args.steps):  # the model as you have it: trained on ordinary pictures
        image, question, answer = batch(32, step)
        F.cross_entropy(model(image, question), answer).backward()
        optimizer.step()
        optimizer.zero_grad()

    modules = linears(model, r".*(linear1|linear2)|patch")  # which layers' neurons
    with RelevanceScorer(modules, "taylor", freeze=model) as scorer:  # <-
        for seed in range(4):
            image, question, answer = batch(8, 1000 + seed, shift=2.0)
            F.cross_entropy(model(image, question), answer).backward()
            scorer.accumulate()  # <-
    selection = select(scorer.scores(), args.density)  # <-

    handle = attach(model, selection)  # <-
    optimizer = SparseAdamW(handle.parameters(), lr=1e-2)  # <-
    for step in range(args.steps):
        image, question, answer = batch(32, 2000 + step, shift=2.0)
        loss = F.cross_entropy(model(image, question), answer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.detach()  # <-

    output = Path(args.output)
    selection.save(output / "selection.safetensors")
    torch.save(model.state_dict(), output / "model.pt")
    with torch.no_grad():
        image, question, answer = batch(200, 9999, shift=2.0)
        accuracy = float((model(image, question).argmax(-1) == answer).float().mean())
    print(f"{sum(selection.counts().values())} of {sum(selection.sizes.values())} neurons learned; loss {loss:.3f}")
    print(f"accuracy on shifted pictures: {accuracy:.2f}")
    return accuracy


if __name__ == "__main__":
    main()

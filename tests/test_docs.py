"""The Python examples of the documentation run as they stand there."""

import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAST = {
    "relevance.density": 0.2, "generator.train.steps": 2, "generator.train.batch_size": 2, "finetune.train.steps": 2,
    "finetune.train.batch_size": 2, "generate.samples": 1, "generate.max_new_tokens": 4, "evaluate.max_new_tokens": 4,
}  # fmt: skip


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.S)


def test_readme_training_example():
    """Score, select and train in place inside a user's own code."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x, y = torch.randn(5, 8), torch.randn(5, 4)
    names = {"model": model, "labelled_batch": (x, y), "loss_fn": lambda m, b: (m(b[0]) - b[1]).square().mean()}
    exec(compile(blocks("README.md")[1], "README.md", "exec"), names)
    before = names["loss_fn"](model, (x, y))
    for _ in range(20):
        names["optimizer"].zero_grad()
        names["loss_fn"](model, (x, y)).backward()
        names["optimizer"].step()
    assert names["loss_fn"](model, (x, y)) < before
    names["handle"].detach()


@pytest.mark.parametrize(("file", "number"), [("docs/pipeline.md", 0), ("docs/pipeline.md", 1), ("README.md", 0)])
def test_pipeline_examples(file, number, tmp_path, monkeypatch, tiny_models, pictures, capsys):
    from leaml_plugin import config, pipeline

    shutil.copytree(tiny_models("qwen2_5_vl"), tmp_path / "model")
    (tmp_path / "images").mkdir()
    for path in pictures:
        shutil.copy(path, tmp_path / "images")
    names = sorted(p.name for p in (tmp_path / "images").iterdir())
    labels = [{"image": f"images/{n}", "question": "Which colour?", "answer": "red"} for n in names[:3]]
    captions = [{"image": f"images/{n}", "caption": "A spot."} for n in names]
    for stem, rows in (("train", labels), ("test", labels), ("captions", captions)):
        (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.chdir(tmp_path)

    # the examples keep the defaults; two steps are enough to see that they run
    real = pipeline.AdaptConfig

    def quick(**options):
        data = dict(options)
        for name, value in FAST.items():
            config.assign(data, f"{name}={value}")
        return config.build(real, data)

    monkeypatch.setattr(pipeline, "AdaptConfig", quick)
    monkeypatch.setattr("leaml_plugin.AdaptConfig", quick, raising=False)
    block = blocks(file)[number].replace("Qwen/Qwen2.5-VL-3B-Instruct", "model")  # no Hub in a test
    exec(compile(block, file, "exec"), {})
    assert "adapter" in capsys.readouterr().out

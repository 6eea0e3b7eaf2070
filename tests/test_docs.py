"""The Python examples of the documentation run as they stand there."""

import json
import re
import shutil
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
FAST = {
    "relevance.density": 0.2, "generator.train.steps": 2, "generator.train.batch_size": 2, "finetune.train.steps": 2,
    "finetune.train.batch_size": 2, "generate.samples": 1, "generate.max_new_tokens": 4, "evaluate.max_new_tokens": 4,
}  # fmt: skip


@pytest.mark.parametrize("number", [0, 1])
def test_pipeline_examples(number, tmp_path, monkeypatch, tiny_models, pictures, capsys):
    from leaml_plugin import config, pipeline

    shutil.copytree(tiny_models("qwen2_5_vl"), tmp_path / "model")
    (tmp_path / "images").mkdir()
    for path in pictures:
        shutil.copy(path, tmp_path / "images")
    names = sorted(p.name for p in (tmp_path / "images").iterdir())
    labels = [{"image": f"images/{n}", "question": "Which colour?", "answer": "red"} for n in names[:3]]
    captions = [{"image": f"images/{n}", "caption": "A spot."} for n in names]
    for file, rows in (("train", labels), ("test", labels), ("captions", captions)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
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
    block = re.findall(r"```python\n(.*?)```", (DOCS / "pipeline.md").read_text(), flags=re.S)[number]
    exec(compile(block, "docs/pipeline.md", "exec"), {})
    assert "adapter" in capsys.readouterr().out

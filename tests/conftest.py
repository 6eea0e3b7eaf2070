"""Fixtures for everybody: tiny model directories, pictures on disk, and no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, once imported, says on standard output what it chose
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of several test runs starve each other
sys.path.insert(0, str(Path(__file__).parent))  # tests import tiny_models by name

ARCHITECTURES = ("qwen2_5_vl", "llava", "idefics3")


class _TinyModels:
    """``tiny_models(name)`` is the directory of that tiny model, built at first use."""

    def __init__(self, root: Path):
        self._root = root

    def __call__(self, name: str) -> Path:
        directory = self._root / name
        if not directory.exists():
            import tiny_models
            from transformers.utils import logging

            logging.disable_progress_bar()
            tiny_models.build(name, directory)
        return directory


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> _TinyModels:
    return _TinyModels(tmp_path_factory.mktemp("tiny_models"))


@pytest.fixture(scope="session", params=ARCHITECTURES)
def tiny_model_dir(request, tiny_models) -> Path:
    """A tiny model directory of each architecture in turn. Read only: tests share it."""
    return tiny_models(request.param)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[Path]:
    """Six small pictures of different sizes and colours. Read only."""
    from PIL import Image, ImageDraw

    root = tmp_path_factory.mktemp("pictures")
    paths = []
    for i, (width, height) in enumerate([(56, 56), (84, 40), (30, 70), (64, 64), (100, 90), (28, 28)]):
        picture = Image.new("RGB", (width, height), (40 * i, 200 - 30 * i, 90))
        ImageDraw.Draw(picture).ellipse((4, 4, width // 2, height // 2), fill=(250, 20 * i, 10))
        paths.append(root / f"picture{i}.png")
        picture.save(paths[-1])
    return paths

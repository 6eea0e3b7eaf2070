"""Packaging that pyproject.toml cannot express: the compiled extension, the shipped tasks/, the entry points."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "leaml_plugin" / "__init__.py").read_text()).group(1)

setup(
    version=VERSION,
    packages=[
        *find_packages(include=["leaml_plugin", "leaml_plugin.*"]),
        "leaml_plugin.tasks",
        "leaml_plugin.tasks.endoscopy",
        "leaml_plugin.tasks.sports",
    ],
    package_dir={"leaml_plugin.tasks": "tasks"},
    package_data={"leaml_plugin": ["**/*"], "leaml_plugin.tasks": ["**/*"]},
    entry_points={
        "console_scripts": ["leaml = leaml_plugin.cli:main"],
        "lmms_eval.models": ["leaml = leaml_plugin.lmms.entry:register"],
    },
)

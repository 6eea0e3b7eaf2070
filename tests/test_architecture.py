"""The import directions of docs/architecture.md, and that importing the package is instant and builds nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import leaml_plugin

ROOT = Path(leaml_plugin.__file__).parent
# The layer of every module; a longer prefix wins. A module may import its own layer and those below it.
LAYERS = {
    "leaml_plugin": 0,
    "leaml_plugin.errors": 0,
    "leaml_plugin.lazy": 0,
    "leaml_plugin.records": 0,
    "leaml_plugin.progress": 0,
    "leaml_plugin.config": 0,
    "leaml_plugin.sequences": 0,
    "leaml_plugin.tables": 0,
    "leaml_plugin.ranks": 0,
    "leaml_plugin.ops": 1,
    "leaml_plugin.data": 1,
    "leaml_plugin.artifacts": 1,
    "leaml_plugin.worlds": 1,
    "leaml_plugin.metrics": 1,
    "leaml_plugin.splits": 1,
    "leaml_plugin.families": 1,
    "leaml_plugin.models": 2,
    "leaml_plugin.selection": 2,
    "leaml_plugin.selective": 2,
    "leaml_plugin.optim": 2,
    "leaml_plugin.tuner": 2,
    "leaml_plugin.training": 3,
    "leaml_plugin.inference": 3,
    "leaml_plugin.teachers": 3,
    "leaml_plugin.backends": 3,
    "leaml_plugin.stages": 4,
    "leaml_plugin.pipeline": 5,
    "leaml_plugin.captioning": 5,
    "leaml_plugin.cli": 6,
    "leaml_plugin.commands": 6,
    "leaml_plugin.lmms": 6,
    "leaml_plugin.report": 6,
    "leaml_plugin.benchmark": 6,
    "leaml_plugin.study": 6,
    "leaml_plugin.tasks": 6,
}


def layer(module: str) -> int:
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return LAYERS[module]


def module_name(path: Path) -> str:
    name = ".".join(("leaml_plugin", *path.relative_to(ROOT).with_suffix("").parts))
    return name.removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module of the package that a file imports, at its top or inside functions, but for type checking."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            children = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {c for c in children if (ROOT.parent / c.replace(".", "/")).with_suffix(".py").exists()}
            found.add(node.module)
    return {name for name in found if name.split(".")[0] == "leaml_plugin"}


MODULES = {module_name(p): p for p in sorted(ROOT.rglob("*.py"))}


def test_every_module_has_a_layer():
    for name in MODULES:
        if name != "leaml_plugin":
            assert layer(name) != 0 or name in LAYERS, f"{name} is not in docs/architecture.md's table"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    for imported in imports(MODULES[name]):
        assert layer(imported) <= layer(name), f"{name} (layer {layer(name)}) imports {imported} ({layer(imported)})"


def test_stages_do_not_import_each_other():
    for name, path in MODULES.items():
        if name.startswith("leaml_plugin.stages."):
            others = {i for i in imports(path) if i.startswith("leaml_plugin.stages") and i != name}
            assert not others, f"{name} imports {others}"


def test_worlds_know_nothing_of_the_stages_and_report_nothing_of_torch():
    for name, path in MODULES.items():
        if name.startswith("leaml_plugin.worlds"):
            assert all(layer(i) <= 1 for i in imports(path))
        if name.startswith("leaml_plugin.report"):
            assert "torch" not in {a.split(".")[0] for a in _top_imports(path)}


def _top_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_import_is_instant_and_loads_no_torch():
    code = (
        "import sys, leaml_plugin, leaml_plugin.cli, leaml_plugin.lmms.entry;"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'lmms_eval', 'peft', 'datasets'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_public_names_resolve():
    for name in leaml_plugin.__all__:
        assert getattr(leaml_plugin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'adopt'"):
        _ = leaml_plugin.adopt


def test_only_artifacts_knows_run_directory_paths():
    """No other module joins a path with the names of a run directory's own parts."""
    part = re.compile(r"""/ *f?["'](?:stages|runs|work|done\.json|summary\.json|part-)|["']done\.json["']""")
    for name, path in MODULES.items():
        if name != "leaml_plugin.artifacts":
            assert not part.search(path.read_text()), f"{name} knows the parts of a run directory"

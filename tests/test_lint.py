"""ruff finds nothing, and nothing that was put off stands in the code."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_ruff():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_nothing_is_put_off():
    """No marker of unfinished work, no handler that swallows everything."""
    unfinished = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|except(?: Base)?(?: Exception)?:\s*\n\s*pass")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sources = [ROOT / name for name in tracked if name.endswith((".py", ".cpp", ".h", ".cu", ".cuh", ".sh"))]
    assert len(sources) > 50
    for path in sources:
        if path.exists():
            assert not unfinished.search(path.read_text()), path

"""Print what pyproject.toml requires with every extra, one requirement a line, for pip to install before the build."""

import re
from pathlib import Path

text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
# Python 3.10 has no tomllib; every requirement list in the file holds plain double-quoted strings.
lists = re.findall(r"^(?:dependencies|eval|test|report) = \[(.*?)\]$", text, flags=re.M | re.S)
for requirement in dict.fromkeys(name for body in lists for name in re.findall(r'"([^"]+)"', body)):
    print(requirement)

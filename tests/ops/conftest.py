"""The kernel tests compare compiled code with its twins; without a build there is nothing to compare."""

from __future__ import annotations

import pytest

from leaml_plugin import ops


@pytest.fixture(scope="session")
def native() -> None:
    """Skips a test that needs the compiled CPU kernels, with the reason they are missing."""
    info = ops.build_info()["cpu"]
    if not info["loaded"]:
        pytest.skip(f"compiled CPU kernels are missing: {info['cause']}")

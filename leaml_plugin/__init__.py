"""leaml_plugin: label-efficient adaptation of multimodal LLMs to visual domains they have never seen (LEAML).

Names resolve lazily: importing the package imports neither torch nor transformers and builds nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leaml_plugin.lazy import attributes

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "LeamlError": "leaml_plugin.errors",
    "QA": "leaml_plugin.records",
    "Picture": "leaml_plugin.records",
    "PseudoQA": "leaml_plugin.records",
    "NeuronScores": "leaml_plugin.selection",
    "RelevanceScorer": "leaml_plugin.selection",
    "Selection": "leaml_plugin.selection",
    "select": "leaml_plugin.selection",
    "attach": "leaml_plugin.selective",
    "SparseAdamW": "leaml_plugin.optim",
    "LeamlConfig": "leaml_plugin.tuner",
    "AdaptConfig": "leaml_plugin.pipeline",
    "adapt": "leaml_plugin.pipeline",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from leaml_plugin.errors import LeamlError
    from leaml_plugin.optim import SparseAdamW
    from leaml_plugin.pipeline import AdaptConfig, adapt
    from leaml_plugin.records import QA, Picture, PseudoQA
    from leaml_plugin.selection import NeuronScores, RelevanceScorer, Selection, select
    from leaml_plugin.selective import attach
    from leaml_plugin.tuner import LeamlConfig

__getattr__ = attributes(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted(__all__)

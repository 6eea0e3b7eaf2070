"""The configuration of a LEAML adapter, as PEFT saves it in ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from leaml_plugin.errors import LeamlError
from leaml_plugin.selection import Selection
from leaml_plugin.tuner.register import NAME, add_member


@dataclass
class LeamlConfig(PeftConfig):
    """A trainable delta on the selected neurons of each target Linear; the base stays frozen and opaque.

    The usual way is ``LeamlConfig(selection=select(scores, density=0.05))``: targets and neurons come from the
    selection, which may have been made on another model of the same shapes. Without one, ``target_modules`` and
    ``density`` draw neurons at random, the control that a relevance score must beat.

    Row indices are saved with the weights; this file holds how many there are per module, because a loader must build
    the tensors before it reads them. ``base`` is filled in when the adapter is put on its model, and checked when it
    is loaded onto one.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names, name endings, a regular expression or 'all-linear'; from the selection if given."},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved whole beside the adapter."}
    )
    selection: Any = field(
        default=None, metadata={"help": "A Selection, or the path of a saved one. Not saved: the indices are."}
    )
    density: float = field(
        default=0.05, metadata={"help": "Share of rows drawn at random where no selection is given."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of that draw."})
    row_counts: dict[str, int] = field(default_factory=dict, metadata={"help": "Selected rows per module."})
    column_counts: dict[str, int] = field(default_factory=dict, metadata={"help": "Selected columns per module."})
    sizes: dict[str, int] = field(default_factory=dict, metadata={"help": "Neurons per module to choose from."})
    base: dict[str, str] = field(default_factory=dict, metadata={"help": "Fingerprint of each target weight."})
    criterion: str = field(default="", metadata={"help": "What the neurons were selected by."})
    init_weights: bool = field(
        default=True, metadata={"help": "Start from delta = 0. False draws small random deltas (for tests only)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_member(NAME)
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        if isinstance(self.exclude_modules, (set, tuple)):
            self.exclude_modules = sorted(self.exclude_modules)
        chosen, self.selection = self.selection, None
        if isinstance(chosen, (str, Path)):
            chosen = Selection.load(chosen)
        if chosen is not None and not isinstance(chosen, Selection):
            raise LeamlError(f"LeamlConfig: selection must be a Selection or its file, got {type(chosen).__name__}.")
        if not 0 < self.density <= 1:
            raise LeamlError(f"LeamlConfig: density must be above 0 and at most 1, got {self.density}.")
        # not a dataclass field: tensors have no place in adapter_config.json
        self._selection: Selection | None = chosen
        if chosen is not None:
            self.row_counts = {name: len(i) for name, axis, i in chosen if axis == 0}
            self.column_counts = {name: len(i) for name, axis, i in chosen if axis == 1}
            if not self.row_counts and not self.column_counts:
                raise LeamlError("LeamlConfig: the selection is empty, no neuron of any module is selected.")
            targets = self.row_counts | self.column_counts
            self.sizes = {name: chosen.sizes[name] for name in targets if name in chosen.sizes}
            self.criterion = chosen.criterion
        if self.target_modules is None and (self.row_counts or self.column_counts):
            self.target_modules = [*self.row_counts, *self.column_counts]
        # whether the targets are listed one by one (a selection, a saved adapter) or are to be matched by pattern
        self._listed = bool(self.row_counts or self.column_counts)

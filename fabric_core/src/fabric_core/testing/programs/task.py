"""What a section of a program works with."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from fabric_core.testing.plain_loop import Build, Net


@dataclass(frozen=True)
class Task:
    """How the author of a part wants it to be used.

    Attributes:
        folder: Where sections may write; all ranks share it.
        size: How many processes the job has.
        accelerator: The name of the accelerator.
        options: Options of the strategy.
        program: The author's module with ``model()`` and ``strategy_options(processes)``, either of which may be
            missing; empty for none.
        section: The name of the section.
    """

    folder: Path
    size: int
    accelerator: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    program: str = ""
    section: str = ""

    def in_section(self, name: str) -> Task:
        """The same, for a section."""
        return replace(self, section=name)

    def path(self, name: str, size: int | None = None) -> Path:
        """A path in the folder, for a job of this size or another."""
        return self.folder / f"{name.replace(' ', '_')}.{size or self.size}"

    @property
    def own(self) -> Path:
        """A path that no other section uses."""
        return self.path(f"checkpoint-{self.section.replace(':', '-')}")

    @property
    def build(self) -> Build:
        """Makes the model: shape (N, 6) to (N, 2)."""
        return build_of(self.program)

    def fabric(self, precision: str = "32-true", **flags: Any) -> Any:
        """A new ``Fabric``. Its strategy is the one that ``fabric run`` was told."""
        from fabric_core import Fabric

        options = options_of(self.program, self.options, self.size)
        return Fabric(accelerator=self.accelerator, precision=precision, strategy_options=options, **flags)


def options_of(program: str, options: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The options of a strategy: plain ones, and those that the author's module makes."""
    more = getattr(importlib.import_module(program), "strategy_options", None) if program else None
    return {**options, **(more(size) if more else {})}


def build_of(program: str) -> Build:
    """What makes the model: the author's own function, or the kit's model."""
    own: type[nn.Module] | None = None
    own = getattr(importlib.import_module(program), "model", None) if program else None
    return own or Net

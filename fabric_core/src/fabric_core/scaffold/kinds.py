"""The kinds of parts that can be made, and how they differ beyond their templates."""

from __future__ import annotations

from dataclasses import dataclass

from fabric_core.errors import ConfigurationError, did_you_mean
from fabric_core.specs import KINDS

TORCH = "torch>=2.6"


@dataclass(frozen=True)
class Kind:
    """One kind of part.

    Attributes:
        name: As everywhere: ``"cluster environment"``.
        suffix: What the name of a class ends with.
        module: The module that holds the class.
        requires: What a distribution needs beyond the core.
    """

    name: str
    suffix: str
    module: str
    requires: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The folder of its templates."""
        return self.name.replace(" ", "_")

    @property
    def word(self) -> str:
        """As it is written on the command line."""
        return self.name.replace(" ", "-")


_KINDS = {
    kind.name: kind
    for kind in (
        Kind("accelerator", "Accelerator", "accelerator", (TORCH,)),
        Kind("strategy", "Strategy", "strategy", (TORCH,)),
        Kind("precision", "Precision", "precision", (TORCH,)),
        Kind("cluster environment", "Environment", "environment"),
        Kind("launcher", "Launcher", "launcher"),
        Kind("checkpoint io", "CheckpointIO", "checkpoint_io", (TORCH,)),
        Kind("logger", "Logger", "logger"),
    )
}

WORDS: tuple[str, ...] = tuple(_KINDS[name].word for name in KINDS)
"""The kinds as they are written on the command line."""


def kind_named(text: str) -> Kind:
    """The kind that was asked for, however its words are joined.

    Raises:
        ConfigurationError: There is no such kind.
    """
    name = " ".join(text.lower().replace("-", " ").replace("_", " ").split())
    if name not in _KINDS:
        raise ConfigurationError(
            f"There is no kind {text!r}.{did_you_mean(name.replace(' ', '-'), WORDS)} Kinds: {', '.join(WORDS)}."
        )
    return _KINDS[name]

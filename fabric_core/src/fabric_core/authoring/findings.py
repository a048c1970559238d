"""What is wrong with a plugin: one sentence, at a file and a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fabric_core.errors import ConfigurationError

__all__ = ["CHECKS", "Finding"]

CHECKS = {
    "toml": "pyproject.toml can be read",
    "entry-point": "an entry point of the group fabric_core.plugins names a hooks module that exists",
    "import": "the hooks module can be imported in a fresh process",
    "light": "importing the hooks module is quick and brings in nothing heavy",
    "deterministic": "the hooks module says the same in every process",
    "hooks": "every hook exists, and is marked with @hookimpl",
    "specs": "every spec can be made, and no name is there twice",
    "targets": "targets, probes and detections can be imported",
    "contract": "a target keeps the contract of its kind",
    "options": "the class takes the options of its spec",
    "version": "this core speaks the part's version of the contract",
    "requires": "what the parts require, the distribution brings, itself or by an extra",
    "clash": "no installed distribution has parts of the same names",
    "core": "the dependency on fabric-core is stated, and has no upper bound",
    "package": "the package is typed, has a readme and a licence",
}
"""What is checked: the word of each check, and what holds when it finds nothing."""

Severity = Literal["error", "advice"]


@dataclass(frozen=True, order=True)
class Finding:
    """Something that an author should know.

    Attributes:
        path: The file.
        line: The line in it, from 1; 0 for the file as a whole.
        check: One of `CHECKS`.
        severity: ``"error"``: users will run into it. ``"advice"``: it works, and could be better.
        message: One or two sentences.
    """

    path: Path
    line: int
    check: str
    message: str
    severity: Severity = "error"

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ConfigurationError(f"Finding: check={self.check!r} has to be one of {', '.join(CHECKS)}.")

    @property
    def is_error(self) -> bool:
        """Whether users will run into it."""
        return self.severity == "error"

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain data, for JSON."""
        return {
            "severity": self.severity,
            "check": self.check,
            "path": str(self.path),
            "line": self.line,
            "message": self.message,
        }

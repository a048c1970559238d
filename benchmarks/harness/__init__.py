"""How the benchmarks measure: contenders in processes of their own, in turns, and one table for each figure."""

from harness.command_line import main
from harness.commands import PROGRAMS, Command, Commands, installed_command, python
from harness.figure import (
    ACCELERATE,
    AGAIN,
    LIGHTNING,
    OURS,
    PLAIN,
    Against,
    Case,
    Measure,
    Target,
)
from harness.operations import Operations
from harness.serving import Operation

__all__ = [
    "ACCELERATE",
    "AGAIN",
    "Against",
    "Case",
    "Command",
    "Commands",
    "LIGHTNING",
    "Measure",
    "OURS",
    "Operation",
    "Operations",
    "PLAIN",
    "PROGRAMS",
    "Target",
    "installed_command",
    "main",
    "python",
]

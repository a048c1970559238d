"""The flags that several commands share: those of a ``Fabric``, by the names of its arguments."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

FLAGS: Mapping[str, tuple[str, str]] = {
    "accelerator": ("NAME", "The device; 'auto' takes the best that is here."),
    "strategy": ("NAME", "How training is spread over the devices."),
    "devices": ("DEVICES", "How many on each node (2), all (-1, auto), or which ('0,2')."),
    "num_nodes": ("NUMBER", "How many nodes."),
    "precision": ("NAME", "The number formats, such as 32-true."),
}
"""Metavariable and line of help, by the argument's name."""


PART_KINDS = ("accelerator", "strategy", "precision", "cluster environment", "launcher", "checkpoint io")
"""The kinds of which a job has one part at most, so that ``--KIND.OPTION`` says whose option it is."""


def option_name(argument: str) -> str:
    """``num_nodes`` as it is written on the command line: ``--num-nodes``."""
    return f"--{argument.replace('_', '-')}"


def options(flags: Mapping[str, tuple[str, str]] = FLAGS) -> list[click.Parameter]:
    """Flags as options of a command. All are texts; the resolver knows what they mean."""
    return [
        click.Option([option_name(name), name], metavar=metavar, help=line)
        for name, (metavar, line) in flags.items()
    ]


def part_option(spelling: str) -> tuple[str, str] | None:
    """Kind and name of an option of a part; ``None`` when the word is something else.

    Example:
        >>> part_option("--checkpoint-io.some-option")
        ('checkpoint io', 'some_option')
    """
    kind, dot, option = spelling.removeprefix("--").partition(".")
    kind = kind.replace("-", " ").replace("_", " ")
    is_ours = spelling.startswith("--") and dot and kind in PART_KINDS
    return (kind, option.replace("-", "_")) if is_ours else None


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Only the flags that were given."""
    return {name: value for name, value in values.items() if name in FLAGS and value is not None}


def import_from(folder: str, flags: Mapping[str, Any]) -> None:
    """Let a part that is asked for by its path (``package.module:Class``) be found where the script will find it."""
    if any(":" in value for value in flags.values()):
        sys.path.insert(0, folder)

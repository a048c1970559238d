"""Sorting the words after ``fabric run``: which are ours, which the script's."""

from __future__ import annotations

import difflib
import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click

from fabric_core.cli.flags import PART_KINDS, option_name
from fabric_core.cli.ours import Ours
from fabric_core.cli.parts_help import show_help
from fabric_core.errors import ConfigurationError, did_you_mean, listing

MODULE = ("-m", "--module")
NOISE = "model"
"""``fabric run model train.py`` means ``fabric run train.py``."""


@dataclass(frozen=True)
class Call:
    """What was asked of ``fabric run``.

    Attributes:
        flags: Our options that were given, by the argument's name.
        target: The script's path, or the module's name.
        is_module: Whether it is the latter.
        args: The script's arguments, in their order.
        early: Those of them that stood before the script.
        near: Options among the script's that are nearly ours, and the option that may have been meant.
        options: Options of parts that were given (``--strategy.NAME``), by kind and name.
    """

    flags: Mapping[str, str]
    target: str
    is_module: bool
    args: tuple[str, ...]
    early: tuple[str, ...] = ()
    near: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def sort(args: Iterable[str], names: Iterable[str], ctx: click.Context) -> Call:
    """Tell our options from the script's. Names are never abbreviated: a short one may be the script's.

    Where help is asked for, the words are sorted to the end, since the help is also on the parts that they name.

    Args:
        args: The words after ``fabric run``.
        names: The arguments that are ours (``num_nodes`` for ``--num-nodes`` and ``--num_nodes``).
        ctx: For help and usage errors.

    Raises:
        click.UsageError: There is no script, or an option of ours has no value.
    """
    left = deque(args)
    ours = Ours(names, ctx)
    theirs: list[str] = []
    near: dict[str, str] = {}
    target, is_module, early, help_wanted = "", False, 0, False
    while left:
        word = left.popleft()
        name = word.partition("=")[0]
        if word in ours:
            ours.take(word, left)
        elif word == "--":
            target = target or _take_target(left, ctx)
            theirs += left
            break
        elif target:
            theirs.append(word)
            near |= _near_miss(name, names)
        elif word in ctx.help_option_names:
            help_wanted = True
        elif word in MODULE:
            target, is_module, early = _take_target(left, ctx), True, len(theirs)
        elif word.startswith("-"):
            theirs.append(word)
            near |= _near_miss(name, names)
        elif word != NOISE or not _script_follows(left, ours):
            target, early = word, len(theirs)
    if help_wanted:
        show_help(ctx, ours.flags)
    if not target:
        raise click.UsageError("Which script? Give its path, or -m and the name of a module.", ctx)
    return Call(ours.flags, target, is_module, tuple(theirs), tuple(theirs[:early]), near, ours.options)


def _near_miss(word: str, names: Iterable[str]) -> dict[str, str]:
    """An option that is hardly more than a letter away from one of ours, and that one."""
    if not word.startswith("-"):
        return {}
    stem, dot, option = word.lstrip("-").partition(".")
    known = {name.replace("_", "-").replace(" ", "-") for name in (PART_KINDS if dot else names)}
    near = difflib.get_close_matches(stem.lower().replace("_", "-"), known, n=1, cutoff=0.85)
    return {word: f"--{near[0]}{dot}{option}"} if near else {}


def _take_target(left: deque[str], ctx: click.Context) -> str:
    if not left:
        raise click.UsageError("Which script? Give its path, or -m and the name of a module.", ctx)
    return left.popleft()


def _script_follows(left: Iterable[str], ours: Ours) -> bool:
    """Whether the next word that is not of our options is a script, or ``-m`` or ``--``, which lead to one."""
    words = iter(left)
    for word in words:
        if word not in ours:
            return word in (*MODULE, "--") or not word.startswith("-")
        if "=" not in word:
            next(words, None)
    return False


def check_target(call: Call) -> None:
    """Find out before anything is started whether there is a script.

    Raises:
        ConfigurationError: There is none at that path.
    """
    path = Path(call.target)
    if call.is_module or path.is_file():
        return
    if path.is_dir():
        if (path / "__main__.py").is_file():
            return
        raise ConfigurationError(
            f"{call.target!r} is a folder without a __main__.py. Give the path of a script."
        )
    raise ConfigurationError(
        f"There is no script {call.target!r} in {os.getcwd()!r}.{_nearby(path)}{_blame(call)}"
    )


def _nearby(path: Path) -> str:
    """What the script may have been meant to be."""
    folder = path.parent
    try:
        files = {entry.name: str(folder / entry.name) for entry in folder.iterdir() if entry.is_file()}
    except OSError:
        return f" There is no folder {str(folder)!r} either."
    near = did_you_mean(path.name, files)
    if near:
        return near
    scripts = sorted(name for name in files if name.endswith(".py"))[:5]
    return f" Scripts there: {listing(scripts)}."


def _blame(call: Call) -> str:
    """The word before it may be an option of ours that was misspelled, or one of the script's that has a value."""
    if not call.early:
        return ""
    from fabric_core.cli.flags import FLAGS

    guess = did_you_mean(call.early[-1].partition("=")[0], map(option_name, FLAGS))
    return (
        f" {call.early[-1]!r} before it is no option of fabric run.{guess} Options of the script that have a value "
        "come after the script."
    )

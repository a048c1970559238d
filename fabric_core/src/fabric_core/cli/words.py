"""Sorting the words after ``fabric run``: which are ours, which the script's."""

from __future__ import annotations

import difflib
import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click

from fabric_core.cli.flags import option_name
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
    """

    flags: Mapping[str, str]
    target: str
    is_module: bool
    args: tuple[str, ...]
    early: tuple[str, ...] = ()
    near: Mapping[str, str] = field(default_factory=dict)


def sort(args: Iterable[str], names: Iterable[str], ctx: click.Context) -> Call:
    """Tell our options from the script's. Names are never abbreviated: a short one may be the script's.

    Args:
        args: The words after ``fabric run``.
        names: The arguments that are ours (``num_nodes`` for ``--num-nodes`` and ``--num_nodes``).
        ctx: For help and usage errors.

    Raises:
        click.UsageError: There is no script, or an option of ours has no value.
    """
    left = deque(args)
    ours = {spelling: name for name in names for spelling in (f"--{name}", option_name(name))}
    flags: dict[str, str] = {}
    theirs: list[str] = []
    near: dict[str, str] = {}
    target, is_module, early = "", False, 0
    while left:
        word = left.popleft()
        name, equals, value = word.partition("=")
        if name in ours:
            flags[ours[name]] = value if equals else _value(left, name, ours, ctx)
        elif word == "--":
            target = target or _take_target(left, ctx)
            theirs += left
            break
        elif target:
            theirs.append(word)
            near |= _near_miss(name, names)
        elif word in ctx.help_option_names:
            click.echo(ctx.get_help())
            ctx.exit()
        elif word in MODULE:
            target, is_module, early = _take_target(left, ctx), True, len(theirs)
        elif word.startswith("-"):
            theirs.append(word)
            near |= _near_miss(name, names)
        elif word != NOISE or not _script_follows(left, ours):
            target, early = word, len(theirs)
    if not target:
        raise click.UsageError("Which script? Give its path, or -m and the name of a module.", ctx)
    return Call(flags, target, is_module, tuple(theirs), tuple(theirs[:early]), near)


def _near_miss(word: str, names: Iterable[str]) -> dict[str, str]:
    """An option that is hardly more than a letter away from one of ours, and that one."""
    if not word.startswith("-"):
        return {}
    known = {name.replace("_", "-"): option_name(name) for name in names}
    near = difflib.get_close_matches(word.lstrip("-").lower().replace("_", "-"), known, n=1, cutoff=0.85)
    return {word: known[near[0]]} if near else {}


def _value(left: deque[str], name: str, ours: Mapping[str, str], ctx: click.Context) -> str:
    if not left or left[0] == "--" or left[0].partition("=")[0] in ours:
        raise click.UsageError(f"The option {name} needs a value.", ctx)
    return left.popleft()


def _take_target(left: deque[str], ctx: click.Context) -> str:
    if not left:
        raise click.UsageError("Which script? Give its path, or -m and the name of a module.", ctx)
    return left.popleft()


def _script_follows(left: Iterable[str], ours: Mapping[str, str]) -> bool:
    """Whether the next word that is not of our options is a script, or ``-m`` or ``--``, which lead to one."""
    words = iter(left)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in ours:
            return word in (*MODULE, "--") or not word.startswith("-")
        if not equals:
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

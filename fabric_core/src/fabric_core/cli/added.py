"""The commands that distributions add to ``fabric``: listed from their specs, imported when they are called."""

from __future__ import annotations

import click

from fabric_core.errors import AmbiguousPluginError, BrokenPluginError, listing
from fabric_core.registry import default_registry
from fabric_core.registry.installed import canonical
from fabric_core.targets import import_target


def added_commands() -> dict[str, str]:
    """The name of every added command and its line of help; with its distribution where two share a name."""
    commands = default_registry().commands
    names = [spec.name for spec, _ in commands]
    return {
        spec.name if names.count(spec.name) == 1 else f"{spec.name}@{distribution}": spec.help
        for spec, distribution in sorted(commands, key=lambda command: (command[0].name, command[1]))
    }


def added_command(name: str) -> click.Command | None:
    """Import an added command; ``None`` when there is none of that name.

    Args:
        name: ``"name"`` or ``"name@distribution"``.

    Raises:
        AmbiguousPluginError: Two distributions offer it.
        BrokenPluginError: It cannot be imported, or is no command.
    """
    bare, _, wanted = name.partition("@")
    found = [
        (spec, distribution)
        for spec, distribution in default_registry().commands
        if spec.name == bare and (not wanted or canonical(distribution) == canonical(wanted))
    ]
    if not found:
        return None
    if len(found) > 1:
        raise AmbiguousPluginError(
            f"Several distributions offer a command {name!r}. Say which: "
            f"{listing(f'fabric {bare}@{distribution}' for _, distribution in found)}; or block one with "
            "FABRIC_PLUGINS_DENY; or uninstall one."
        )
    spec, distribution = found[0]
    command = import_target(spec.target, f"the command {bare!r} of {distribution}")
    if not isinstance(command, click.Command):
        raise BrokenPluginError(
            f"The command {bare!r} of {distribution} points at {spec.target!r}, which is no click command. "
            f"This is a fault of {distribution}."
        )
    return command

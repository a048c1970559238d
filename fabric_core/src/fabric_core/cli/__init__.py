"""The command line: ``fabric``.

The module of a command is imported when the command is called; none imports PyTorch. Distributions add commands of
their own through the hook ``fabric_cli_commands``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from fabric_core import __version__
from fabric_core.cli.added import added_command, added_commands
from fabric_core.errors import ConfigurationError, FabricError, WrongTypeError, did_you_mean
from fabric_core.targets import import_target

DEBUG = "FABRIC_DEBUG"

OWN = {
    "run": ("fabric_core.cli.run:run", "Run a script, on as many processes as the flags say."),
    "explain": ("fabric_core.cli.explain:explain", "Show what the flags would choose, and why."),
    "plugins": ("fabric_core.cli.plugins:plugins", "List the installed parts; make and check your own."),
    "consolidate": ("fabric_core.cli.convert:consolidate", "Write a checkpoint in shards as one file."),
    "shard": ("fabric_core.cli.convert:shard", "Write a checkpoint in one file as shards."),
    "doctor": ("fabric_core.cli.doctor:doctor", "Show versions, devices, and what is broken and why."),
}
"""The core's own commands: where each is, and its line of help. No distribution can take their names."""


class Commands(click.Group):
    """``fabric`` itself: looks commands up without importing any that was not called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Our own, then the distributions'."""
        return [*OWN, *added_commands()]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the one that was called."""
        if name not in OWN:
            return added_command(name)
        command = import_target(OWN[name][0], f"the command {name!r}")
        assert isinstance(command, click.Command), "our own commands are click commands"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when there is none of that name."""
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None:
            ctx.fail(f"There is no command {name!r}.{did_you_mean(name, self.list_commands(ctx))}")
        return name, command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from what is said of them, not from what they are."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in OWN.items()])
        if added := added_commands():
            with formatter.section("Commands of installed distributions"):
                formatter.write_dl(list(added.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="fabric %(version)s")
def fabric() -> None:
    """Train PyTorch models with parts that are chosen by name.

    Every error of ours ends with exit code 2 when the flags are at fault, else 1. FABRIC_DEBUG=1 shows tracebacks.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code.

    Args:
        arguments: The words after ``fabric`` (default: those of this process).
    """
    try:
        fabric.main(arguments, prog_name="fabric", windows_expand_args=False)
    except FabricError as error:
        if os.environ.get(DEBUG) == "1":
            raise
        click.echo(f"fabric: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigurationError | WrongTypeError) else 1)

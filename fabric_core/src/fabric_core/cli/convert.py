"""``fabric consolidate`` and ``fabric shard``: a checkpoint in another form. PyTorch is imported when one is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from fabric_core.errors import ConfigurationError

_PATH = click.Path()  # or the address of a store, which a Path would not keep


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that both have."""
    for option in (
        click.option(
            "--trust", is_flag=True, help="Read what can execute code, too. Only for what you trust."
        ),
        click.option("--force", is_flag=True, help="Replace what is there already."),
        click.option("-o", "--output", required=True, metavar="PATH", type=_PATH, help="Where to."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("checkpoint", type=_PATH)
@_common
@click.option("--key", metavar="KEY", help="Only what is under this key, such as model.")
def consolidate(checkpoint: str, output: str, force: bool, trust: bool, key: str | None) -> None:
    """Write a CHECKPOINT that is a folder of shards as one file.

    The file can be read by torch.load, and by fabric.load under every strategy. Where its name ends with .safetensors,
    it holds the weights that are under --key, and their names.
    """
    _refuse(output, force, "file")

    from fabric_core import converting

    converting.consolidate(checkpoint, output, key, weights_only=not trust)
    click.echo(f"{checkpoint} is now in {output}.")


@click.command()
@click.argument("file", type=_PATH)
@_common
@click.option(
    "--shards", metavar="N", type=click.IntRange(min=1), default=1, help="Into how many. [default: 1]"
)
def shard(file: str, output: str, force: bool, trust: bool, shards: int) -> None:
    """Write a checkpoint in one FILE as a folder of shards, of which each process reads what it needs."""
    _refuse(output, force, "folder")

    from fabric_core import converting

    converting.shard(file, output, shards, weights_only=not trust)
    click.echo(f"{file} is now in {output}.")


def _refuse(output: str, force: bool, wanted: str) -> None:
    from fabric_core.places import place_of

    there = place_of(output).kind()
    if there is not None and not force:
        raise ConfigurationError(f"{output!r} is there already. Give another path, or --force to replace it.")
    if there not in (None, wanted):
        raise ConfigurationError(f"{output!r} is a {there}, and the result is a {wanted}. Give another path.")

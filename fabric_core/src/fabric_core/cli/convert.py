"""``fabric consolidate`` and ``fabric shard``: a checkpoint in another form. PyTorch is imported when one is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fabric_core.errors import ConfigurationError

_PATH = click.Path(path_type=Path)


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
def consolidate(checkpoint: Path, output: Path, force: bool, trust: bool, key: str | None) -> None:
    """Write a CHECKPOINT that is a folder of shards as one file.

    The file can be read by torch.load, and by fabric.load under every strategy. Where its name ends with .safetensors,
    it holds the weights that are under --key, and their names.
    """
    _refuse(output, force, folder=False)

    from fabric_core import converting

    converting.consolidate(checkpoint, output, key, weights_only=not trust)
    click.echo(f"{checkpoint} is now in {output}.")


@click.command()
@click.argument("file", type=_PATH)
@_common
@click.option(
    "--shards", metavar="N", type=click.IntRange(min=1), default=1, help="Into how many. [default: 1]"
)
def shard(file: Path, output: Path, force: bool, trust: bool, shards: int) -> None:
    """Write a checkpoint in one FILE as a folder of shards, of which each process reads what it needs."""
    _refuse(output, force, folder=True)

    from fabric_core import converting

    converting.shard(file, output, shards, weights_only=not trust)
    click.echo(f"{file} is now in {output}.")


def _refuse(output: Path, force: bool, folder: bool) -> None:
    if output.exists() and not force:
        raise ConfigurationError(
            f"{str(output)!r} is there already. Give another path, or --force to replace it."
        )
    if output.exists() and output.is_dir() is not folder:
        there, wanted = ("a file", "a folder") if folder else ("a folder", "one file")
        raise ConfigurationError(
            f"{str(output)!r} is {there}, and the result is {wanted}. Give another path."
        )

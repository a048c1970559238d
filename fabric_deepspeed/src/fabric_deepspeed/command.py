"""``fabric deepspeed-consolidate``: a checkpoint in pieces becomes one file. Imported when the command is called."""

from __future__ import annotations

from pathlib import Path

import click

from fabric_core.errors import ConfigurationError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE when it is there already.")
@click.option("--trust", is_flag=True, help="Read what can execute code, too. Only for files that you trust.")
def deepspeed_consolidate(folder: Path, file: Path, force: bool, trust: bool) -> None:
    """Write what FOLDER holds into one FILE.

    FOLDER was written by fabric.save under DeepSpeed. FILE can be read by torch.load, and by fabric.load under every
    strategy. Neither DeepSpeed nor the ranks that wrote FOLDER are needed, but memory for all of it.
    """
    if file.exists() and not force:
        raise ConfigurationError(
            f"{str(file)!r} is there already. Give another path, or --force to replace it."
        )
    if file.is_dir():
        raise ConfigurationError(f"{str(file)!r} is a folder, and the result is one file. Give another path.")

    from fabric_core.parts.torch_file import TorchFile
    from fabric_deepspeed.consolidate import consolidate

    TorchFile().save(file, consolidate(folder, weights_only=not trust))
    click.echo(f"{folder} is now in {file}.")

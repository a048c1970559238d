"""``fabric plugins new``: the files of a plugin that works, to begin with."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from fabric_core.registry import default_registry
from fabric_core.scaffold import Made, make_plugin
from fabric_core.scaffold.kinds import WORDS
from fabric_core.scaffold.terms import DEFAULT, licences


@click.command()
@click.argument("kind")
@click.argument("name")
@click.option(
    "--dir",
    "folder",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Where to; must not exist, or be empty. [default: fabric-NAME, in the working directory]",
)
@click.option("--author", metavar="TEXT", help="Who holds the rights: 'Ada Lovelace <ada@example.org>'.")
@click.option(
    "--license", "licence", metavar="NAME", default=DEFAULT, help=f"One of {', '.join(licences())}."
)
def new(kind: str, name: str, folder: Path | None, author: str | None, licence: str) -> None:
    """Make a plugin: a complete distribution with one part, which works as it is.

    KIND is the kind of the part (see below), NAME what users will write, such as 'acme'; the distribution is called
    fabric-acme, and imported as fabric_acme.
    """
    made = make_plugin(kind, name, default_registry(), folder=folder, author=author, licence=licence)
    if name not in (made.names.name, made.names.distribution):
        click.echo(f"The name is written {made.names.name!r}, as names of distributions are compared.")
    click.echo(_told(made))


new.epilog = f"Kinds: {', '.join(WORDS)}."


def _told(made: Made) -> str:
    """What there is now, and what to do next."""
    names, place = made.names, _shown(made.folder)
    return "\n".join(
        (
            f"Made {names.distribution} in {place}: {len(made.files)} files.",
            f"The {made.kind.name} {names.name!r} is the class {names.class_name} in {made.implementation}.",
            "Next:",
            f"    pip install -e {shlex.quote(f'{place}[test]')}",
            f"    pytest {shlex.quote(place)}",
            f"    fabric plugins check {shlex.quote(place)}",
        )
    )


def _shown(folder: Path) -> str:
    """A path that pip does not take for the name of a package, as short as may be."""
    here = Path.cwd()
    return f".{os.sep}{folder.relative_to(here)}" if here in folder.parents else str(folder)

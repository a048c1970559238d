"""Help on the options of the parts that the flags name, and on no other's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

import click

from fabric_core.cli.named import DECIDED_BY, named_specs
from fabric_core.registry import default_registry
from fabric_core.settings import flag
from fabric_core.specs import PartSpec, PrecisionSpec

if TYPE_CHECKING:
    from fabric_core.resolve.declared import Option

_FLAGS = "fabric_core.cli.flags"
"""Where a context keeps the flags whose parts the help is on."""


class PartsCommand(click.Command):
    """A command that takes options of parts, and tells of them in its help."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the command's own options, then those of each part that was named."""
        super().format_options(ctx, formatter)
        for spec in _named(ctx.meta.get(_FLAGS, {})):
            scope = f" for {', '.join(_scope(spec))}" if _scope(spec) else ""
            with formatter.section(f"Options of the {spec.kind} {spec.name!r}{scope}"):
                _write_options(spec, formatter)


def show_help(ctx: click.Context, flags: Mapping[str, str]) -> NoReturn:
    """Show the help of a command, on the parts that the flags name as well, and leave the command."""
    ctx.meta[_FLAGS] = flags
    click.echo(ctx.get_help())
    ctx.exit()


def _named(flags: Mapping[str, str]) -> Iterator[PartSpec]:
    """The parts that are named; of precisions of one name, those that are made for the strategy that is named."""
    registry = default_registry()
    strategies = {name for spec in named_specs(flags, "strategy", registry) for name in spec.names}
    for kind in DECIDED_BY:
        specs = list(named_specs(flags, kind, registry))
        yield from [spec for spec in specs if strategies & set(_scope(spec))] or specs


def _scope(spec: PartSpec) -> tuple[str, ...]:
    """The strategies that a precision is made for."""
    return spec.strategies if isinstance(spec, PrecisionSpec) else ()


def _write_options(spec: PartSpec, formatter: click.HelpFormatter) -> None:
    from fabric_core.resolve.declared import declared_options

    options = declared_options(spec)
    if options:
        formatter.write_dl([(flag(spec.kind, name), _line(option, spec)) for name, option in options.items()])
    elif options is None:
        formatter.write_text("It does not say which it has. What is given reaches its constructor.")
    else:
        formatter.write_text("It has none.")


def _line(option: Option, spec: PartSpec) -> str:
    from fabric_core.resolve.declared import REQUIRED

    default, words = spec.options.get(option.name, option.default), option.form.words
    if default is REQUIRED:
        words += "; has to be given"
    elif default is None:
        words = words.removesuffix(" or none")
    else:
        words += f"; default: {default!r}"
    return f"{option.help.replace('``', '')} [{words}]".strip()

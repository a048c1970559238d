"""``fabric plugins``: what is installed, part by part."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import click

from fabric_core.cli.show import show_fields, show_json, show_table
from fabric_core.cli.states import COMMAND, blocked, broken, row, rows
from fabric_core.errors import ConfigurationError, FabricError, did_you_mean
from fabric_core.plan import plain
from fabric_core.registry import Offer, Registry, default_registry
from fabric_core.settings import kind_as_written
from fabric_core.specs import KINDS, PartSpec
from fabric_core.targets import import_target

ELSEWHERE = {
    "check": "fabric_core.cli.check:check",
    "matrix": "fabric_core.cli.matrix:matrix",
    "new": "fabric_core.cli.new:new",
}
"""Commands in modules of their own, which need more than a list does."""
REQUIRED_TOLD = "has to be given"
WIDE = 110
"""Columns of a terminal that has room for descriptions."""


class Plugins(click.Group):
    """``fabric plugins``, which imports the commands that are elsewhere when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All of them."""
        return sorted({*super().list_commands(ctx), *ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One of them."""
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        command = import_target(ELSEWHERE[cmd_name], f"the command {cmd_name!r}")
        assert isinstance(command, click.Command), "our own commands are click commands"
        return command


@click.group(cls=Plugins)
def plugins() -> None:
    """List the installed parts, tell all about one; make and check your own."""


@plugins.command("list")
@click.option("--kind", metavar="KIND", help=f"Only one kind: {', '.join((*KINDS, COMMAND))}.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_(kind: str | None, as_json: bool) -> None:
    """List every part that the installed distributions offer, and whether it can be used."""
    registry = default_registry()
    kinds = (*KINDS, COMMAND) if kind is None else (_kind(kind),)
    parts = [entry for name in kinds for entry in rows(name, registry)]
    missing = {"broken": broken(registry), "blocked": blocked(registry)}
    if as_json:
        show_json({"parts": parts, **missing})
        return
    for name in kinds:
        columns = (name, "from", "version", "state", "description")[: _room()]
        show_table(columns, [_line(entry)[: _room()] for entry in parts if entry["kind"] == name])
    others = [tuple(entry.values()) for entry in (*missing["broken"], *missing["blocked"])]
    show_table(("distribution", "version", "state", "why"), others)


@plugins.command("info")
@click.argument("name")
@click.option("--kind", metavar="KIND", help="When parts of several kinds have the name.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(name: str, kind: str | None, as_json: bool) -> None:
    """Tell all that is known about the parts of a name (also NAME@DISTRIBUTION)."""
    registry = default_registry()
    offers = registry.named(KINDS if kind is None else (_kind(kind),), name)
    details = [_details(offer, registry) for offer in offers]
    if as_json:
        show_json(details)
        return
    for detail in details:
        title = f"{detail.pop('kind')} {detail.pop('name')}"
        takes = detail.pop("takes")
        show_fields(
            title, [(key, _text(value)) for key, value in detail.items() if value not in (None, "", [], {})]
        )
        show_table(("option", "what it is"), [(each["name"], _told(each)) for each in takes or ()])


def _kind(text: str) -> str:
    kind = kind_as_written(text)
    if kind not in (*KINDS, COMMAND):
        raise ConfigurationError(
            f"There is no kind {text!r}.{did_you_mean(kind, KINDS)} Kinds: {', '.join((*KINDS, COMMAND))}."
        )
    return kind


def _room() -> int:
    """How many columns of the list fit into the terminal. What is left out, ``info`` tells."""
    return 5 if shutil.get_terminal_size().columns >= WIDE else 4


def _line(entry: dict[str, Any]) -> tuple[str, ...]:
    aliases = f" (also {', '.join(entry['aliases'])})" if entry["aliases"] else ""
    return (
        entry["name"],
        entry["distribution"],
        entry["version"],
        entry["state"],
        f"{entry['description']}{aliases}",
    )


def _details(offer: Offer, registry: Registry) -> dict[str, Any]:
    """The row of the list, every field of the spec that the kind adds, and the options that users may give."""
    spec = offer.spec
    more = {field.name: plain(getattr(spec, field.name)) for field in fields(spec)}
    found = row(offer, registry) | more | {"target": spec.target_name, "takes": None}
    try:
        return found | {"takes": list(_takes(spec)) if spec.options_type is not None else None}
    except FabricError as error:
        return found | {"state": f"broken: {error}"}


def _takes(spec: PartSpec) -> Iterator[dict[str, Any]]:
    """The options that a part declares. Where they are declared is imported for it, and nothing else."""
    from fabric_core.resolve.declared import REQUIRED, declared_options

    for option in (declared_options(spec) or {}).values():
        default = spec.options.get(option.name, option.default)
        yield {
            "name": option.name,
            "may_be": option.form.words,
            "default": REQUIRED_TOLD if default is REQUIRED else repr(plain(default)),
            "help": option.help,
        }


def _told(option: dict[str, Any]) -> str:
    usual = option["default"] if option["default"] == REQUIRED_TOLD else f"default: {option['default']}"
    return f"{option['help']} [{option['may_be']}; {usual}]".strip()


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={entry!r}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

"""``fabric plugins``: what is installed, part by part."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click

from fabric_core.cli.show import show_json, show_table, show_text
from fabric_core.contract_versions import is_spoken, spoken
from fabric_core.errors import ConfigurationError, did_you_mean, listing
from fabric_core.plan import plain
from fabric_core.registry import Offer, Registry, default_registry
from fabric_core.requirements import missing_requirements
from fabric_core.specs import KINDS

COMMAND = "command"


@click.group()
def plugins() -> None:
    """List the installed parts, or tell all about one."""


@plugins.command("list")
@click.option("--kind", metavar="KIND", help=f"Only one kind: {', '.join((*KINDS, COMMAND))}.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_(kind: str | None, as_json: bool) -> None:
    """List every part that the installed distributions offer, and whether it can be used."""
    registry = default_registry()
    kinds = (*KINDS, COMMAND) if kind is None else (_kind(kind),)
    parts = [row for name in kinds for row in _rows(name, registry)]
    broken = [{"distribution": p.distribution, "message": p.message} for p in registry.problems if p.fatal]
    blocked = [{"distribution": f.distribution, "version": f.version} for f in registry.blocked]
    if as_json:
        show_json({"parts": parts, "broken": broken, "blocked": blocked})
        return
    for name in kinds:
        show_table(
            (name, "from", "state", "description"), [_line(row) for row in parts if row["kind"] == name]
        )
    show_table(("broken", "why"), [(entry["distribution"], entry["message"]) for entry in broken])
    show_table(("blocked", "why"), [(entry["distribution"], "by FABRIC_PLUGINS_*") for entry in blocked])


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
        click.echo(f"{detail['kind']} {detail['name']}")
        for key, value in detail.items():
            if value not in (None, "", [], {}):
                show_text(f"{key}: {_text(value)}", indent=2)


def state_of(offer: Offer, registry: Registry) -> str:
    """Whether a part can be used: ``ok``, or what is in the way."""
    spec = offer.spec
    missing = missing_requirements(spec)
    if not is_spoken(spec):
        return f"wrong contract version: {spec.api}, and this core speaks {spoken(spec.kind)}"
    if missing:
        return f"needs {listing(missing)}"
    rivals = {other.distribution for other in registry.offers(spec.kind) if _clash(offer, other)}
    return f"clash: {listing(rivals)} offers it too" if rivals else "ok"


def _clash(one: Offer, other: Offer) -> bool:
    """Whether two offers share a name, and the scope that could tell them apart."""
    scopes = [[getattr(o.spec, name, None) for name in ("strategies", "accelerators")] for o in (one, other)]
    same_scope = one.spec.kind != "precision" or scopes[0] == scopes[1]
    return one is not other and bool(set(one.spec.names) & set(other.spec.names)) and same_scope


def _kind(text: str) -> str:
    kind = text.strip().lower().replace("-", " ").replace("_", " ")
    if kind not in (*KINDS, COMMAND):
        raise ConfigurationError(
            f"There is no kind {text!r}.{did_you_mean(kind, KINDS)} Kinds: {', '.join((*KINDS, COMMAND))}."
        )
    return kind


def _rows(kind: str, registry: Registry) -> list[dict[str, Any]]:
    if kind == COMMAND:
        return [
            {"kind": kind, "name": spec.name, "aliases": [], "distribution": distribution, "version": ""}
            | {"state": "ok", "description": spec.help}
            for spec, distribution in registry.commands
        ]
    return [
        _row(offer, registry) for offer in sorted(registry.offers(kind), key=lambda offer: offer.spec.name)
    ]


def _row(offer: Offer, registry: Registry) -> dict[str, Any]:
    return {
        "kind": offer.spec.kind,
        "name": offer.spec.name,
        "aliases": list(offer.spec.aliases),
        "distribution": offer.distribution,
        "version": offer.version,
        "state": state_of(offer, registry),
        "description": offer.spec.description,
    }


def _line(row: dict[str, Any]) -> tuple[str, str, str, str]:
    aliases = f" (also {', '.join(row['aliases'])})" if row["aliases"] else ""
    return row["name"], row["distribution"], row["state"], f"{row['description']}{aliases}"


def _details(offer: Offer, registry: Registry) -> dict[str, Any]:
    """The row of the list, and every field of the spec that the kind adds."""
    spec = offer.spec
    more = {field.name: plain(getattr(spec, field.name)) for field in fields(spec)}
    return _row(offer, registry) | more | {"target": spec.target_name}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={entry!r}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

"""``fabric explain``: the plan that the flags lead to, with the reason of every choice."""

from __future__ import annotations

import os
from typing import Any

import click

from fabric_core.cli.flags import given, import_from, options
from fabric_core.cli.show import show_json, show_text
from fabric_core.plan import Choice, Plan, Request
from fabric_core.registry import default_registry


@click.command(
    params=options(),
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def explain(as_json: bool, **flags: Any) -> None:
    """Show what the flags would choose on this machine, why, and what lost. Nothing is started."""
    from fabric_core.resolve import resolve

    flags = given(flags)
    import_from(os.getcwd(), flags)
    plan = resolve(Request(**flags, environ=os.environ), default_registry())
    if as_json:
        show_json(plan.to_dict())
    else:
        _show(plan)


def _show(plan: Plan) -> None:
    for part in plan:
        _show_choice(part)
    click.echo(f"devices: {', '.join(map(str, plan.devices))}")
    show_text(plan.device_reason, indent=2)
    per_node, nodes = plan.processes_per_node, plan.num_nodes
    click.echo(f"processes: {per_node} per node * {nodes} node(s) = {plan.world_size}")
    for warning in plan.warnings:
        show_text(f"warning: {warning}")


def _show_choice(part: Choice) -> None:
    click.echo(f"{part.kind}: {part.identity}")
    show_text(part.reason, indent=2)
    losers: dict[str, list[str]] = {}
    for name, reason in part.lost:
        losers.setdefault(reason, []).append(name)
    for reason, names in losers.items():
        show_text(f"not {', '.join(names)}: {reason}", indent=2)

"""``fabric explain``: the plan that the flags lead to, with the reason of every choice."""

from __future__ import annotations

import os
from typing import Any

import click

from fabric_core.cli.flags import FLAGS, given, import_from, options
from fabric_core.cli.ours import Ours
from fabric_core.cli.parts_help import PartsCommand, show_help
from fabric_core.cli.show import show_json, show_text
from fabric_core.plan import Choice, Plan, Request
from fabric_core.registry import default_registry
from fabric_core.settings import find_tables


class ExplainCommand(PartsCommand):
    """A command that takes options of parts beside its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the options of parts out of what click reads, and let the help tell of the parts that are named."""
        if set(ctx.help_option_names) & set(args):
            named = Ours(FLAGS, ctx)
            named.take_all(args)
            show_help(ctx, named.flags)
        of_parts = Ours((), ctx)
        rest = of_parts.take_all(args)
        ctx.params["parts"] = of_parts.options
        return super().parse_args(ctx, rest)


@click.command(
    cls=ExplainCommand,
    params=options(),
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def explain(as_json: bool, parts: dict[str, dict[str, str]], **flags: Any) -> None:
    """Show what the flags would choose on this machine, why, and what lost. Nothing is started.

    Options of parts (--KIND.OPTION=VALUE) and those of fabric.toml are shown with who states them. With --strategy=NAME
    this help lists the options of that strategy, and likewise for the other flags.
    """
    from fabric_core.resolve import resolve

    flags = given(flags)
    import_from(os.getcwd(), flags)
    request = Request(**flags, texts=parts, tables=find_tables(), environ=os.environ)
    plan = resolve(request, default_registry())
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
    for name, value in part.options.items():
        show_text(f"{name} = {value!r}, by {part.origins[name]}", indent=2)
    losers: dict[str, list[str]] = {}
    for name, reason in part.lost:
        losers.setdefault(reason, []).append(name)
    for reason, names in losers.items():
        show_text(f"not {', '.join(names)}: {reason}", indent=2)

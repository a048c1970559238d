"""``fabric explain``: the plan that the flags lead to, with the reason of every choice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from fabric_core.cli.flags import FLAGS, given, import_from, options
from fabric_core.cli.ours import Ours
from fabric_core.cli.parts_help import PartsCommand, show_help
from fabric_core.cli.show import show_json, show_table, show_text
from fabric_core.plan import Choice, Plan, Request
from fabric_core.registry import default_registry
from fabric_core.settings import find_tables

if TYPE_CHECKING:
    from fabric_core.starting import Way


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
    from fabric_core.starting import way_to_start

    flags = given(flags)
    import_from(os.getcwd(), flags)
    request = Request(**flags, texts=parts, tables=find_tables(), environ=os.environ)
    plan = resolve(request, default_registry())
    way = way_to_start(plan, os.environ)
    if as_json:
        show_json({**plan.to_dict(), "start": {"name": way.name, "reason": way.reason}})
    else:
        _show(plan, way)


def _show(plan: Plan, way: Way) -> None:
    start = "start", way.name, way.reason
    show_table(("part", "chosen", "why, and what else there was"), [*_lines(plan), start])
    for warning in plan.warnings:
        show_text(f"warning: {warning}")


def _lines(plan: Plan) -> Iterator[tuple[str, str, str]]:
    for part in plan:
        yield from _lines_of(part)
    per_node, nodes = plan.processes_per_node, plan.num_nodes
    yield "devices", ", ".join(map(str, plan.devices)), plan.device_reason
    yield "processes", str(plan.world_size), f"{per_node} per node * {nodes} node(s)"


def _lines_of(part: Choice) -> Iterator[tuple[str, str, str]]:
    """The choice and its reason; where it is from; its options; and what lost, the same reasons together."""
    yield part.kind, part.name, part.reason
    yield "", "", f"from {part.distribution} {part.version}".rstrip() if part.version else part.distribution
    for name, value in part.options.items():
        yield "", "", f"{name} = {value!r}, by {part.origins[name]}"
    losers: dict[str, list[str]] = {}
    for name, reason in part.lost:
        losers.setdefault(reason, []).append(name)
    for reason, names in losers.items():
        yield "", "", f"not {', '.join(names)}: {reason}"

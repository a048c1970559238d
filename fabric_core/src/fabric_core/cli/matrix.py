"""``fabric plugins matrix``: which strategy works with which accelerator, and who says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from fabric_core.cli.show import show_json, show_table
from fabric_core.registry import default_registry

if TYPE_CHECKING:
    from fabric_core.resolve.pairs import Pair


STANDINGS = ("supported", "rejected", "unknown")


@click.command("matrix")
@click.option("--precision", metavar="NAME", help="With this precision in place of 32-true.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def matrix(precision: str | None, as_json: bool) -> None:
    """Show which strategy works with which accelerator, and who says so.

    Each pair is supported, rejected, or unknown: nobody says anything, and it is tried with a warning. Plugins are
    asked whether they veto; hardware is not looked at. --json adds why, and so does 'fabric explain' for one pair.
    """
    from fabric_core.resolve.pairs import pairs

    registry = default_registry()
    if precision is not None:
        registry.named(
            "precision", precision
        )  # so that a name that nobody has is an error, and no column of refusals
    found = list(pairs(registry, precision))
    if as_json:
        show_json([_data(pair) for pair in found])
        return
    show_table(("strategy", "is", "says", "with"), _lines(found))


def _data(pair: Pair) -> dict[str, Any]:
    return {
        "strategy": pair.strategy.full_name,
        "accelerator": pair.accelerator.full_name,
        "standing": pair.standing,
        "by": list(pair.by),
        "why": pair.why,
    }


def _lines(found: Iterable[Pair]) -> Iterator[tuple[str, ...]]:
    """One line for all accelerators of which the same is said by the same; the strategy's name on its first line."""
    for strategy, its_pairs in groupby(found, lambda pair: pair.strategy):
        said: dict[tuple[str, str], list[str]] = {}
        for pair in its_pairs:
            said.setdefault((pair.standing, ", ".join(pair.by) or "nobody"), []).append(
                pair.accelerator.spec.name
            )
        name = strategy.spec.name
        for (standing, by), names in sorted(said.items(), key=lambda line: STANDINGS.index(line[0][0])):
            yield name, standing, by, ", ".join(names)
            name = ""

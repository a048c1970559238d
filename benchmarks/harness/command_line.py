"""What every script of a figure understands."""

from __future__ import annotations

import argparse

from harness.figure import Choice, Figure
from harness.operations import Operations
from harness.tables import table


def main(figure: Figure) -> None:
    """Run one figure, and print its table; or be one of its contenders."""
    parser = argparse.ArgumentParser(
        description=figure.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choice(parser)
    parser.add_argument("--serve", metavar="CONTENDER", help=argparse.SUPPRESS)
    told = parser.parse_args()
    choice = choice_of(told)
    if told.serve and isinstance(figure, Operations):
        figure.serve(told.serve, list(choice.cases))
    else:
        print(table(figure, figure.run(choice)))


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The options that say which part of the figures is run."""
    parser.add_argument(
        "--quick", action="store_true", help="two short rounds: shows that it runs, measures nothing"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="CONTENDER", help="such as: plain fabric")
    parser.add_argument("--cases", nargs="+", default=[], metavar="CASE")
    parser.add_argument("--rounds", type=int, help="how many rounds")


def choice_of(told: argparse.Namespace) -> Choice:
    """What was chosen."""
    return Choice(quick=told.quick, only=tuple(told.only), cases=tuple(told.cases), rounds=told.rounds)

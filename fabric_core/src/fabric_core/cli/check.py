"""``fabric plugins check``: for authors, everything that is wrong with a plugin, at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fabric_core.cli.show import show_json, show_text

if TYPE_CHECKING:
    from fabric_core.authoring import Finding

TITLES = {"error": "Errors: users will run into these.", "advice": "Advice: it works, and could be better."}


@click.command("check")
@click.argument("path", required=False, metavar="[PATH]")
@click.option(
    "--installed", metavar="DISTRIBUTION", help="Check an installed distribution in place of a folder."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def check(path: str | None, installed: str | None, as_json: bool) -> None:
    """Tell the author of a plugin everything that is wrong with it, with file and line.

    PATH is the folder of its pyproject.toml (default: the current one). The project need not be installed; what it
    depends on should be. The exit code is 1 when there is an error.
    """
    from fabric_core.authoring import check_installed, check_project

    if path is not None and installed is not None:
        raise click.UsageError("Give a PATH or --installed DISTRIBUTION, not both.")
    findings = check_project(path or ".") if installed is None else check_installed(installed)
    errors = sum(finding.is_error for finding in findings)
    if as_json:
        show_json({"errors": errors, "findings": [finding.to_dict() for finding in findings]})
    else:
        _show(findings, errors)
    sys.exit(errors > 0)


def _show(findings: Sequence[Finding], errors: int) -> None:
    for severity, title in TITLES.items():
        told = [finding for finding in findings if finding.severity == severity]
        if told:
            click.echo(title)
        for finding in told:
            line = f":{finding.line}" if finding.line else ""
            show_text(f"{_shown(finding.path)}{line}: {finding.message}", indent=2)
        if told:
            click.echo()
    advice = len(findings) - errors
    click.echo(
        f"{errors} error(s), {advice} piece(s) of advice." if findings else "Nothing is wrong with it."
    )


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative

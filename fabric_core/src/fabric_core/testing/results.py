"""What the checks found: for people a table, for programs a file."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fabric_core import __version__
from fabric_core.contract_versions import CURRENT
from fabric_core.registry.discovery import installed_version

OUTCOMES = ("passed", "failed", "expected failure", "skipped")


def collect(stats: Mapping[str, Iterable[Any]], key: str) -> list[dict[str, Any]]:
    """One entry per check, in the order in which they ran.

    Args:
        stats: The reports of pytest's terminal reporter, by outcome.
        key: Under which a report carries what its test was about.
    """
    found: dict[str, dict[str, Any]] = {}
    for outcome, reports in stats.items():
        for report in reports if outcome != "deselected" else ():  # those are no reports
            about = dict(getattr(report, "user_properties", ())).get(key)
            if about is None or (report.when != "call" and outcome not in ("error", "skipped")):
                continue
            found[report.nodeid] = {
                **about,
                "outcome": _outcome(outcome),
                "seconds": round(report.duration, 3),
            }
            found[report.nodeid] |= _reason(report)
    return list(found.values())


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """One line per class: what it is about, and how many checks ended how."""
    rows: list[tuple[str, ...]] = [("part", "from", *OUTCOMES)]
    classes = dict.fromkeys((entry["class"], *_who(entry)) for entry in found)
    for cls in classes:
        ended = Counter(entry["outcome"] for entry in found if (entry["class"], *_who(entry)) == cls)
        rows.append((cls[1], cls[2], *(str(ended[outcome] or "-") for outcome in OUTCOMES)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    for entry in found:
        if entry["outcome"] == "expected failure":
            yield f"expected: {_who(entry)[0]}: {entry['test']}: {entry.get('reason', '')}"


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """Write the file. Its form: ``docs/plugins/conformance.md``."""
    plugins = {entry["distribution"]: entry["version"] for entry in found}
    report = {
        "format": 1,
        "core": __version__,
        "contracts": dict(CURRENT),
        "plugins": plugins,
        "python": platform.python_version(),
        "torch": installed_version("torch"),
        "platform": platform.platform(),
        "results": found,
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _who(entry: Mapping[str, Any]) -> tuple[str, str]:
    name = " ".join(filter(None, (entry["kind"], entry["name"])))
    return name, f"{entry['distribution']} {entry['version']}"


def _outcome(outcome: str) -> str:
    return {"error": "failed", "xfailed": "expected failure", "xpassed": "failed"}.get(outcome, outcome)


def _reason(report: Any) -> dict[str, str]:
    if getattr(report, "wasxfail", ""):
        return {"reason": report.wasxfail.removeprefix("reason: ")}
    if report.skipped and isinstance(report.longrepr, tuple):
        return {"reason": report.longrepr[2].removeprefix("Skipped: ")}
    if report.failed:
        return {
            "reason": str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr))[
                :2000
            ]
        }
    return {}

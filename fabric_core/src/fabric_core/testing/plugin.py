"""The kit's part in pytest: expected failures are strict, and what was found is shown and written down.

It is loaded by its entry point wherever ``fabric-core`` is installed, and does nothing where no conformance class is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fabric_core.testing.conformance import Conformance

KEY = "fabric-conformance"
"""Under which a report carries the part that its test was about."""

FILE = "fabric-conformance.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the results go."""
    parser.getgroup("fabric").addoption(
        f"--{KEY}",
        metavar="FILE",
        default=FILE,
        help=f"Where the conformance results are written ({FILE}); empty for nowhere.",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is known to deviate, and note on every check what it is about."""
    for item in items:
        cls = _conformance_class(item)
        if cls is None:
            continue
        name = getattr(item, "originalname", item.name)
        reason = cls.expected_failures.get(item.name, cls.expected_failures.get(name))
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        item.user_properties.append((KEY, {"class": cls.__qualname__, "test": item.name} | cls.about()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show the table and write the file, when there was a conformance class."""
    from fabric_core.testing import results

    found = results.collect(terminalreporter.stats, KEY)
    if not found:
        return
    terminalreporter.section("conformance")
    for line in results.table(found):
        terminalreporter.write_line(line)
    file = config.getoption(f"--{KEY}")
    if file:
        path = Path(config.invocation_params.dir, file)
        results.write(path, found)
        terminalreporter.write_line(f"Written to {path}")


def _conformance_class(item: pytest.Item) -> type[Conformance] | None:
    import sys

    module = sys.modules.get(
        "fabric_core.testing.conformance"
    )  # whoever has a conformance class has imported it
    cls = getattr(item, "cls", None)
    return (
        cls if module is not None and isinstance(cls, type) and issubclass(cls, module.Conformance) else None
    )

"""The pages for authors are true: what they show is run from top to bottom, and compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml
from reader import PAGES, Untrue, blocks, conversation, follow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PARSERS: Mapping[str, Callable[[str], object]] = {
    "python": lambda code: compile(code, "block", "exec"),
    "pyi": lambda code: compile(code, "block", "exec"),
    "toml": tomllib.loads,
    "json": json.loads,
    "yaml": yaml.safe_load,
}
"""The languages of blocks, beside ``console``: everything that is shown can be looked at by a machine."""


def pages() -> list[str]:
    """The pages that show something."""
    return [page.name for page in sorted(PAGES.glob("*.md")) if blocks(page)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", pages())
def test_what_a_page_shows_works(page: str, tmp_path: Path) -> None:
    follow(PAGES / page, tmp_path)


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        ("```python\n# odd.py\nassert 1 > 2\n```\n", "AssertionError"),
        ("```console\n$ echo one\ntwo\n```\n", "printed:\none"),
        ("```console\n$ fabric --version  # exit code 3\n```\n", "ended with 99"),
        ("```console\n$ cd nowhere\n```\n", "nowhere"),
    ],
)
def test_a_page_that_shows_what_is_not_so_is_found(shown: str, told: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"One line.\n\n{shown}", encoding="utf-8")
    with pytest.raises(Untrue, match="page.md, line 3") as failure:
        follow(page, tmp_path)
    assert told in str(failure.value)


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_can_be_looked_at_by_a_machine(page: str) -> None:
    for block in blocks(PAGES / page):
        where = f"docs/plugins/{page}, line {block.line}"
        assert block.language in (*PARSERS, "console"), f"{where}: nothing here reads {block.language!r}"
        assert block.language != "python" or block.file, f"{where}: Python that is never run; name its file"
        if block.language == "console":
            assert conversation(block.code)[0], f"{where}: no command; begin its line with '$ '"
        else:
            PARSERS[block.language](block.code)

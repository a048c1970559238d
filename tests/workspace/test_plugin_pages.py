"""What the pages for authors take from the code is there, whole, and not stale."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from reader import BLOCK, PAGES

from fabric_core.specs import KINDS

GENERATE = PAGES.parent / "tools" / "generate.py"


def chapters(page: str, level: str) -> dict[str, str]:
    """The text below each heading of a level."""
    parts = re.split(rf"^{level} (.+)\n", (PAGES / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_page_on_which_each_method_says_when_it_is_called(kind: str) -> None:
    page = f"{kind.replace(' ', '-')}.md"
    assert f"({page})" in (PAGES / "index.md").read_text(encoding="utf-8")
    assert {"What the spec says", "What the class says and does"} <= set(chapters(page, "##"))
    methods = {
        name: text
        for name, text in chapters(page, "###").items()
        if "\ndef " in text and "@property" not in text
    }
    assert "`teardown`" in methods
    assert [name for name, text in methods.items() if "\n- Called " not in text] == []


def test_every_public_name_says_what_it_is() -> None:
    modules = chapters("api.md", "##")
    assert {"`fabric_core`", "`fabric_core.testing`", "`fabric_core.supervisor`"} <= set(modules)
    rows = [line for text in modules.values() for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if not re.fullmatch(r"\| `\w+` \| \S.* \|", row)] == []


def test_links_into_a_page_lead_to_a_heading() -> None:
    found = [
        (page, match[1] or page.name, match[2])
        for page in PAGES.glob("*.md")
        for match in re.finditer(r"\]\(([\w.-]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(found) > 50
    broken = [
        f"{page.name} -> {name}#{anchor}" for page, name, anchor in found if anchor not in anchors(name)
    ]
    assert broken == []


@functools.cache
def anchors(page: str) -> set[str]:
    """The headings of a page, as links name them."""
    text = BLOCK.sub("", (PAGES / page).read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def generate(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Call the generator on a folder of pages."""
    return subprocess.run(
        [sys.executable, "-W", "error", GENERATE, *options, folder],
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_generated_parts_of_the_pages_are_what_the_code_says() -> None:
    done = generate(PAGES, *(() if os.environ.get("FABRIC_WRITE_DOCS") else ("--check",)))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_that_no_longer_says_what_the_code_says_is_found(tmp_path: Path) -> None:
    page = tmp_path / "strategy.md"
    shutil.copy(PAGES / page.name, page)
    assert generate(tmp_path).returncode == 0
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("### `setup_module`", "### `set_up_module`"), encoding="utf-8")
    done = generate(tmp_path, "--check")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"{page}: stale; write it anew with: make docs-write"]
    assert "set_up_module" in page.read_text(encoding="utf-8"), "with --check nothing is written"
    assert generate(tmp_path).returncode == 0
    assert page.read_text(encoding="utf-8") == text

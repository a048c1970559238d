"""Reading Google-style docstrings, and turning them into Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

SECTION = re.compile(r"(Args|Returns|Yields|Raises|Attributes|Example):")
ENTRY = re.compile(r"([\w*, ]+): ?(.*)")
SENTENCE = re.compile(r"(?<=[.]) (?=[A-Z`])")


@dataclass(frozen=True)
class Docstring:
    """A docstring in its parts.

    Attributes:
        paragraphs: What stands before the first section.
        sections: The lines below each section's name, without their indentation.
    """

    paragraphs: tuple[str, ...]
    sections: dict[str, list[str]] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first paragraph."""
        return self.paragraphs[0] if self.paragraphs else ""

    def prose(self, section: str) -> str:
        """A section that is one text."""
        return markdown(" ".join(line.strip() for line in self.sections.get(section, ())))

    def entries(self, section: str) -> list[tuple[str, str]]:
        """A section that explains names: each with its text. Two names may share one, with a comma between them."""
        found: list[list[str]] = []
        for line in self.sections.get(section, ()):
            entry = None if line.startswith(" ") else ENTRY.fullmatch(line)
            if entry:
                found.append([entry[1], entry[2]])
            else:
                found[-1][1] += f" {line.strip()}"
        return [(name.strip(), markdown(text)) for names, text in found for name in names.split(",")]


def parse(text: str | None) -> Docstring:
    """Take a docstring apart.

    Args:
        text: As it stands in the source; ``None`` when there is none.
    """
    head: list[str] = []
    sections: dict[str, list[str]] = {}
    into = head
    for line in inspect.cleandoc(text or "").splitlines():
        if SECTION.fullmatch(line):
            into = sections.setdefault(line.rstrip(":"), [])
        elif into is head or line.strip():
            into.append(line if into is head else line[4:])
    paragraphs = re.split(r"\n\s*\n", "\n".join(head).strip())
    return Docstring(tuple(markdown(" ".join(p.split())) for p in paragraphs if p), sections)


def markdown(text: str) -> str:
    """The text of a docstring as Markdown: code between single backticks."""
    return text.replace("``", "`")


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph."""
    return SENTENCE.split(paragraph)


def cell(text: str) -> str:
    """A text as the cell of a table."""
    return text.replace("|", "\\|")


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; nothing when it has no rows."""
    if not rows:
        return ""
    lines = [head, tuple("---" for _ in head), *(tuple(map(cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

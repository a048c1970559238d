"""The licences under which a new distribution can be made, and who holds the rights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from email.utils import parseaddr
from pathlib import Path

from fabric_core.errors import ConfigurationError, did_you_mean

_FOLDER = Path(__file__).parent / "templates" / "terms"

DEFAULT = "Apache-2.0"


@dataclass(frozen=True)
class Author:
    """Who holds the rights.

    Attributes:
        name: A person or an organisation.
        email: An address; may be empty.
    """

    name: str
    email: str = ""

    @property
    def entry(self) -> str:
        """As a table of ``pyproject.toml``. What JSON writes for a text without odd characters, TOML reads."""
        email = f", email = {json.dumps(self.email)}" if self.email else ""
        return f"{{ name = {json.dumps(self.name, ensure_ascii=False)}{email} }}"


def author_from(text: str) -> Author:
    """Somebody from ``"Ada Lovelace"`` or ``"Ada Lovelace <ada@example.org>"``.

    Raises:
        ConfigurationError: There is no name in it, or something that no name has.
    """
    name, email = parseaddr(text) if "<" in text else (text.strip(), "")
    if not (name and name.isprintable() and email.isascii()) or ("<" in text and "@" not in email):
        raise ConfigurationError(
            f"There cannot be an author {text!r}. Write a name, and perhaps an address: "
            "'Ada Lovelace <ada@example.org>'."
        )
    return Author(name, email)


def licences() -> list[str]:
    """The licences that there are, by their SPDX names; the default first."""
    return sorted((path.stem for path in _FOLDER.iterdir()), key=lambda name: (name != DEFAULT, name))


def licence_named(text: str) -> tuple[str, str]:
    """The SPDX name and the template of a licence, however its name is written.

    Raises:
        ConfigurationError: There is none of that name here.
    """
    known = {name.lower(): name for name in licences()}
    if text.lower() not in known:
        raise ConfigurationError(
            f"There is no text of a licence {text!r} here.{did_you_mean(text, known)} There are: "
            f"{', '.join(known.values())}. For another one, make the plugin first; then replace LICENSE, and "
            "'license' in pyproject.toml."
        )
    name = known[text.lower()]
    return name, (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")

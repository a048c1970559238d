"""Forms that are made of others: lists, tables, and one of several."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fabric_core.resolve.forms import PATH, Anything, Form, Thing, Unfit, demand, from_json


@dataclass(frozen=True)
class Several(Form):
    """A list, tuple or set, of any number of values of one form, or of one value per form."""

    containers: tuple[type, ...]
    forms: tuple[Form, ...]
    endless: bool
    eager = 7

    @property
    def words(self) -> str:  # type: ignore[override]
        """How many, and of what."""
        if self.endless:
            return f"a list (each {self.forms[0].words})"
        return f"a list ({', then '.join(form.words for form in self.forms)})"

    def take(self, value: Any) -> Any:
        """The same values, in a container that the field names."""
        return self._each("take", value)

    def load(self, value: Any) -> Any:
        """The same, each value as a file holds it."""
        return self.read(value) if isinstance(value, str) else self._each("load", value)

    def read(self, text: str) -> Any:
        """``1,2`` or ``[1, 2]``."""
        if text.lstrip().startswith("["):
            return self._each("load", from_json(text))
        return self._each("read", [word.strip() for word in text.split(",") if word.strip()])

    def _each(self, door: str, values: Any) -> Any:
        demand(values, isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping))
        entries = list(values)
        forms = self.forms * len(entries) if self.endless else self.forms
        demand(values, len(forms) == len(entries))
        container = type(values) if type(values) in self.containers else self.containers[0]
        return container([getattr(form, door)(entry) for form, entry in zip(forms, entries, strict=True)])


@dataclass(frozen=True)
class Table(Form):
    """A dictionary."""

    keys: Form
    values: Form
    words = "a table (as JSON on the command line)"

    def take(self, value: Any) -> Any:
        """The same, entry by entry."""
        demand(value, isinstance(value, Mapping))
        return {self.keys.take(key): self.values.take(entry) for key, entry in value.items()}

    def load(self, value: Any) -> Any:
        """The same, keys and values as a file holds them."""
        if isinstance(value, str):
            return self.read(value)
        demand(value, isinstance(value, Mapping))
        return {self.keys.load(key): self.values.load(entry) for key, entry in value.items()}

    def read(self, text: str) -> Any:
        """As JSON."""
        return self.load(demand(from_json(text), text.lstrip().startswith("{")))


@dataclass(frozen=True)
class Either(Form):
    """One of several forms (``Union``, ``Optional``)."""

    forms: tuple[Form, ...]

    @property
    def words(self) -> str:  # type: ignore[override]
        """Each, in the order in which they are written."""
        return " or ".join(form.words for form in self.forms)

    @property
    def known(self) -> tuple[str, ...]:
        """Those of each."""
        return tuple(text for form in self.forms for text in form.known)

    def take(self, value: Any) -> Any:
        """By the first that can."""
        return self._first(self.forms, "take", value)

    def load(self, value: Any) -> Any:
        """A path is the object that it leads to, where one is wanted; else by the first that takes or reads it."""
        is_path = isinstance(value, str) and PATH.fullmatch(value)
        things = tuple(form for form in self.forms if isinstance(form, Thing | Anything) and is_path)
        for forms, door in ((things, "load"), (self.forms, "take")):
            try:
                return self._first(forms, door, value)
            except Unfit:
                continue
        return self._first(self.forms, "load", value)

    def read(self, text: str) -> Any:
        """By the most eager that can."""
        return self._first(sorted(self.forms, key=lambda form: form.eager), "read", text)

    def _first(self, forms: Collection[Form], door: str, value: Any) -> Any:
        for form in forms:
            try:
                return getattr(form, door)(value)
            except Unfit:
                continue
        raise Unfit

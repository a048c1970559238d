"""What a field's annotation asks of a value: how it is read from text, and what fits.

A form has three doors. ``take``: a value from code, which has to fit. ``load``: one from a file, whose texts may stand
for what a file cannot hold. ``read``: a text from the command line. Each raises `Unfit`.
"""

from __future__ import annotations

import json
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
PATH = re.compile(f"{NAME}:{NAME}")


class Unfit(ValueError):
    """A value that a form has no use for."""


class Late(str):
    """The path of an object (``"package.module:name"``), given as a text; imported when the part is made."""

    __slots__ = ()


class Form(ABC):
    """What a value has to be.

    Attributes:
        words: The same for people: what follows "it has to be".
        eager: In a union, texts are read by the most eager form first.
    """

    words: str
    eager: int = 5

    @abstractmethod
    def take(self, value: Any) -> Any:
        """A value from code, as the part is given it."""

    @abstractmethod
    def read(self, text: str) -> Any:
        """The value that a text stands for."""

    def load(self, value: Any) -> Any:
        """A value from a file: as it is where that fits, else what its text stands for."""
        try:
            return self.take(value)
        except Unfit:
            return self.read(_demand(value, isinstance(value, str)))


@dataclass(frozen=True)
class Scalar(Form):
    """A value of one type, with the way to read it."""

    words: str
    fits: Callable[[Any], bool]
    convert: Callable[[str], Any]
    eager: int

    def take(self, value: Any) -> Any:
        """The value, untouched."""
        return _demand(value, self.fits(value))

    def read(self, text: str) -> Any:
        """By the type's own way."""
        try:
            return self.convert(text)
        except ValueError as error:
            raise Unfit from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def _switch(text: str) -> bool:
    if text.strip().lower() in (*_TRUE, *_FALSE):
        return text.strip().lower() in _TRUE
    raise Unfit


def _nothing(text: str) -> None:
    _demand(text, text.strip().lower() in ("none", "null"))


SCALARS: Mapping[Any, Scalar] = {
    type(None): Scalar("none", lambda value: value is None, _nothing, 0),
    int: Scalar("a whole number", _is_whole, int, 1),
    float: Scalar("a number", _is_number, float, 2),
    bool: Scalar("true or false", lambda value: isinstance(value, bool), _switch, 3),
    str: Scalar("a text", lambda value: isinstance(value, str), str, 9),
    Path: Scalar("a path", lambda value: isinstance(value, Path), Path, 10),
}
CONTAINERS: Mapping[Any, tuple[type, ...]] = {
    list: (list,),
    tuple: (tuple,),
    set: (set,),
    frozenset: (frozenset,),
    Sequence: (list, tuple),
    Collection: (list, tuple, set, frozenset),
    Iterable: (list, tuple, set, frozenset),
    Set: (set, frozenset),
}
"""What several values may lie in, by annotation; whatever else they come in, they are put into the first."""

FUNCTION: Any = Callable
TABLES = (dict, Mapping, MutableMapping)


@dataclass(frozen=True)
class OneOf(Form):
    """One of some values (``Literal``)."""

    values: tuple[Any, ...]
    eager = 4

    @property
    def words(self) -> str:  # type: ignore[override]
        """All of them."""
        return f"{'one of ' if len(self.values) > 1 else ''}{', '.join(map(repr, self.values))}"

    def take(self, value: Any) -> Any:
        """The value, when it is listed; ``True`` is not 1."""
        same = [v for v in self.values if type(v) is type(value) and v == value]
        return _demand(value, bool(same))

    def read(self, text: str) -> Any:
        """The one that the text stands for."""
        for value in self.values:
            try:
                if form_of(type(value)).read(text) == value:
                    return value
            except Unfit:
                continue
        raise Unfit


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
            return self._each("load", _json(text))
        return self._each("read", [word.strip() for word in text.split(",") if word.strip()])

    def _each(self, door: str, values: Any) -> Any:
        _demand(values, isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping))
        entries = list(values)
        forms = self.forms * len(entries) if self.endless else self.forms
        _demand(values, len(forms) == len(entries))
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
        _demand(value, isinstance(value, Mapping))
        return {self.keys.take(key): self.values.take(entry) for key, entry in value.items()}

    def load(self, value: Any) -> Any:
        """The same, keys and values as a file holds them."""
        if isinstance(value, str):
            return self.read(value)
        _demand(value, isinstance(value, Mapping))
        return {self.keys.load(key): self.values.load(entry) for key, entry in value.items()}

    def read(self, text: str) -> Any:
        """As JSON."""
        return self.load(_demand(_json(text), text.lstrip().startswith("{")))


@dataclass(frozen=True)
class Thing(Form):
    """An object that no text can be: a function, or an instance of a class. A text is the path of one."""

    words: str
    fits: Callable[[Any], bool]
    eager = 6

    def take(self, value: Any) -> Any:
        """The object itself."""
        return _demand(value, self.fits(value))

    def read(self, text: str) -> Any:
        """The path of one."""
        return Late(_demand(text, bool(PATH.fullmatch(text))))


@dataclass(frozen=True)
class Anything(Form):
    """Whatever there is (``Any``). What it may be is then up to the part.

    Attributes:
        paths: Whether a text may be the path of an object.
    """

    paths: bool = True
    words = "anything"
    eager = 8

    def take(self, value: Any) -> Any:
        """As it is."""
        return value

    def load(self, value: Any) -> Any:
        """As it is; a text may be the path of an object."""
        is_path = self.paths and isinstance(value, str) and PATH.fullmatch(value)
        return Late(value) if is_path else value

    def read(self, text: str) -> Any:
        """What the text is as JSON; else the text, or the path of an object."""
        try:
            return self.load(_json(text))
        except Unfit:
            return self.load(text)


@dataclass(frozen=True)
class Either(Form):
    """One of several forms (``Union``, ``Optional``)."""

    forms: tuple[Form, ...]

    @property
    def words(self) -> str:  # type: ignore[override]
        """Each, in the order in which they are written."""
        return " or ".join(form.words for form in self.forms)

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


def form_of(annotation: Any, *, paths: bool = True) -> Form:
    """The form that an annotation, its names resolved, stands for.

    Args:
        annotation: The type.
        paths: Whether a text in place of ``Any`` may be the path of an object. Inside containers it is a text.
    """
    if annotation in SCALARS:
        return SCALARS[annotation]
    origin, inside = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Literal:
        return OneOf(inside)
    if origin in (Union, types.UnionType):
        return Either(tuple(form_of(one, paths=paths) for one in inside))
    if origin in TABLES:
        keys, values = (form_of(one, paths=False) for one in inside or (Any, Any))
        return Table(keys, values)
    if origin in CONTAINERS:
        return _several(origin, inside or (Any, ...))
    if isinstance(origin, type) and origin is not Any:
        return _thing(origin)
    return Anything(paths)


def _several(origin: Any, inside: tuple[Any, ...]) -> Form:
    forms = tuple(form_of(one, paths=False) for one in inside if one is not Ellipsis)
    return Several(CONTAINERS[origin], forms, endless=origin is not tuple or Ellipsis in inside)


def _thing(cls: type) -> Form:
    if cls is FUNCTION:
        return Thing("a function", callable)
    if cls is type:
        return Thing("a class", lambda value: isinstance(value, type))
    return Thing(f"a {cls.__qualname__}", lambda value: isinstance(value, cls))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Unfit from error


def _demand(value: Any, right: bool) -> Any:
    if not right:
        raise Unfit
    return value

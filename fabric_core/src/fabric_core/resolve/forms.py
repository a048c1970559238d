"""What a field's annotation asks of a value: how it is read from text, and what fits.

A form has three doors. ``take``: a value from code, which has to fit. ``load``: one from a file, whose texts may stand
for what a file cannot hold. ``read``: a text from the command line. Each raises `Unfit`.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fabric_core.plan import Late

NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
PATH = re.compile(f"{NAME}:{NAME}")


class Unfit(ValueError):
    """A value that a form has no use for."""


def from_json(text: str) -> Any:
    """What a text is as JSON; `Unfit` when it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise Unfit from error


def demand(value: Any, right: bool) -> Any:
    """The value, when it is right; else `Unfit`."""
    if not right:
        raise Unfit
    return value


class Form(ABC):
    """What a value has to be.

    Attributes:
        words: The same for people: what follows "it has to be".
        eager: In a union, texts are read by the most eager form first.
    """

    words: str
    eager: int = 5

    @property
    def known(self) -> tuple[str, ...]:
        """Texts that it takes, where it takes certain ones, for those who misspell one."""
        return ()

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
            return self.read(demand(value, isinstance(value, str)))


@dataclass(frozen=True)
class Scalar(Form):
    """A value of one type, with the way to read it."""

    words: str
    fits: Callable[[Any], bool]
    convert: Callable[[str], Any]
    eager: int

    def take(self, value: Any) -> Any:
        """The value, untouched."""
        return demand(value, self.fits(value))

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
    demand(text, text.strip().lower() in ("none", "null"))


SCALARS: Mapping[Any, Scalar] = {
    type(None): Scalar("none", lambda value: value is None, _nothing, 0),
    int: Scalar("a whole number", _is_whole, int, 1),
    float: Scalar("a number", _is_number, float, 2),
    bool: Scalar("true or false", lambda value: isinstance(value, bool), _switch, 3),
    str: Scalar("a text", lambda value: isinstance(value, str), str, 9),
    Path: Scalar("a path", lambda value: isinstance(value, Path), Path, 10),
}


@dataclass(frozen=True)
class OneOf(Form):
    """One of some values (``Literal``)."""

    values: tuple[Any, ...]
    eager = 4

    @property
    def words(self) -> str:  # type: ignore[override]
        """All of them."""
        return f"{'one of ' if len(self.values) > 1 else ''}{', '.join(map(repr, self.values))}"

    @property
    def known(self) -> tuple[str, ...]:
        """Those that are texts."""
        return tuple(value for value in self.values if isinstance(value, str))

    def take(self, value: Any) -> Any:
        """The value, when it is listed; ``True`` is not 1."""
        same = [v for v in self.values if type(v) is type(value) and v == value]
        return demand(value, bool(same))

    def read(self, text: str) -> Any:
        """The one that the text stands for."""
        for value in self.values:
            try:
                if SCALARS[type(value)].read(text) == value:
                    return value
            except (Unfit, KeyError):
                continue
        raise Unfit


@dataclass(frozen=True)
class Thing(Form):
    """An object that no text can be: a function, or an instance of a class. A text is the path of one."""

    words: str
    fits: Callable[[Any], bool]
    eager = 6

    def take(self, value: Any) -> Any:
        """The object itself."""
        return demand(value, self.fits(value))

    def read(self, text: str) -> Any:
        """The path of one."""
        return Late(demand(text, bool(PATH.fullmatch(text))))


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
            return self.load(from_json(text))
        except Unfit:
            return self.load(text)

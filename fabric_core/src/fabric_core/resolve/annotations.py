"""From the annotation of a field to the form of its values."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence, Set
from typing import Any, Literal, Union, get_args, get_origin

from fabric_core.resolve.composite import Either, Several, Table
from fabric_core.resolve.forms import SCALARS, Anything, Form, OneOf, Thing

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

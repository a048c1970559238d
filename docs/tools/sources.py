"""What a class says of itself in its source: its attributes, its methods, and what they do by default."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Attribute:
    """An attribute that is documented, or a field of a dataclass.

    Attributes:
        name: Its name.
        type: Its annotation, as written.
        default: Its value, as written; empty when it has none.
        doc: The text below it.
    """

    name: str
    type: str
    default: str
    doc: str


@dataclass(frozen=True)
class Method:
    """A method, a property or a function.

    Attributes:
        name: Its name.
        signature: As written, without the body.
        doc: Its docstring.
        abstract: Whether a class has to state it.
        is_property: Whether it is read, and not called.
        body: What it does: its statements, as written.
    """

    name: str
    signature: str
    doc: str
    abstract: bool
    is_property: bool
    body: tuple[str, ...]


Member = Attribute | Method


def load(path: str) -> Any:
    """The object that ``"package.module:Name"`` names, or the module that ``"package.module"`` names."""
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def members(cls: type) -> list[Member]:
    """What a class itself defines and documents, in the order of its source; what begins with ``_`` is its own."""
    source = _source(cls)
    tree = ast.parse(source)
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__).body
    return list(_members(body, source))


def functions(module: Any) -> list[Method]:
    """The documented functions of a module, in the order of its source."""
    source = inspect.getsource(module)
    return [m for m in _members(ast.parse(source).body, source) if isinstance(m, Method)]


def constants(module: Any) -> dict[str, str]:
    """The texts below the values that a module defines, by name."""
    source = inspect.getsource(module)
    found = _members(ast.parse(source).body, source)
    return {member.name: member.doc for member in found if isinstance(member, Attribute)}


def _source(cls: type) -> str:
    return inspect.getsource(importlib.import_module(cls.__module__))


def _members(body: list[ast.stmt], source: str) -> Iterator[Member]:
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.FunctionDef) and not statement.name.startswith("_"):
            yield _method(statement, source)
        elif isinstance(statement, ast.AnnAssign | ast.Assign):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            name = ast.unparse(target)
            if not name.startswith("_"):
                yield _attribute(name, statement, _text(following))


def _attribute(name: str, statement: ast.AnnAssign | ast.Assign, doc: str) -> Attribute:
    annotation = ast.unparse(statement.annotation) if isinstance(statement, ast.AnnAssign) else ""
    return Attribute(name, annotation, _default(statement.value), doc)


def _default(value: ast.expr | None) -> str:
    """The value of an attribute; of a dataclass's ``field(…)`` what it is when nothing is given."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "field"):
        return "" if value is None else ast.unparse(value)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
    factories = {"dict": "{}", "list": "[]"}
    return given.get("default") or factories.get(given.get("default_factory", ""), "")


def _method(node: ast.FunctionDef, source: str) -> Method:
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    body = node.body[1:] if _text(node.body[0]) else node.body
    return Method(
        name=node.name,
        signature=_head(node, source),
        doc=ast.get_docstring(node) or "",
        abstract="abstractmethod" in decorators,
        is_property="property" in decorators,
        body=tuple(ast.unparse(s) for s in body if not isinstance(s, ast.Import | ast.ImportFrom)),
    )


def _head(node: ast.FunctionDef, source: str) -> str:
    """The lines of a function before its body, and an ellipsis for that; without comments for tools."""
    lines = [line.partition("  # type:")[0] for line in source.splitlines()]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(lines[first - 1 : node.body[0].lineno - 1])) + " ..."


def _text(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return inspect.cleandoc(str(statement.value.value))
    return ""

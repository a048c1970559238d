"""What can stand in a generated region, by the first word of the region."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import docstrings
import sources
from docstrings import table
from sources import Attribute, Member, Method

LONGEST_DEFAULT = 90
"""Letters of a default that is shown as it is written."""


def fields(path: str) -> str:
    """The fields of a dataclass, those of its bases last: ``fields package.module:Class``."""
    rows = []
    for base in _own_bases(sources.load(path)):
        meanings = dict(docstrings.parse(base.__doc__).entries("Attributes"))
        rows += [
            (f"`{a.name}`", f"`{a.type}`", f"`{a.default}`" if a.default else "required", meanings[a.name])
            for a in sources.members(base)
            if isinstance(a, Attribute) and a.name in meanings
        ]
    return table(("field", "type", "default", "meaning"), rows)


def contract(path: str) -> str:
    """All that a class of parts may state, its own first: ``contract package.module:Class``."""
    cls = sources.load(path)
    found = [member for base in _own_bases(cls) for member in sources.members(base) if member.doc]
    listed = [
        (f"[`{m.name}`](#{m.name})", _duty(m), docstrings.sentences(docstrings.parse(m.doc).summary)[0])
        for m in found
    ]
    module = importlib.import_module(cls.__module__)
    told = [*docstrings.parse(module.__doc__).paragraphs, *docstrings.parse(cls.__doc__).paragraphs]
    return "\n\n".join(
        [*told, table(("name", "has to be stated", "what it is"), listed), *map(_member, found)]
    )


def checks(path: str) -> str:
    """What a class of the conformance kit takes and what it looks at: ``checks package.module:Class``.

    What it shares with the classes of every kind is left to the regions of these.
    """
    cls = sources.load(path)
    bases = [b for b in _own_bases(cls) if b is cls or b.__module__ != "fabric_core.testing.conformance"]
    taken = dict(
        entry for b in reversed(bases) for entry in docstrings.parse(b.__doc__).entries("Attributes")
    )
    methods = [m for base in bases for m in sources.members(base) if isinstance(m, Method) and m.doc]
    stated = [m for m in methods if not m.name.startswith("test_")]
    looked = [m for m in methods if m.name.startswith("test_")]
    parts = [
        *docstrings.parse(cls.__doc__).paragraphs,
        table(("attribute", "meaning"), [(f"`{name}`", text) for name, text in taken.items()]),
        table(("method that may be stated", "what for"), [(f"`{m.name}`", _first(m)) for m in stated]),
        table(("check", "what it looks at"), [(f"`{m.name}`", _first(m)) for m in looked]),
    ]
    return "\n\n".join(filter(None, parts))


def hooks(path: str) -> str:
    """The hooks of a module of hook specs: ``hooks package.module``."""
    found = sources.functions(sources.load(path))
    return table(
        ("hook", "what it gives, and when it is called"),
        [(f"`{_call(hook)}`", _told(docstrings.parse(hook.doc))) for hook in found],
    )


def versions(path: str) -> str:
    """A mapping of kinds to numbers: ``versions package.module:NAME``."""
    found: Mapping[str, int] = sources.load(path)
    return table(("kind", "`api`"), [(kind, str(number)) for kind, number in found.items()])


def public_names(package: str) -> str:
    """The modules of a package that say ``__all__``, and what is in it: ``public-names package``.

    What can be imported from the package itself is listed there, and not again.
    """
    seen: set[str] = set()
    chapters = []
    for name in _public_modules(package):
        module = importlib.import_module(name)
        new = sorted({*module.__all__} - {"__version__"} - seen)
        rows = [(f"`{entry}`", _line_of(module, entry)) for entry in new]
        summary = docstrings.parse(module.__doc__).summary
        if rows:
            chapters.append(f"## `{name}`\n\n{summary}\n\n{table(('name', 'what it is'), rows)}")
        seen |= {*new} if name == package else set()
    return "\n\n".join(chapters)


RENDERERS: Mapping[str, Callable[[str], str]] = {
    "checks": checks,
    "contract": contract,
    "fields": fields,
    "hooks": hooks,
    "public-names": public_names,
    "versions": versions,
}


def _own_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.startswith("fabric_")]


def _first(member: Member) -> str:
    """The first paragraph about a member."""
    return docstrings.parse(member.doc).summary


def _duty(member: Member) -> str:
    return "yes" if isinstance(member, Method) and member.abstract else ""


def _member(member: Member) -> str:
    doc = docstrings.parse(member.doc)
    paragraphs = [docstrings.sentences(paragraph) for paragraph in doc.paragraphs]
    called = [sentence for sentences in paragraphs for sentence in sentences if sentence.startswith("Called")]
    told = [" ".join(s for s in sentences if s not in called) for sentences in paragraphs]
    parts = [f"### `{member.name}`", f"```pyi\n{_signature(member)}\n```", *filter(None, told)]
    points = [*called, *_given(doc), *_default(member)]
    return "\n\n".join([*parts, "\n".join(f"- {point}" for point in points)]).rstrip()


def _signature(member: Member) -> str:
    if isinstance(member, Method):
        return member.signature
    annotation = f": {member.type}" if member.type else ""
    return f"{member.name}{annotation}{f' = {member.default}' if member.default else ''}"


def _given(doc: docstrings.Docstring) -> list[str]:
    arguments = [f"`{name}`: {text}" for name, text in doc.entries("Args")]
    raised = [f"Raises `{name}`: {text}" for name, text in doc.entries("Raises")]
    answers = [f"{word} {doc.prose(word)}" for word in ("Returns", "Yields") if word in doc.sections]
    return [*arguments, *(f"{a.partition(' ')[0]}: {a.partition(' ')[2]}" for a in answers), *raised]


def _default(member: Member) -> list[str]:
    """What a method does that no class states, where that can be said in a line."""
    if isinstance(member, Attribute) or member.abstract:
        return []
    if not member.body:
        return ["By default it does nothing."]
    if len(member.body) == 1 and len(member.body[0]) <= LONGEST_DEFAULT and "\n" not in member.body[0]:
        return [f"By default: `{member.body[0]}`"]
    return ["It has a default."]


def _call(hook: Method) -> str:
    return hook.signature.partition("def ")[2].removesuffix(": ...")


def _told(doc: docstrings.Docstring) -> str:
    returns = doc.prose("Returns")
    return " ".join([*doc.paragraphs, *([f"Returns: {returns}"] if returns else [])])


def _line_of(module: Any, name: str) -> str:
    """One sentence about a name: from its own docstring, or from the text below it where it is a plain value."""
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        return docstrings.sentences(docstrings.parse(value.__doc__).summary)[0]
    return docstrings.sentences(docstrings.parse(_text_below(module, name)).summary)[0]


def _text_below(module: Any, name: str) -> str:
    """The text below a value, in the module that defines it."""
    texts = sources.constants(module)
    if name in texts:
        return texts[name]
    home = next(
        node.module
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}
    )
    return sources.constants(importlib.import_module(home)).get(name, "")


def _public_modules(package: str) -> list[str]:
    """The package itself, and then those of its modules that say what is public, in the order of names."""
    top = Path(str(importlib.import_module(package).__file__)).parent
    found = [file for file in sorted(top.rglob("*.py")) if "\n__all__ = " in file.read_text(encoding="utf-8")]
    return [
        ".".join(file.relative_to(top.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in found
    ]

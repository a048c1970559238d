"""What the source of a hooks module shows without running it: hooks that the core would not call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import SimpleNamespace

from fabric_core.authoring.findings import Finding
from fabric_core.authoring.subject import Entry
from fabric_core.errors import did_you_mean
from fabric_core.hookspecs import hookimpl
from fabric_core.registry import loading


def check_source(entry: Entry) -> Iterator[Finding]:
    """Hooks of an unknown name, or without ``@hookimpl``.

    The registry's own check looks at a stand-in of the module, so that it also works where the module cannot be run.
    """
    try:
        tree = ast.parse(entry.file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the import will tell
        return
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    markers = _names_of_marker(tree)
    for name, node in functions.items():
        stand_in = SimpleNamespace(**{name: _stand_in(node, markers)})
        for complaint, _ in loading.odd_hooks(loading.new_manager(), stand_in):
            yield Finding(entry.file, node.lineno, "hooks", f"{complaint[0].upper()}{complaint[1:]}")
        if name.startswith("fabric_") and name not in loading.HOOKS and not _marker(node, markers):
            message = f"{name!r} looks like a hook, and is none.{did_you_mean(name, loading.HOOKS)}"
            yield Finding(entry.file, node.lineno, "hooks", message, "advice")


def _names_of_marker(tree: ast.Module) -> set[str]:
    """What ``hookimpl`` is called in a module."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name for node in imports for alias in node.names if alias.name == "hookimpl"
    }


def _marker(node: ast.FunctionDef, markers: set[str]) -> ast.expr | None:
    """The decorator of a function that marks it as a hook."""
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in markers or name == "hookimpl":
            return decorator
    return None


def _stand_in(node: ast.FunctionDef, markers: set[str]) -> object:
    """A function that is marked as the one in the source is."""

    def function() -> None:
        """Never called."""

    marker = _marker(node, markers)
    if marker is None:
        return function
    keywords = marker.keywords if isinstance(marker, ast.Call) else []
    values = [keyword.value for keyword in keywords if keyword.arg == "specname"]
    names = [str(value.value) for value in values if isinstance(value, ast.Constant)]
    return hookimpl(function, specname=names[0]) if names else hookimpl(function)

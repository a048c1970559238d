"""From the arguments of a ``Fabric`` to a `Request`: deprecated spellings, and the flags of the command line."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from fabric_core.errors import ConfigurationError
from fabric_core.plan import AUTO, OptionTable, Request
from fabric_core.registry import Registry
from fabric_core.registry.hints import accelerator_of_argument
from fabric_core.resolve.asked import is_name
from fabric_core.resolve.devices import is_cpu_request, normalise

RUN_VARIABLE = "FABRIC_RUN"
"""Set by ``fabric run``: the flags that were given there, as JSON; under `OPTIONS` the options of parts, by kind."""

OPTIONS = "options"

DEFAULTS: Mapping[str, Any] = {
    "accelerator": AUTO,
    "strategy": AUTO,
    "devices": AUTO,
    "num_nodes": AUTO,
    "precision": None,
}


def make_request(
    code: Mapping[str, Any],
    *,
    plugins: Any,
    loggers: Any,
    options: Mapping[str, Mapping[str, Any]],
    tables: tuple[OptionTable, ...] = (),
    environ: Mapping[str, str],
    registry: Registry,
) -> Request:
    """Bring together what the code and the command line say.

    Args:
        code: The five flags as the code gives them.
        plugins, loggers: One or several parts, or ``None``.
        options: Options of parts in the code, by kind.
        tables: Options of parts in a file.
        environ: The environment variables.
        registry: Tells whether two names mean the same part.

    Raises:
        ConfigurationError: The code and the command line state different things.
    """
    given = _given(environ)
    flags = {name: _agreed(name, code[name], given.get(name, DEFAULTS[name]), registry) for name in DEFAULTS}
    return Request(
        **flags,
        plugins=as_tuple(plugins),
        loggers=as_tuple(loggers),
        options=options,
        texts=given.get(OPTIONS, {}),
        tables=tables,
        environ=environ,
        interactive=is_interactive(),
    )


def _given(environ: Mapping[str, str]) -> dict[str, Any]:
    text = environ.get(RUN_VARIABLE, "{}")
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not (isinstance(given, dict) and _are_options(given.get(OPTIONS, {}))):
        raise ConfigurationError(
            f"The environment variable {RUN_VARIABLE} holds {text!r}, which 'fabric run' has not written. Remove it."
        )
    return given


def _are_options(given: Any) -> bool:
    return isinstance(given, dict) and all(
        isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())
        for texts in given.values()
    )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """One thing, several, or none, as a tuple of its own."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def replace_deprecated(code: dict[str, Any], deprecated: Mapping[str, Any]) -> None:
    """Map the arguments of old (``gpus=2``) onto ``accelerator`` and ``devices``, with a warning.

    Args:
        code: The flags; changed in place.
        deprecated: What was given, by the old argument's name.

    Raises:
        ConfigurationError: An old argument stands beside the one that replaces it, or beside another old one.
    """
    for name, devices in deprecated.items():
        accelerator = AUTO if is_cpu_request(devices) else accelerator_of_argument(name)
        taken = [flag for flag in ("accelerator", "devices") if code[flag] != DEFAULTS[flag]]
        if taken:
            raise ConfigurationError(
                f"{name}={devices!r} is an old way to give {' and '.join(taken)}; keep the new one."
            )
        warnings.warn(
            f"{name}={devices!r} is deprecated. Write accelerator={accelerator!r}, devices={devices!r}.",
            DeprecationWarning,
            stacklevel=3,
        )
        code["accelerator"], code["devices"] = accelerator, devices


def is_interactive() -> bool:
    """Whether there is no script that could be started again: a notebook, a prompt, ``python -c``."""
    if _is_importing_main():
        return False
    main = sys.modules.get("__main__")
    return hasattr(sys, "ps1") or getattr(main, "__file__", None) is None


def _is_importing_main() -> bool:
    """Whether ``multiprocessing`` has just started this process, and imports the script of its parent.

    There is a script then, though ``__main__`` does not know it yet. Launchers say what is wrong with it.
    """
    processes = sys.modules.get("multiprocessing.process")  # imported in every process that it has started
    return processes is not None and getattr(processes.current_process(), "_inheriting", False)


def _agreed(name: str, code: Any, given: Any, registry: Registry) -> Any:
    """The one value that both sides can live with."""
    default = DEFAULTS[name]
    if _same(name, given, default, registry):
        return code
    if _same(name, code, default, registry):
        return given
    if _same(name, code, given, registry):
        return code
    flag = name.replace("_", "-")
    raise ConfigurationError(
        f"The code says {name}={code!r}, and the command line says --{flag} {given}. "
        f"Make them agree, or leave {name} out of the code so that the command line decides."
    )


def _same(name: str, one: Any, other: Any, registry: Registry) -> bool:
    if name == "devices":  # where None has a meaning
        return normalise(one) == normalise(other)
    if one is None or other is None:
        return one is other
    if not (isinstance(one, str | int) and isinstance(other, str | int)):
        return isinstance(other, str) and _is_asked_for(name, one, other.strip(), registry)
    one, other = str(one).strip().lower(), str(other).strip().lower()
    if one == other:
        return True
    if name == "num_nodes" or AUTO in (one, other) or not (is_name(one) and is_name(other)):
        return False
    offers = registry.named(name, one)
    return offers == registry.named(name, other)


def _is_asked_for(kind: str, part: Any, asked: str, registry: Registry) -> bool:
    """Whether an instance or class that the code passes is the part that the command line asks for.

    A preset with options of its own is another part: the one in the code may have been made with others.
    """
    cls = part if isinstance(part, type) else type(part)
    path = f"{cls.__module__}:{cls.__qualname__}"
    if asked.lower() == AUTO or not is_name(asked):
        return asked == path
    spec = getattr(cls, "spec", None)
    if spec is not None and asked.lower() in spec.names:
        return True
    specs = [offer.spec for offer in registry.named(kind, asked)]
    return all(spec.target_name == path and not spec.options for spec in specs)

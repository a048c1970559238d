"""The shape of the core: what it may import, what it may name, and that everything public is explained."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fabric_core
from fabric_core import Registry, hookspecs
from fabric_core.requirements import missing_requirements
from fabric_core.targets import import_target

if TYPE_CHECKING:
    from conftest import Run

ROOT = Path(__file__).parents[2]
CORE = ROOT / "fabric_core"
SOURCE = CORE / "src" / "fabric_core"
HINTS = SOURCE / "registry" / "known_parts.json"
PYTORCHS_OWN = SOURCE / "without_dynamo.py"
"""Names modules of PyTorch, some of which are called as plugins are."""
DISTRIBUTIONS = ("fabric_core", "fabric_backends", "fabric_cuda", "fabric_xla", "fabric_deepspeed")

BACKENDS = re.compile(
    r"deepspeed|fairscale|fsdp|xla\b|\btpu|\bcuda|\bnccl|\bgloo|\bmps\b|\brocm\b|\bhpu\b|\bxpu\b|slurm|torchelastic"
    r"|\bddp|\bdp\b|kubeflow|\bmpi\b|\blsf\b|tensorboard|bitsandbytes|transformer.engine|fabric[-_]backends",
    re.IGNORECASE,
)


def modules() -> dict[str, Path]:
    """Every module of the core, by its dotted name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


# -- what the core knows ---------------------------------------------------------------------------------------------


def test_the_core_names_no_plugin() -> None:
    """But for the data file of hints, for modules of PyTorch, and for one argument that old code still passes."""
    files = [path for path in SOURCE.rglob("*") if path.suffix in (".py", ".toml", ".md", ".json", ".pyi")]
    assert len(files) > 40
    named = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path not in (HINTS, PYTORCHS_OWN)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if BACKENDS.search(line.replace("tpu_cores", ""))
    ]
    assert named == []


def test_the_search_for_names_of_plugins_finds_them() -> None:
    for text in (
        "strategy='ddp'",
        "DDPStrategy",
        "a TPU",
        "torch.cuda",
        "fsdp2",
        "DeepSpeed",
        "torch_xla",
        "NCCL",
    ):
        assert BACKENDS.search(text), text
    for text in ("hardware", "accelerator", "deprecated", "adapt", "updp_", "example", "torchrun"):
        assert not BACKENDS.search(text), text


def test_only_the_hints_read_the_data_file_of_known_names() -> None:
    readers = [name for name, path in modules().items() if HINTS.name in path.read_text(encoding="utf-8")]
    assert readers == ["fabric_core.registry.hints"]


def test_the_hints_say_the_truth_about_what_is_installed_here() -> None:
    known = json.loads(HINTS.read_text(encoding="utf-8"))
    offered: dict[str, set[str]] = {}
    for offer in Registry(environ={}).offers():
        groups = getattr(offer.spec, "groups", ())
        offered.setdefault(offer.distribution, set()).update(offer.spec.names, groups)
    for distribution, names in known["install"].items():
        assert set(names) == offered[distribution]
    assert set(known["situations"].values()) <= set(known["install"])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_part_that_we_offer_is_the_same_part_when_its_class_is_passed(distribution: str) -> None:
    registry = Registry(environ={})
    for offer in registry.offers():
        if offer.distribution.replace("-", "_") == distribution and not missing_requirements(offer.spec):
            cls = import_target(offer.spec.target, offer.full_name)
            carried = vars(cls).get("spec")
            assert type(carried) is type(offer.spec), (
                f"{cls.__qualname__} carries no spec of a {offer.spec.kind}"
            )
            assert (carried.target, carried.options) == (offer.spec.target, {}), offer.full_name


# -- what is imported when -------------------------------------------------------------------------------------------

HEAVY = {"torch", "numpy", "rich", "click", "jinja2"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import fabric_core", HEAVY | {"pluggy", "importlib_metadata"}),
        *((f"import {name}.hooks", HEAVY) for name in DISTRIBUTIONS),
        ("from fabric_core.registry import default_registry; default_registry()", HEAVY),
        ("import fabric_core.supervisor, fabric_core.orphans", HEAVY),
        ("import fabric_core.resolve, fabric_core.contracts.strategy, fabric_core.build", HEAVY),
        ("import fabric_core.cli.run, fabric_core.cli.plugins, fabric_core.cli.doctor", HEAVY - {"click"}),
        ("from fabric_core import FabricError, Strategy, Precision, hookimpl, StrategySpec", HEAVY),
    ],
)
def test_what_trains_nothing_imports_nothing_heavy(python: Run, code: str, absent: set[str]) -> None:
    ended = python("-c", f"{code}\nimport sys; print(sorted({absent!r} & set(sys.modules)))")
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


TIMED = """
import time
def seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start
def yardstick():
    return [str(number) for number in range(20_000)]
def measured():
    {}
slowness = max(1, min(seconds(yardstick) for _ in range(3)) / 0.0008)
print(seconds(measured) / slowness)
"""
"""Prints the CPU time of a statement; on a machine that is slow or shared, divided by how slow it is."""


def test_importing_the_core_takes_less_than_fifty_milliseconds(python: Run, least: Any) -> None:
    code = TIMED.format("import fabric_core")
    assert least(lambda: float(python("-c", code).stdout), 0.050) < 0.050


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_hooks_module_takes_less_than_five_milliseconds(python: Run, least: Any, distribution: str) -> None:
    shared = "import fabric_core.specs, fabric_core.hookspecs"
    code = f"{shared}; {TIMED.format(f'import {distribution}.hooks')}"
    assert least(lambda: float(python("-c", code).stdout), 0.005) < 0.005


# -- public names ----------------------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_is_listed() -> None:
    assert fabric_core.__all__ == sorted(fabric_core.__all__)
    for name in fabric_core.__all__:
        assert getattr(fabric_core, name) is not None
        assert name in dir(fabric_core)


def test_no_public_name_is_also_a_module() -> None:
    """``from fabric_core import x`` would answer with either, depending on what was imported before."""
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir()} | {
        p.stem for p in SOURCE.glob("*.py")
    }
    assert folders.isdisjoint(set(fabric_core.__all__) - {"__version__"})


def test_type_checkers_see_the_same_names_as_the_interpreter() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    block = next(
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    )
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "only 'import X as X' is a public name to a type checker"
            seen[alias.name] = str(node.module)
    declared = {
        name: f"fabric_core.{module}" for module, names in fabric_core._HOME.items() for name in names
    }
    assert seen == declared


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Febric'"):
        _ = fabric_core.Febric  # type: ignore[attr-defined]


# -- floors and cycles -----------------------------------------------------------------------------------------------


def imports_of(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """The modules of the core that a module imports when it is imported itself."""
    for node in at_module_level(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in wanted:
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                yield target


def at_module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run at import: not those of functions, nor those for type checkers."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from at_module_level(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While | ast.ClassDef):
            yield from at_module_level([*node.body, *getattr(node, "orelse", ())])


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle; empty when there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_no_modules_of_the_core_import_each_other_in_a_circle() -> None:
    found = modules()
    graph = {name: set(imports_of(name, path, set(found))) for name, path in found.items()}
    assert graph["fabric_core.registry.registry"] >= {"fabric_core.specs", "fabric_core.errors"}
    assert cycle_in(graph) == []


def test_the_search_for_circles_finds_one() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_floors_are_kept() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout


# -- everything public is explained ----------------------------------------------------------------------------------


def test_every_hook_says_what_it_is_for_and_when_it_is_called() -> None:
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("fabric_")}
    assert set(hookspecs.PART_HOOKS) < set(hooks)
    for name, hook in hooks.items():
        assert hook.__doc__ is not None, name
        assert "Called once" in hook.__doc__, name


CONTRACTS = [
    getattr(fabric_core, name)
    for name in sorted(
        name
        for module, names in fabric_core._HOME.items()
        if module.startswith("contracts")
        for name in names
    )
]


@pytest.mark.parametrize("contract", [c for c in CONTRACTS if inspect.isclass(c)], ids=lambda c: c.__name__)
def test_everything_in_a_contract_is_documented(contract: type) -> None:
    assert inspect.getdoc(contract)
    for name, member in vars(contract).items():
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        assert member.__doc__, f"{contract.__name__}.{name} has no docstring"


@pytest.mark.parametrize("contract", [c for c in CONTRACTS if inspect.isclass(c)], ids=lambda c: c.__name__)
def test_a_contract_that_explains_arguments_explains_all_of_them(contract: type) -> None:
    for name, member in vars(contract).items():
        if not inspect.isfunction(member) or "Args:" not in str(member.__doc__):
            continue
        unexplained = [
            parameter
            for parameter in inspect.signature(member).parameters
            if parameter != "self" and not re.search(rf"\b{parameter}\b", str(member.__doc__))
        ]
        assert unexplained == [], f"{contract.__name__}.{name}"


def test_every_module_of_the_core_says_what_it_is_for() -> None:
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{name} has no docstring"


def test_every_error_is_in_the_tree_at_the_top_of_its_module() -> None:
    errors = importlib.import_module("fabric_core.errors")
    classes: list[Any] = [
        c for c in vars(errors).values() if inspect.isclass(c) and c.__module__ == errors.__name__
    ]
    assert len(classes) > 10
    for error in classes:
        assert issubclass(error, errors.FabricError)
        assert re.search(rf"(─ |^ *){error.__name__}\b", str(errors.__doc__), re.MULTILINE), error.__name__
        assert error.__name__ in fabric_core.__all__

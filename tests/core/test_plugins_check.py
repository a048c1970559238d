"""``fabric plugins check``: a sound project is clean, and each fault is told with its file and its line."""

# ruff: noqa: E501 (a fault is a line)
from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from fabric_core import ConfigurationError
from fabric_core.authoring import CHECKS, Finding, check_installed, check_project
from fabric_core.errors import UnknownPluginError

if TYPE_CHECKING:
    from conftest import Run, Site

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fabric-acme"
version = "1.0"
readme = "README.md"
license = "MIT"
license-files = ["LICENSE"]
dependencies = [
    "click>=8.1",
    "fabric-core>=0.1",
]

[project.optional-dependencies]
client = ["acme-client>=2"]

[project.entry-points."fabric_core.plugins"]
acme = "fabric_acme.hooks"
"""

HOOKS = """
from fabric_core import (
    AcceleratorSpec, ClusterEnvironmentSpec, CommandSpec, LoggerSpec, PrecisionSpec, StrategySpec, hookimpl
)

@hookimpl
def fabric_accelerators():
    yield AcceleratorSpec("acme", "fabric_acme.parts:AcmeDevice", probe="fabric_acme.parts:probe", requires=("click>=8.1",))

@hookimpl
def fabric_cluster_environments():
    yield ClusterEnvironmentSpec("acme", "fabric_acme.parts:AcmeCluster", detect="fabric_acme.light:detect")

@hookimpl
def fabric_precisions():
    yield PrecisionSpec("acme8", "fabric_acme.parts:Eight", options={"bits": 8}, options_type="fabric_acme.light:Bits")
    yield PrecisionSpec("acme4", "fabric_acme.parts:Eight", options={"bits": 4})

@hookimpl
def fabric_loggers():
    yield LoggerSpec("acme", "fabric_acme.sink:Duck")

@hookimpl
def fabric_cli_commands():
    yield CommandSpec("acme", "fabric_acme.parts:command")

@hookimpl
def fabric_check_plan(plan):
    return None
"""

LIGHT = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Bits:
    bits: int = 8

def detect(environ):
    return None
"""

PARTS = """
import click

from fabric_core import Accelerator, ClusterEnvironment, Inventory, Precision

def probe():
    return Inventory(note="none here")

class AcmeDevice(Accelerator):
    def device(self, index):
        return index

class AcmeCluster(ClusterEnvironment):
    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 1

    def world_size(self):
        return 1

    def global_rank(self):
        return 0

    def local_rank(self):
        return 0

    def node_rank(self):
        return 0

class Eight(Precision):
    def __init__(self, bits=8):
        self.bits = bits

@click.command()
def command():
    pass
"""

SINK = """
import json

class Duck:
    def log_metrics(self, metrics, step=None):
        pass
"""

SOUND = {
    "pyproject.toml": PYPROJECT,
    "README.md": "Acme.",
    "LICENSE": "MIT",
    "src/fabric_acme/__init__.py": "",
    "src/fabric_acme/py.typed": "",
    "src/fabric_acme/hooks.py": HOOKS,
    "src/fabric_acme/light.py": LIGHT,
    "src/fabric_acme/parts.py": PARTS,
    "src/fabric_acme/sink.py": SINK,
}

TOML, INIT, HOOK, LIGHTER, PART, SINKS = (
    "pyproject.toml",
    *(f"src/fabric_acme/{name}.py" for name in ("__init__", "hooks", "light", "parts", "sink")),
)


def write(folder: Path, files: dict[str, str]) -> Path:
    """A project in a folder."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.lstrip("\n"), encoding="utf-8")
    return folder


def planted(old: str, new: str, file: str = HOOK) -> dict[str, str]:
    """The sound project with one text replaced by another."""
    assert SOUND[file].count(old) >= 1, f"{old!r} is not in {file}"
    return {**SOUND, file: SOUND[file].replace(old, new, 1)}


def told(findings: list[Finding], folder: Path) -> list[tuple[str, str, str]]:
    """Severity, check, and file with line, of each finding."""
    return [(f.severity, f.check, f"{f.path.relative_to(folder).as_posix()}:{f.line}") for f in findings]


def line_of(text: str, part: str) -> int:
    """The number of the first line with a part; 0 for no part."""
    lines = text.lstrip("\n").splitlines()
    return next(number for number, line in enumerate(lines, 1) if part in line) if part else 0


# -- what is sound ---------------------------------------------------------------------------------------------------


def moved(prefix: str, *, more: str = "") -> dict[str, str]:
    """The sound project with its package elsewhere, and a setting of the build backend."""
    files = {name.replace("src/", prefix): text for name, text in SOUND.items()}
    return {**files, TOML: SOUND[TOML] + more}


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(SOUND, id="src"),
        pytest.param(moved(""), id="flat"),
        pytest.param(
            moved("lib/", more='[tool.hatch.build.targets.wheel]\npackages = ["lib/fabric_acme"]'), id="hatch"
        ),
        pytest.param(
            moved("code/", more='[tool.setuptools.packages.find]\nwhere = ["code"]'), id="setuptools"
        ),
        pytest.param(moved("py/", more='[tool.setuptools.package-dir]\n"" = "py"'), id="package-dir"),
    ],
)
def test_a_sound_project_is_clean_whatever_its_layout(files: dict[str, str], tmp_path: Path) -> None:
    assert check_project(write(tmp_path, files)) == []


def test_an_installed_copy_of_the_project_is_no_rival_of_it(site: Site, tmp_path: Path) -> None:
    site.install("fabric-acme", HOOKS, files={"light.py": LIGHT, "parts.py": PARTS, "sink.py": SINK})
    registry = site.registry()
    assert "acme8" in [offer.spec.name for offer in registry.offers("precision")]
    assert check_project(write(tmp_path / "project", SOUND), registry) == []


# -- one fault at a time ---------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A fault that is planted, and the finding that has to tell of it."""

    name: str
    files: dict[str, str]
    check: str
    file: str
    line: str
    """A part of the line that the finding has to name; empty for the file as a whole."""
    says: str
    severity: str = "error"


def with_hook(code: str) -> dict[str, str]:
    """The sound project with more in its hooks module."""
    return {**SOUND, HOOK: f"{HOOKS}\n{code}\n"}


def without(*names: str) -> dict[str, str]:
    """The sound project without some files."""
    return {name: text for name, text in SOUND.items() if name not in names}


SET_OF_SPECS = """
@hookimpl
def fabric_strategies():
    for name in {f"acme{number}" for number in range(9)}:
        yield StrategySpec(name, "fabric_core:Strategy")
"""
ANOTHER_EACH_TIME = """
COUNT = [0]

@hookimpl
def fabric_strategies():
    COUNT[0] += 1
    yield StrategySpec(f"acme{COUNT[0]}", "fabric_core:Strategy")
"""

IN_TOML = [
    Fault("broken toml", planted('version = "1.0"', "version = ", TOML), "toml", TOML, "version =", "cannot be read"),
    Fault("no name", planted('name = "fabric-acme"', "", TOML), "toml", TOML, "[project]", "states a name"),
    Fault("no group", planted("fabric_core.plugins", "other.plugins", TOML), "entry-point", TOML, "[project]", "missing"),
    Fault("no module", planted("acme.hooks", "acme.hoks", TOML), "entry-point", TOML, "acme.hoks", "Looked in: src, ."),
    Fault("no dotted name", planted("acme.hooks", "acme:hooks", TOML), "entry-point", TOML, "acme:hooks", "does not name"),
    Fault("core not stated", planted('    "fabric-core>=0.1",\n', "", TOML), "core", TOML, "dependencies = [", "fabric-core"),
    Fault("upper bound", planted("core>=0.1", "core>=0.1,<2", TOML), "core", TOML, "core>=0.1,<2", "upper bound (<2)"),
    Fault("compatible release", planted("core>=0.1", "core~=0.1", TOML), "core", TOML, "core~=0.1", "(~=0.1)"),
    Fault("dynamic", planted("dependencies = [\n    \"click>=8.1\",\n    \"fabric-core>=0.1\",\n]\n", "dynamic = [\"dependencies\"]\n", TOML), "core", TOML, "dynamic", "not checked before it is built", "advice"),
    Fault("no requirement", planted("click>=8.1", "click>=8.1 or so", TOML), "requires", TOML, "or so", "no requirement"),
    Fault("too wide", planted("click>=8.1", "click>=7.0", TOML), "requires", TOML, "click>=7.0", "lets pip install 7.0"),
    Fault("no bound", planted("click>=8.1", "click", TOML), "requires", TOML, '"click"', "any old version"),
    Fault("no licence file", without("LICENSE"), "package", TOML, "license-files", "'LICENSE', which is not there"),
    Fault("no readme file", without("README.md"), "package", TOML, "readme", "'README.md', which is not there"),
    Fault("no licence", planted('license = "MIT"\nlicense-files = ["LICENSE"]\n', "", TOML), "package", TOML, "[project]", "licence", "advice"),
    Fault("no readme", planted('readme = "README.md"\n', "", TOML), "package", TOML, "[project]", "readme", "advice"),
    Fault("no types", without("src/fabric_acme/py.typed"), "package", INIT, "", "py.typed", "advice"),
]  # fmt: skip

IN_HOOKS = [
    Fault("command of ours", planted('CommandSpec("acme"', 'CommandSpec("run"'), "clash", HOOK, 'CommandSpec("run"', "has the name of a command of the core"),
    Fault("raises", with_hook("raise RuntimeError('not today')"), "import", HOOK, "not today", "RuntimeError: not today"),
    Fault("syntax", with_hook("def x(:"), "import", HOOK, "def x(:", "SyntaxError"),
    Fault("leaves", with_hook("import os; os._exit(3)"), "import", HOOK, "", "ended the process with code 3"),
    Fault("imports what is not there", with_hook("import nobody_has_this"), "import", HOOK, "nobody_has", "No module named"),
    Fault("heavy", with_hook("import numpy"), "light", HOOK, "import numpy", "brings in numpy"),
    Fault("heavy package", {**SOUND, INIT: "import numpy\n"}, "light", INIT, "import numpy", "brings in numpy"),
    Fault("slow", with_hook("sum(range(10_000_000))"), "light", HOOK, "", "ms of CPU time, and may take 50"),
    Fault("heavy options", planted("\nfrom data", "import numpy\nfrom data", LIGHTER), "light", LIGHTER, "numpy", "brings in numpy"),
    Fault("another order", with_hook(SET_OF_SPECS), "deterministic", HOOK, "yield StrategySpec", "in another process"),
    Fault("another each time", with_hook(ANOTHER_EACH_TIME), "deterministic", HOOK, "", "called again"),
    Fault("unknown hook", planted("def fabric_loggers", "def fabric_logers"), "hooks", HOOK, "def fabric_logers", "Did you mean 'fabric_loggers'"),
    Fault("not marked", planted("@hookimpl\ndef fabric_loggers", "def fabric_loggers"), "hooks", HOOK, "def fabric_loggers", "lacks the decorator @hookimpl"),
    Fault("neither", planted("@hookimpl\ndef fabric_loggers", "def fabric_logers"), "hooks", HOOK, "def fabric_logers", "is none", "advice"),
    Fault("wrong argument", planted("fabric_loggers()", "fabric_loggers(config)"), "hooks", HOOK, "fabric_loggers(config)", "not called with config"),
    Fault("bad spec", planted('LoggerSpec("acme"', 'LoggerSpec("a b"'), "specs", HOOK, 'LoggerSpec("a b"', "has to be a word"),
    Fault("no spec", with_hook("@hookimpl\ndef fabric_launchers():\n    return [3]"), "specs", HOOK, "def fabric_launchers", "has to yield specs, not 3"),
    Fault("twin", planted('"acme4"', '"ACME8"'), "specs", HOOK, '"ACME8"', "a name that another part of it has (hooks.py:"),
    Fault("clash", with_hook('@hookimpl\ndef fabric_strategies():\n    yield StrategySpec("single_device", "fabric_core:Strategy")'), "clash", HOOK, '"single_device"', "fabric-core offers too"),
    Fault("future", planted("acme.sink:Duck\"", "acme.sink:Duck\", api=2"), "version", HOOK, "api=2", "api=2; this core speaks version 1"),
    Fault("not brought", planted("click>=8.1", "packaging"), "requires", HOOK, "packaging", "neither among the dependencies nor"),
    Fault("unreadable", planted("click>=8.1", "packaging 3"), "requires", HOOK, "packaging 3", "which is no requirement"),
]  # fmt: skip

IN_PARTS = [
    Fault("no class", planted("sink:Duck", "sink:Duk"), "targets", HOOK, "sink:Duk", "Did you mean 'Duck'"),
    Fault("no module of a part", planted("sink:Duck", "snk:Duck"), "targets", HOOK, "snk:Duck", "No module named 'fabric_acme.snk'"),
    Fault("no path", planted("acme.sink:Duck", "acme.sink.Duck"), "targets", HOOK, "sink.Duck", "not of the form"),
    Fault("part raises", planted("\nimport json\n", "import json\n1 / 0\n", SINKS), "targets", SINKS, "1 / 0", "ZeroDivisionError"),
    Fault("nobody tells", planted("\nimport json\n", "import json\nimport nobody_has_this\n", SINKS), "targets", SINKS, "import nobody", "nobody tells the users"),
    Fault("told by requires", {**planted("import json", "import acme_client", SINKS), HOOK: HOOKS.replace('sink:Duck"', 'sink:Duck", requires=("acme-client>=2",)')}, "targets", HOOK, "sink:Duck", "not checked further: it needs acme-client>=2", "advice"),
    Fault("told by an extra", planted("\nimport json\n", "import json\nimport acme_client\n", SINKS), "targets", SINKS, "import acme_client", "state it in requires", "advice"),
    Fault("no probe", planted("parts:probe", "parts:prob"), "targets", HOOK, "parts:prob", "Did you mean 'probe'"),
    Fault("probe is no function", planted("parts:probe", "light:dataclass.__doc__"), "targets", HOOK, "__doc__", "is no function"),
    Fault("no detection", planted("light:detect", "light:detects"), "targets", HOOK, "light:detects", "Did you mean 'detect'"),
    Fault("another kind", planted("parts:AcmeCluster", "parts:AcmeDevice"), "contract", HOOK, 'EnvironmentSpec("acme"', "does not derive from fabric_core.ClusterEnvironment"),
    Fault("no command", planted("parts:command", "parts:probe"), "contract", HOOK, 'CommandSpec("acme"', "no click command"),
    Fault("method left out", planted("def node_rank", "def nod_rank", PART), "contract", PART, "class AcmeCluster", "lacks methods of the contract of a cluster environment: node_rank"),
    Fault("unknown option", planted('options={"bits": 4}', 'options={"bit": 4}'), "options", HOOK, '"bit": 4', "Did you mean 'bits'"),
    Fault("unknown declared option", planted("bits: int = 8", "bitts: int = 8", LIGHTER), "options", HOOK, '"acme8"', "declares the option 'bitts'"),
    Fault("another default", planted("bits: int = 8", "bits: int = 16", LIGHTER), "options", HOOK, '"acme8"', "with another default: 8 there, 16 here"),
    Fault("no options type", planted("light:Bits", "light:Bit"), "options", HOOK, "light:Bit\"", "options_type"),
]  # fmt: skip


@pytest.mark.parametrize("fault", [*IN_TOML, *IN_HOOKS, *IN_PARTS], ids=lambda fault: fault.name)
def test_a_fault_is_told_with_its_file_and_line(fault: Fault, tmp_path: Path) -> None:
    findings = check_project(write(tmp_path, fault.files))
    line = line_of(fault.files[fault.file], fault.line)
    place = f"{fault.file}:{line}"
    assert set(told(findings, tmp_path)) == {(fault.severity, fault.check, place)}, findings
    assert fault.says in findings[0].message


def test_every_check_has_a_fault() -> None:
    assert {fault.check for fault in (*IN_TOML, *IN_HOOKS, *IN_PARTS)} == set(CHECKS)


def test_everything_is_told_at_once(tmp_path: Path) -> None:
    files = planted("core>=0.1", "core<2", TOML)
    for old, new in (("sink:Duck", "sink:Duk"), ('"acme4"', '"a b"'), ("light:detect", "light:no")):
        files[HOOK] = files[HOOK].replace(old, new)
    files[PART] = PARTS.replace("def node_rank", "def nod_rank")
    del files["README.md"]
    found = told(check_project(write(tmp_path, files)), tmp_path)
    assert [(check, place.partition(":")[0]) for _, check, place in found] == [
        ("package", TOML),
        ("core", TOML),
        ("targets", HOOK),
        ("specs", HOOK),
        ("targets", HOOK),
        ("contract", PART),
    ]


def test_the_process_that_checks_imports_nothing_of_the_plugin(tmp_path: Path) -> None:
    import sys

    assert check_project(write(tmp_path, SOUND)) == []
    assert not [name for name in sys.modules if name.startswith("fabric_acme")]


def test_what_is_no_project_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"is no project: it has no pyproject\.toml.*fabric plugins new"
    ):
        check_project(tmp_path)
    with pytest.raises(ConfigurationError, match="is no project"):
        check_project(tmp_path / "not-there")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('[project.entry-points."fabric_core.plugins"]', "[project.entry-points]", "entry-points"),
        ('client = ["acme-client>=2"]', 'client = "acme-client>=2"', "optional-dependencies"),
        ('readme = "README.md"', "readme = 3", "readme"),
        ('version = "1.0"', 'dynamic = "version"', "dynamic"),
    ],
)
def test_a_table_of_another_shape_is_an_error_of_its_own(
    old: str, new: str, key: str, tmp_path: Path
) -> None:
    findings = check_project(write(tmp_path, planted(old, new, TOML)))
    (finding,) = findings
    assert (finding.check, finding.line > 0) == ("toml", True)
    assert finding.message.startswith(f"{key} has to be a ")


@pytest.mark.parametrize(
    "tool", ["hatch = 3", "hatch.build.targets.wheel.packages = 3", "poetry.packages = [3]", "uv = []"]
)
def test_odd_settings_of_a_build_backend_are_passed_over(tool: str, tmp_path: Path) -> None:
    assert check_project(write(tmp_path, moved("src/", more=f"[tool]\n{tool}\n"))) == []


# -- what is installed -----------------------------------------------------------------------------------------------


def installed_metadata(*requirements: str) -> str:
    """The metadata of an installed distribution that states some requirements."""
    lines = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    return f"Metadata-Version: 2.1\nName: fabric-acme\nVersion: 1.0\n{lines}\n"


def test_an_installed_distribution_is_checked_by_its_metadata(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site.folder))
    metadata = installed_metadata("click>=8.1", "fabric-core<2", 'acme-client>=2; extra == "client"')
    hooks = HOOKS.replace("sink:Duck", "sink:Duk")
    site.install(
        "fabric-acme", hooks, metadata=metadata, files={"light.py": LIGHT, "parts.py": PARTS, "py.typed": ""}
    )
    found = told(check_installed("Fabric_Acme", site.registry()), site.folder)
    assert found == [
        ("error", "targets", f"fabric_acme/hooks.py:{line_of(hooks, 'sink:Duk') + 1}"),
        ("error", "core", "fabric_acme-1.0.dist-info/METADATA:5"),
    ]


def test_a_distribution_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(UnknownPluginError, match="named 'fabric-cor'. Did you mean 'fabric-core'"):
        check_installed("fabric-cor")


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_errors_and_advice_and_fails_for_errors_only(fabric: Run, tmp_path: Path) -> None:
    write(
        tmp_path,
        {**planted("sink:Duck", "sink:Duk"), TOML: SOUND[TOML].replace('readme = "README.md"\n', "")},
    )
    ended = fabric("plugins", "check", env={"FABRIC_DEBUG": "1"})
    assert (ended.returncode, ended.stderr) == (1, "")
    errors, advice = ended.stdout.split("Advice: it works, and could be better.")
    number = line_of(HOOKS, "sink:Duck")
    assert f"  src/fabric_acme/hooks.py:{number}: The logger 'acme' cannot be loaded" in errors
    assert "  pyproject.toml:5: It names no readme" in advice
    assert ended.stdout.endswith("\n1 error(s), 1 piece(s) of advice.\n")
    assert max(map(len, ended.stdout.splitlines())) <= 80

    write(tmp_path, {HOOK: HOOKS})
    assert fabric("plugins", "check", str(tmp_path)).returncode == 0
    write(tmp_path, SOUND)
    assert fabric("plugins", "check", ".").stdout == "Nothing is wrong with it.\n"


def test_the_command_speaks_json(fabric: Run, tmp_path: Path) -> None:
    write(tmp_path, planted("sink:Duck", "sink:Duk"))
    ended = fabric("plugins", "check", "--json")
    found: dict[str, Any] = json.loads(ended.stdout)
    assert (ended.returncode, found["errors"]) == (1, 1)
    (finding,) = found["findings"]
    assert (finding["check"], finding["severity"]) == ("targets", "error")
    assert finding["path"].endswith(HOOK)
    assert finding["line"] == line_of(HOOKS, "sink:Duck")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((".",), "is no project: it has no pyproject.toml"),
        (("--installed", "nobody"), "No installed plugin is a distribution named 'nobody'"),
        ((".", "--installed", "fabric-core"), "not both"),
    ],
)
def test_what_cannot_be_checked_is_a_usage_error(
    fabric: Run, arguments: tuple[str, ...], message: str
) -> None:
    ended = fabric("plugins", "check", *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr


def test_checking_imports_no_torch(fabric: Run, tmp_path: Path) -> None:
    write(tmp_path / "project", SOUND)
    write(tmp_path / "site", {"torch.py": "import os\nos._exit(77)"})
    ended = fabric("plugins", "check", "project", env={"PYTHONPATH": str(tmp_path / "site")})
    assert (ended.returncode, ended.stdout) == (0, "Nothing is wrong with it.\n")

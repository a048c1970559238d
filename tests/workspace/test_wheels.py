"""The five wheels: what is in them, and that a fresh environment which has nothing else of ours can train.

Editable installs hide missing files and entry points; wheels do not.
"""

from __future__ import annotations

import configparser
import email.message
import email.parser
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

SCRIPTS = "Scripts" if os.name == "nt" else "bin"
STRICT = ("-W", "error", "-W", "ignore:Failed to initialize NumPy")  # PyTorch's own, where nobody needs NumPy


@pytest.fixture(scope="session")
def environment(alone: Callable[[str], Path]) -> Path:
    """The folder of a fresh environment with the wheels of core and backends and what they depend on."""
    return alone("fabric_backends")


def contents(wheel: Path) -> list[str]:
    """The names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


def read(wheel: Path, name: str) -> str:
    """The text of one file in a wheel, whose name may begin with the metadata folder's ``*``."""
    (found,) = (file for file in contents(wheel) if re.fullmatch(name.replace("*", r"[^/]+"), file))
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(found).decode("utf-8")


def metadata(wheel: Path) -> email.message.Message:
    """The core metadata of a wheel."""
    return email.parser.Parser().parsestr(read(wheel, "*.dist-info/METADATA"))


def test_a_wheel_holds_every_file_of_its_package_and_nothing_else(
    distribution: str, wheels: dict[str, Path], root: Path
) -> None:
    source = root / distribution / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in contents(wheels[distribution]) if ".dist-info/" not in name}
    assert packed == expected
    assert {f"{distribution}/{name}" for name in ("__init__.py", "hooks.py", "py.typed")} <= packed


def test_a_wheel_holds_its_licence_once(distribution: str, wheels: dict[str, Path], root: Path) -> None:
    wheel = wheels[distribution]
    licences = [name for name in contents(wheel) if "licen" in name.lower()]
    version = metadata(wheel)["Version"]
    assert licences == [f"{distribution}-{version}.dist-info/licenses/LICENSE"]
    assert read(wheel, "*.dist-info/licenses/LICENSE") == (root / "LICENSE").read_text(encoding="utf-8")
    assert metadata(wheel)["License-Expression"] == "Apache-2.0"


def test_a_wheel_is_pure_python_and_named_as_its_manifest_says(
    distribution: str, wheels: dict[str, Path], manifests: dict[str, dict[str, Any]]
) -> None:
    project = manifests[distribution]["project"]
    assert wheels[distribution].name == f"{distribution}-{project['version']}-py3-none-any.whl"
    assert metadata(wheels[distribution])["Name"] == distribution.replace("_", "-")
    assert metadata(wheels[distribution])["Requires-Python"] == ">=3.10"


def test_the_wheels_may_be_published(
    wheels: dict[str, Path], run: Callable[..., str], tmp_path: Path
) -> None:
    files = wheels.values()
    twine = (sys.executable, "-m", "twine", "--no-color", "check", "--strict")
    told = run(*twine, *files, cwd=tmp_path, COLUMNS="1000")  # else it breaks long lines
    assert told.count(": PASSED") == len(wheels)
    told = run(sys.executable, "-m", "check_wheel_contents", *files, cwd=tmp_path)
    assert told.count(": OK") == len(wheels)


def test_the_core_brings_the_kit_and_the_scaffold_and_no_test_of_ours(wheels: dict[str, Path]) -> None:
    packed = contents(wheels["fabric_core"])
    kit = {f"fabric_core/testing/{name}.py" for name in ("conformance", "plugin", "strategy", "rank")}
    assert kit <= set(packed)
    assert any(name.startswith("fabric_core/scaffold/templates/") for name in packed)
    assert [name for name in packed if re.search(r"(^|/)(test_\w+|conftest)\.py$", name)] == []
    extras = metadata(wheels["fabric_core"]).get_all("Provides-Extra")
    assert extras == ["testing"]


def test_the_wheels_agree_on_their_version(wheels: dict[str, Path]) -> None:
    assert len({metadata(wheel)["Version"] for wheel in wheels.values()}) == 1


def test_an_entry_point_leads_to_a_file_in_its_wheel(distribution: str, wheels: dict[str, Path]) -> None:
    entry_points = configparser.ConfigParser(delimiters=["="])
    entry_points.optionxform = str  # type: ignore[assignment,method-assign]
    entry_points.read_string(read(wheels[distribution], "*.dist-info/entry_points.txt"))
    assert dict(entry_points["fabric_core.plugins"]) == {
        distribution.removeprefix("fabric_"): f"{distribution}.hooks"
    }
    packed = set(contents(wheels[distribution]))
    modules = {
        target.partition(":")[0].replace(".", "/")
        for group in entry_points.sections()
        for target in entry_points[group].values()
    }
    missing = {m for m in modules if not {f"{m}.py", f"{m}/__init__.py"} & packed}
    assert missing == set()


def test_only_the_core_installs_a_command(distribution: str, wheels: dict[str, Path]) -> None:
    scripts = "console_scripts" in read(wheels[distribution], "*.dist-info/entry_points.txt")
    assert scripts == (distribution == "fabric_core")


def test_the_readme_is_the_front_page_and_needs_no_neighbours(
    distribution: str, wheels: dict[str, Path], root: Path
) -> None:
    page = metadata(wheels[distribution])
    assert page["Description-Content-Type"] == "text/markdown"
    text = page.get_payload()
    assert text == (root / distribution / "README.md").read_text(encoding="utf-8")

    html = MarkdownIt("commonmark").enable("table").render(text)
    assert html.startswith(f"<h1>{distribution.replace('_', '-')}</h1>")
    assert "|--" not in html, "a table that did not render"
    links = re.findall(r'(?:href|src)="([^"]+)"', html)
    assert [link for link in links if not link.startswith("https:")] == [], (
        "a relative link breaks off the repository"
    )


def test_a_fresh_environment_imports_the_wheels_and_not_our_sources(
    environment: Path, run: Callable[..., str]
) -> None:
    code = (
        "import fabric_core, fabric_backends, sys\n"
        "print(fabric_core.__file__, fabric_backends.__file__)\n"
        "assert 'torch' not in sys.modules, 'importing fabric_core imports torch'\n"
        "for name in fabric_core.__all__: getattr(fabric_core, name)\n"
        "from fabric_core import Accelerator, ClusterEnvironment, Fabric, Precision, Strategy\n"
        "from fabric_core import hookimpl, seed_everything\n"
    )
    places = run(environment / SCRIPTS / "python", *STRICT, "-c", code, cwd=environment).split()
    assert all(Path(place).is_relative_to(environment) for place in places), places


def test_a_fresh_environment_lists_the_parts_of_both_wheels(
    environment: Path, run: Callable[..., str]
) -> None:
    printed = run(environment / SCRIPTS / "fabric", "plugins", "list", "--json", cwd=environment)
    json.loads(printed)
    for word in ("fabric-core", "fabric-backends", "single_device", "ddp", "bf16-mixed", "torchelastic"):
        assert f'"{word}"' in printed
    assert "fabric-cuda" not in printed


def test_a_fresh_environment_trains_on_two_processes(
    environment: Path, root: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(# train\.py\n.*?)^```", readme, re.DOTALL | re.MULTILINE)
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    fabric = environment / SCRIPTS / "fabric"
    printed = run(
        *(fabric, "run", "train.py", "--accelerator=cpu", "--strategy=ddp", "--devices=2"), cwd=tmp_path
    )
    assert re.fullmatch(r"loss 0\.\d{4} on 2 process\(es\)", printed.strip().splitlines()[-1])

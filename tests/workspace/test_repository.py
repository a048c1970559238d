"""The repository keeps its own promises: what every distribution has, and what no file contains."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|root|home|Users)/\w")
REGISTRY_ADDRESS = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|npmjs\.|--(?:extra-)?index-url|--find-links"
)


def texts(files: list[Path]) -> dict[Path, str]:
    """The text of every file that is text, but for this one, which holds the patterns."""
    found = {}
    for path in files:
        content = path.read_bytes()
        if b"\0" not in content and path != Path(__file__):
            found[path] = content.decode("utf-8")
    return found


def matches(pattern: re.Pattern[str], files: list[Path], root: Path) -> list[str]:
    """Where a pattern occurs, as ``file:line: text``."""
    return [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path, text in texts(files).items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_file_names_a_path_of_one_machine(files: list[Path], root: Path) -> None:
    assert len(files) > 40
    assert matches(MACHINE_PATH, files, root) == []


def test_no_file_names_a_package_registry(files: list[Path], root: Path) -> None:
    assert matches(REGISTRY_ADDRESS, files, root) == []


def test_a_distribution_has_its_readme_licence_and_type_marker(distribution: str, root: Path) -> None:
    folder = root / distribution
    assert (
        (folder / "README.md").read_text(encoding="utf-8").startswith(f"# {distribution.replace('_', '-')}\n")
    )
    assert (folder / "LICENSE").read_bytes() == (root / "LICENSE").read_bytes()
    assert (folder / "src" / distribution / "py.typed").is_file()
    assert [path.name for path in (folder / "src").iterdir() if path.is_dir()] == [distribution]


def test_the_distributions_share_one_version(manifests: dict[str, dict[str, Any]]) -> None:
    versions = {name: manifest["project"]["version"] for name, manifest in manifests.items()}
    assert len(set(versions.values())) == 1, versions


def test_a_distribution_needs_its_siblings_from_the_shared_version_on(
    distribution: str, manifests: dict[str, dict[str, Any]]
) -> None:
    project = manifests[distribution]["project"]
    siblings = {name: str(spec) for name, spec in requirements(project).items() if name.startswith("fabric-")}
    assert set(siblings.values()) <= {f">={project['version']}"}, "a lower bound, and never an upper one"


def test_the_distributions_depend_in_one_direction(manifests: dict[str, dict[str, Any]]) -> None:
    siblings = {
        name: {other for other in requirements(manifest["project"]) if other.startswith("fabric-")}
        for name, manifest in manifests.items()
    }
    assert siblings == {
        "fabric_core": set(),
        "fabric_backends": {"fabric-core"},
        "fabric_cuda": {"fabric-core", "fabric-backends"},
        "fabric_xla": {"fabric-core"},
        "fabric_deepspeed": {"fabric-core", "fabric-backends", "fabric-cuda"},
    }


def requirements(project: dict[str, Any]) -> dict[str, Any]:
    """The dependencies of a project: name to version range."""
    parsed = [Requirement(text) for text in project["dependencies"]]
    return {requirement.name: requirement.specifier for requirement in parsed}


def test_a_distribution_registers_its_hooks_module_under_its_own_name(
    distribution: str, manifests: dict[str, dict[str, Any]], root: Path
) -> None:
    groups = manifests[distribution]["project"]["entry-points"]
    plugins = {distribution.removeprefix("fabric_"): f"{distribution}.hooks"}
    kit = {"pytest11": {"fabric-conformance": "fabric_core.testing.plugin"}}
    assert groups == {"fabric_core.plugins": plugins} | (kit if distribution == "fabric_core" else {})
    assert (root / distribution / "src" / distribution / "hooks.py").is_file()


def test_everything_that_is_installed_by_name_is_pinned(
    manifests: dict[str, dict[str, Any]], settings: dict[str, Any], root: Path
) -> None:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([clause.operator for clause in pin.specifier] == ["=="] for pin in pins)
    assert "torch==2.13.0" in lines

    wanted = {Requirement(text).name for group in settings["dependency-groups"].values() for text in group}
    for manifest in manifests.values():
        wanted |= {name for name in requirements(manifest["project"]) if not name.startswith("fabric-")}
    assert wanted == {pin.name for pin in pins}


def test_every_pip_install_that_we_run_is_constrained(root: Path) -> None:
    scripts = [root / "Makefile", root / ".ci" / "run", *(root / ".github" / "workflows").iterdir()]
    lines = [line for script in scripts for line in script.read_text(encoding="utf-8").splitlines()]
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert [line for line in installs if "constraints.txt" not in line] == []


def test_continuous_integration_runs_commands_that_exist(root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = re.findall(r"^make (.+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    called = {word for command in commands for word in command.split() if not word.startswith("-")}
    assert {"check", "test"} <= called <= targets
    workflow = (root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert ".ci/run" in workflow
    assert set(re.findall(r"run: make ([a-z-]+)", workflow)) <= targets


def test_the_readme_opens_with_the_two_commands(root: Path) -> None:
    first_screen = (root / "README.md").read_text(encoding="utf-8").splitlines()[:20]
    assert [line.split("  ")[0] for line in first_screen if line.startswith("make ")] == [
        "make demo",
        "make test",
    ]


def test_the_next_changelog_has_something_to_say(
    root: Path, settings: dict[str, Any], manifests: dict[str, dict[str, Any]]
) -> None:
    types = {entry["directory"] for entry in settings["tool"]["towncrier"]["type"]}
    fragments = [path for path in (root / "changelog.d").iterdir() if path.name != "README.md"]
    misnamed = [
        path.name for path in fragments if not re.fullmatch(rf".+\.({'|'.join(types)})\.md", path.name)
    ]
    assert misnamed == []
    assert [path.name for path in fragments if not path.read_text(encoding="utf-8").strip()] == []

    version = manifests["fabric_core"]["project"]["version"]
    assert fragments or f"## {version} " in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_test_folders_are_no_packages_and_hide_none(root: Path) -> None:
    tests = list((root / "tests").rglob("*"))
    assert [path for path in tests if path.name == "__init__.py"] == []
    assert [
        path
        for path in tests
        if any(part.startswith("fabric_") for part in path.relative_to(root).parent.parts)
    ] == []

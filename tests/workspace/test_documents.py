"""What the documents say is true: their links lead somewhere and their code runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(?:# (\S+)\n)?(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="session")
def documents(files: list[Path]) -> dict[Path, str]:
    """The text of every Markdown file of the repository."""
    return {path: path.read_text(encoding="utf-8") for path in files if path.suffix == ".md"}


def named_blocks(document: Path) -> dict[str, str]:
    """The code blocks of a document that begin with a comment which names a file, by that name."""
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return {name: code for _, name, code in found if name}


def run(*arguments: str | Path, cwd: Path, **variables: str) -> str:
    """Run this Python on some arguments and give back what it printed; warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_links_between_documents_lead_somewhere(documents: dict[Path, str], root: Path) -> None:
    links = [(path, target) for path, text in documents.items() for target in LINK.findall(text)]
    assert len(links) > 10
    broken = [
        f"{path.relative_to(root)} -> {target}"
        for path, target in links
        if not re.match(r"[a-z]+:|#", target) and not (path.parent / target.partition("#")[0]).exists()
    ]
    assert broken == []


def test_the_python_in_the_documents_is_python(documents: dict[Path, str]) -> None:
    blocks = [
        (path, code)
        for path, text in documents.items()
        for language, _, code in BLOCK.findall(text)
        if language == "python"
    ]
    assert len(blocks) >= 4
    for path, code in blocks:
        ast.parse(code, filename=str(path))


def test_the_commands_in_the_documents_exist(documents: dict[Path, str], root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    written = {
        name
        for text in documents.values()
        for name in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text, re.MULTILINE)
    }
    named = {first or second for first, second in written}
    assert {"demo", "test"} <= named <= targets


def programs() -> list[tuple[str, str]]:
    """The pages of the documentation, and the names of their blocks that are whole programs."""
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    return [
        (page.name, name)
        for page in pages
        for name in named_blocks(page)
        if name.endswith(".py") and "/" not in name
    ]


@pytest.mark.parametrize(("page", "name"), programs())
def test_the_programs_of_the_documentation_run(page: str, name: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(named_blocks(root / "docs" / page)[name], encoding="utf-8")
    assert run(name, cwd=tmp_path).strip()


def test_the_example_of_the_readme_trains(root: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(named_blocks(root / "README.md")["train.py"], encoding="utf-8")
    printed = run("train.py", cwd=tmp_path)
    assert re.fullmatch(r"loss 0\.\d{4} on 1 process\(es\)\n", printed)


def test_the_resumable_example_of_the_readme_ends_the_same_after_it_was_killed(
    root: Path, tmp_path: Path
) -> None:
    code = named_blocks(root / "README.md")["resumable.py"]
    due = "checkpoints.save_if_due("
    assert due in code
    ends = {
        "whole": code,
        "killed": code.replace(due, f"state['step'] == 17 and __import__('os')._exit(9)\n            {due}"),
    }
    printed = {}
    for name, first in ends.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "first.py").write_text(first, encoding="utf-8")
        (folder / "resumable.py").write_text(code, encoding="utf-8")
        if name == "killed":
            assert subprocess.run([sys.executable, "first.py"], cwd=folder, timeout=100).returncode == 9
            assert any((folder / "checkpoints").iterdir())
        printed[name] = run("resumable.py", cwd=folder)
    assert re.fullmatch(r"32 steps, weights -?\d\.\d{9}\n", printed["whole"])
    assert printed["killed"] == printed["whole"]


def test_the_first_example_of_the_core_runs(root: Path, tmp_path: Path) -> None:
    page = (root / "fabric_core" / "README.md").read_text(encoding="utf-8")
    code = next(code for language, _, code in BLOCK.findall(page) if language == "python")
    run("-c", code, cwd=tmp_path)


def test_the_plugin_of_the_readme_is_found_and_chosen(root: Path, tmp_path: Path) -> None:
    blocks = named_blocks(root / "README.md")
    package = tmp_path / "acme_fabric"
    metadata = tmp_path / "acme_fabric-1.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").touch()
    for name in ("hooks.py", "environment.py"):
        (package / name).write_text(blocks[f"acme_fabric/{name}"], encoding="utf-8")
    entry_points = re.sub(r"\[project\.entry-points\.\"(.+)\"\]", r"[\1]", blocks["pyproject.toml"])
    (metadata / "entry_points.txt").write_text(entry_points.replace('"', ""), encoding="utf-8")
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: acme-fabric\nVersion: 1.0\n", encoding="utf-8"
    )

    job = {"ACME_JOB": "7", "ACME_NODES": "2", "ACME_NODE": "1", "ACME_FIRST_NODE": "node0"}
    search = {"PYTHONPATH": str(tmp_path)}
    assert '"acme"' in run("-m", "fabric_core", "plugins", "list", "--json", cwd=tmp_path, **search)
    plan = run("-m", "fabric_core", "explain", "--accelerator=cpu", cwd=tmp_path, **search, **job)
    assert "acme" in plan
    assert "ACME_JOB is set" in plan

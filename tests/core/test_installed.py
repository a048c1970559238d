"""What is installed is found as the standard library finds it, wherever it lies."""

from __future__ import annotations

import os
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fabric_core.registry import installed

METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n"


def install(
    folder: Path, name: str, version: str = "1", kind: str = "dist-info", file: str = "METADATA"
) -> None:
    info = folder / f"{name}-{version}.{kind}"
    info.mkdir(parents=True)
    (info / file).write_text(METADATA.format(name, version))
    (info / "entry_points.txt").write_text(f"[some.group]\n{name} = {name}\n")


def found() -> list[tuple[str, str | None]]:
    """Where each is, and its entry points."""
    return [
        (installed.folder_of(each), each.read_text("entry_points.txt")) for each in installed.distributions()
    ]


def told() -> list[tuple[str, str | None]]:
    """The same from the standard library."""
    everything: Any = metadata.distributions()
    return [(Path(each._path).name, each.read_text("entry_points.txt")) for each in everything]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the first on the import path."""
    monkeypatch.syspath_prepend(tmp_path / "place")
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def test_everything_here_is_found_in_the_same_order_and_with_the_same_text() -> None:
    assert len(found()) > 20
    assert sorted(found()) == sorted(told())
    assert {name for name, _ in found()[:1]} <= {name for name, _ in told()}


def test_what_is_installed_meanwhile_is_found(place: Path) -> None:
    before = found()
    install(place, "late")
    install(place, "Old_Style", kind="egg-info", file="PKG-INFO")
    (place / "a_file.egg-info").write_text(METADATA.format("a_file", "1"))
    assert sorted(set(found()) - set(before)) == sorted(set(told()) - set(before))
    assert {name for name, _ in found()[:3]} == {
        "late-1.dist-info",
        "Old_Style-1.egg-info",
        "a_file.egg-info",
    }


def test_a_name_is_compared_as_pip_does_and_the_first_on_the_path_counts(place: Path, tmp_path: Path) -> None:
    install(tmp_path / "later", "some_name", "2")
    sys.path.append(str(tmp_path / "later"))
    install(place, "some_name", "3")
    one = installed.distribution("Some.Name")
    assert one is not None
    assert "Version: 3" in (one.read_text("METADATA") or "")
    assert one.read_text("nothing.txt") is None
    assert installed.distribution("a-distribution-that-nobody-has") is None


def test_an_archive_on_the_path_is_searched(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("zipped-1.dist-info/METADATA", METADATA.format("zipped", "1"))
        archive.writestr("zipped-1.dist-info/entry_points.txt", "[g]\n")
    monkeypatch.syspath_prepend(tmp_path / "zipped.zip")
    assert ("zipped-1.dist-info", "[g]\n") in found()
    assert installed.distribution("zipped") is not None


def test_an_egg_on_the_path_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    egg = tmp_path / "laid-1.egg"
    (egg / "EGG-INFO").mkdir(parents=True)
    (egg / "EGG-INFO" / "PKG-INFO").write_text(METADATA.format("laid", "1"))
    monkeypatch.syspath_prepend(egg)
    assert "EGG-INFO" in {name for name, _ in found()}


def test_a_finder_of_somebody_elses_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(metadata.Distribution):
        def read_text(self, filename: str) -> str:
            return f"{filename} of theirs"

        def locate_file(self, path: Any) -> Any:
            return path

    class Finder:
        @staticmethod
        def find_spec(*_: Any) -> None:
            return None

        @staticmethod
        def find_distributions(context: Any = None) -> list[metadata.Distribution]:
            return [Theirs()]

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert ("unknown", "entry_points.txt of theirs") in found()


def test_what_is_no_text_on_the_path_holds_nothing_as_for_imports(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(place, "there")
    before = found()
    monkeypatch.setattr(sys, "path", [place, None, *sys.path])
    assert found() == before
    assert installed.distribution("there") is not None


def test_a_folder_that_is_gone_or_forbidden_holds_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(place / "gone"))
    before = found()
    (place / "odd-1.dist-info").mkdir()
    (place / "odd-1.dist-info" / "entry_points.txt").mkdir()
    assert set(found()) - set(before) == {("odd-1.dist-info", None)}
    os.rmdir(place / "odd-1.dist-info" / "entry_points.txt")

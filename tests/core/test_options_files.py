"""Options in ``fabric.toml`` and ``pyproject.toml``: which file decides, what it may hold, and what it costs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fabric_core import ConfigurationError, Fabric
from fabric_core.settings import find_tables

if TYPE_CHECKING:
    from conftest import Run


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def found(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What is found from a folder on, by kind and name."""
    return {(table.kind, table.name): dict(table.values) for table in find_tables(str(folder))}


# -- which file -------------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_there_is_no_file(tmp_path: Path) -> None:
    assert find_tables(str(tmp_path)) == ()


def test_a_file_speaks_of_parts_by_kind_and_name(tmp_path: Path) -> None:
    text = """
[strategy.Deepspeed]
stage = 3
offload-optimizer = true
config = { "zero-x" = [1, 2] }
[precision.16-mixed]
scaler = { init_scale = 1024 }
[cluster-environment.slurm]
requeue_grace = 1.5
[checkpoint_io.torch_file]
[logger.csv]
root_dir = "runs"
"""
    path = write(tmp_path / "fabric.toml", text)
    assert found(tmp_path) == {
        ("strategy", "deepspeed"): {"stage": 3, "offload_optimizer": True, "config": {"zero-x": [1, 2]}},
        ("precision", "16-mixed"): {"scaler": {"init_scale": 1024}},
        ("cluster environment", "slurm"): {"requeue_grace": 1.5},
        ("checkpoint io", "torch_file"): {},
        ("logger", "csv"): {"root_dir": "runs"},
    }
    assert find_tables(str(tmp_path))[0].source == f"[strategy.Deepspeed] in {path}"


def test_a_projects_file_speaks_of_them_under_a_table_of_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "pyproject.toml", "[project]\nname='x'\n[tool.fabric.strategy.ddp]\nlevel = 1\n")
    (table,) = find_tables(str(tmp_path))
    assert (table.kind, table.name, table.values) == ("strategy", "ddp", {"level": 1})
    assert table.source == f"[tool.fabric.strategy.ddp] in {path}"


@pytest.mark.parametrize(
    "text",
    [
        "[tool.fabric]\nstrategy.x = { level = 1 }",
        "[tool.'fabric'.strategy.x]\nlevel = 1",
        '[ tool . "fabric" . strategy . x ]\nlevel = 1',
        "[tool]\nfabric.strategy.x.level = 1",
        "[tool]\n  fabric = { strategy = { x = { level = 1 } } }",
        "tool.fabric.strategy.x.level = 1",
        "tool = {fabric.strategy.x.level = 1}",
        "tool = {other = 1, fabric = {strategy = {x = {level = 1}}}}",
    ],
)
def test_the_table_is_found_however_it_is_written(tmp_path: Path, text: str) -> None:
    write(tmp_path / "pyproject.toml", text)
    assert found(tmp_path) == {("strategy", "x"): {"level": 1}}


def test_the_nearest_folder_decides_and_in_a_folder_the_file_of_ours(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    level = "[strategy.x]\nlevel = {}\n"
    write(tmp_path / "fabric.toml", level.format(1))
    assert found(deep) == {("strategy", "x"): {"level": 1}}
    write(tmp_path / "a" / "pyproject.toml", "[tool.fabric.strategy.x]\nlevel = 2\n")
    assert found(deep) == {("strategy", "x"): {"level": 2}}
    write(tmp_path / "a" / "fabric.toml", level.format(3))
    assert found(deep) == {("strategy", "x"): {"level": 3}}
    write(deep / "pyproject.toml", "[tool.other]\nfabric = 'a word'\n[tool.ruff]\n")
    assert found(deep) == {("strategy", "x"): {"level": 3}}, (
        "a project that does not speak of us decides nothing"
    )
    write(deep / "fabric.toml", "")
    assert found(deep) == {}, "an empty file decides that there is nothing"
    (tmp_path / "a" / "b" / "fabric.toml").mkdir()
    assert found(deep.parent) == {("strategy", "x"): {"level": 3}}, "a folder is no file"


def test_a_file_that_changes_is_read_again_and_one_that_does_not_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "fabric.toml", "[strategy.x]\nlevel = 1\n")
    first = find_tables(str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", None)
        assert find_tables(str(tmp_path)) is first
    path.write_text("[strategy.x]\nlevel = 22\n")
    assert found(tmp_path) == {("strategy", "x"): {"level": 22}}
    path.unlink()
    assert found(tmp_path) == {}


def test_without_a_current_folder_there_is_no_file(python: Run, tmp_path: Path) -> None:
    code = f"""
import os
os.makedirs(gone := {str(tmp_path / "gone")!r}); os.chdir(gone); os.rmdir(gone)
from fabric_core.settings import find_tables
print(find_tables())
"""
    ended = python("-c", code)
    assert (ended.returncode, ended.stdout) == (0, "()\n"), ended.stderr


# -- what is wrong ----------------------------------------------------------------------------------------------------


def test_broken_toml_is_one_error_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "fabric.toml", "[strategy.x]\nlevel = 1\nmode = fast\n")
    with pytest.raises(ConfigurationError, match=r"line 3, column 8") as caught:
        find_tables(str(tmp_path))
    assert str(caught.value).startswith(f"{path} is no valid TOML: ")
    with pytest.raises(ConfigurationError, match="line 3"):
        find_tables(str(tmp_path))


def test_a_broken_file_of_a_project_that_is_none_of_our_business_stops_nobody(tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", "[tool.other\n")
    assert find_tables(str(tmp_path)) == ()
    write(tmp_path / "pyproject.toml", "[tool.fabric\n")
    with pytest.raises(ConfigurationError, match=r"pyproject\.toml is no valid TOML"):
        find_tables(str(tmp_path))


def test_what_is_no_text_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "fabric.toml").write_bytes(b"[strategy.x]\nname = '\xff'\n")
    with pytest.raises(ConfigurationError, match=r"fabric\.toml is no valid TOML: .*utf-8"):
        find_tables(str(tmp_path))


def test_a_file_that_may_not_be_read_is_an_error_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path / "fabric.toml", "")
    monkeypatch.setattr(Path, "read_bytes", refuse)  # where tests run as root, no file refuses by itself
    with pytest.raises(ConfigurationError, match=r"fabric\.toml cannot be read: Permission denied"):
        find_tables(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[strategi.x]\nlevel = 1",
            r"has strategi, but there is no kind 'strategi'\. Did you mean 'strategy'\?",
        ),
        (
            "[checkpoint-ios.x]",
            r"Did you mean 'checkpoint-io'\? Kinds: accelerator, strategy, .*checkpoint-io",
        ),
        (
            "strategy = 'ddp'",
            r"has strategy = 'ddp'\. Options stand in a table of their part, such as \[strat",
        ),
        ("[strategy]\nstage = 3", r"has strategy\.stage = 3\. Options stand in a table"),
    ],
)
def test_what_is_no_table_of_options_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "fabric.toml", text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        find_tables(str(tmp_path))
    assert str(caught.value).startswith(str(path))
    path.unlink()
    write(tmp_path / "pyproject.toml", f"[tool.fabric]\n{text}".replace("\n[", "\n[tool.fabric."))
    with pytest.raises(ConfigurationError):
        find_tables(str(tmp_path))


# -- a Fabric ---------------------------------------------------------------------------------------------------------


def test_a_fabric_reads_the_file_and_its_plan_says_so(
    core_alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(
        tmp_path / "fabric.toml", "[strategy.many]\nlevel = 1\n[strategy.single_device]\nlevel = 1\n"
    )
    with pytest.raises(ConfigurationError) as caught:
        Fabric()
    assert str(caught.value) == (
        f"The strategy 'single_device' has no option 'level', which [strategy.single_device] in {path} states. "
        "It has: none."
    )
    path.write_text("[strategy.many]\nlevel = 1\n")
    assert Fabric().plan.strategy.options == {}
    path.write_text("[strategy.many\n")
    with pytest.raises(ConfigurationError, match="no valid TOML"):
        Fabric()


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_where_there_is_no_file_nothing_is_imported_to_read_one(python: Run) -> None:
    code = "import fabric_core.fabric, fabric_core.settings, sys; fabric_core.settings.find_tables()"
    code += "; print({'tomllib', 'tomli'} & set(sys.modules) or 'none')"
    ended = python("-c", code)
    assert (ended.returncode, ended.stdout) == (0, "none\n"), ended.stderr


def test_looking_for_a_file_takes_less_than_a_millisecond(tmp_path: Path, least: Any) -> None:
    folder = tmp_path.joinpath(*"abcdefghij")
    folder.mkdir(parents=True)
    write(tmp_path / "fabric.toml", "[strategy.x]\nlevel = 1\n" * 1)
    assert found(folder)

    def seconds() -> float:
        start = time.perf_counter()
        find_tables(str(folder))
        return time.perf_counter() - start

    assert least(seconds, 0.001) < 0.001

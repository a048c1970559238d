"""``fabric plugins new``: what it writes, what it refuses, and that a failure leaves nothing behind."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import errno
import importlib
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fabric_core
from fabric_core import ConfigurationError, Strategy
from fabric_core.contracts.part import Part
from fabric_core.scaffold import Made, make_plugin
from fabric_core.scaffold.kinds import WORDS, kind_named
from fabric_core.scaffold.terms import licences
from fabric_core.targets import import_target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from conftest import Run, Shelf, Site

ROOT = Path(__file__).parents[2]
CONTRACTS = (
    "Accelerator",
    "Strategy",
    "Precision",
    "ClusterEnvironment",
    "Launcher",
    "CheckpointIO",
    "Logger",
)
WITH_OPTIONS = {"strategy", "cluster-environment", "launcher", "checkpoint-io", "logger"}
EVERYWHERE = {
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore", ".github/workflows/test.yml"),
    *("src/fabric_acme/__init__.py", "src/fabric_acme/hooks.py", "src/fabric_acme/py.typed"),
    "tests/test_conformance.py",
}


@pytest.fixture
def make(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a plugin in the test's folder, where nothing is installed but the core."""
    monkeypatch.chdir(tmp_path)

    def made(kind: str = "strategy", name: str = "acme", **more: Any) -> Made:
        return make_plugin(kind, name, shelf, **more)

    return made


@pytest.fixture
def importable(make: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make a plugin, and put it on the import path; gives its spec."""

    def spec_of(kind: str) -> Any:
        made = make(kind)
        monkeypatch.syspath_prepend(str(made.folder / "src"))
        return importlib.import_module(f"{made.names.package}.hooks").SPEC

    yield spec_of
    for name in [name for name in sys.modules if name.partition(".")[0] == "fabric_acme"]:
        del sys.modules[name]


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# -- what is made ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WORDS)
def test_a_new_plugin_has_every_file_of_a_distribution(make: Any, kind: str) -> None:
    made = make(kind)
    files = {path.relative_to(made.folder).as_posix() for path in made.folder.rglob("*") if path.is_file()}
    assert files == {path.as_posix() for path in made.files}
    assert files >= EVERYWHERE | {made.implementation.as_posix()}
    assert ("src/fabric_acme/options.py" in files) == (kind in WITH_OPTIONS)


@pytest.mark.parametrize("kind", WORDS)
def test_every_placeholder_is_filled_in(make: Any, kind: str) -> None:
    for path in make(kind).folder.rglob("*"):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        assert "$" not in text.replace("${{ matrix.python }}", ""), path
        if path.suffix == ".py":
            tree = ast.parse(text)
            assert ast.get_docstring(tree), f"{path} has no docstring"


@pytest.mark.parametrize("kind", WORDS)
def test_the_manifest_says_what_an_index_and_pip_want_to_know(make: Any, kind: str) -> None:
    manifest = tomllib.loads((make(kind).folder / "pyproject.toml").read_text(encoding="utf-8"))
    project = manifest["project"]
    assert (project["name"], project["readme"], project["license"]) == (
        "fabric-acme",
        "README.md",
        "Apache-2.0",
    )
    assert project["entry-points"] == {"fabric_core.plugins": {"acme": "fabric_acme.hooks"}}
    assert project["optional-dependencies"] == {"test": ["fabric-core[testing]"]}
    needed = {Requirement(text).name: Requirement(text).specifier for text in project["dependencies"]}
    assert str(needed["fabric-core"]) == f">={fabric_core.__version__}", (
        "a lower bound, and never an upper one"
    )
    assert all(clause.operator == ">=" for specifier in needed.values() for clause in specifier)


@pytest.mark.parametrize("kind", WORDS)
def test_a_new_plugin_requires_torch_if_its_modules_import_it(make: Any, kind: str) -> None:
    made = make(kind)
    imported = {
        name.partition(".")[0]
        for path in (made.folder / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    project = tomllib.loads((made.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {Requirement(text).name.replace("-", "_") for text in project["dependencies"]}
    assert imported - set(sys.stdlib_module_names) - {"fabric_acme"} == required


# -- every method of the contract ------------------------------------------------------------------------------------


def members(contract: type) -> dict[str, Any]:
    """What a contract has, and its base: methods, properties and attributes with a default."""
    bases = contract.__mro__[: contract.__mro__.index(Part) + 1]
    found: dict[str, Any] = {}
    for base in bases:
        for name, member in vars(base).items():
            if not name.startswith("_") and name != "spec_type":
                found.setdefault(name, member)
    return found


def unstated(contract: type, cls: type) -> list[str]:
    """What of a contract a class does not state itself, or states with other arguments, or without a docstring."""
    own, wrong = vars(cls), []
    for name, member in members(contract).items():
        stated = own.get(name)
        method = inspect.isfunction(member) or isinstance(member, property)
        if name not in own or (method and type(stated) is not type(member)):
            wrong.append(name)
        elif inspect.isfunction(member) and not alike(member, stated):
            wrong.append(f"{name}: other arguments")
        elif method and not str(stated.__doc__ or "").strip():
            wrong.append(f"{name}: no docstring")
    return wrong


def alike(one: Any, other: Any) -> bool:
    """Whether two functions take the same arguments. Launchers end the program, so that results may differ."""
    arguments = [
        [(p.name, p.kind, p.default, p.annotation) for p in inspect.signature(each).parameters.values()]
        for each in (one, other)
    ]
    return arguments[0] == arguments[1]


@pytest.mark.parametrize(("kind", "contract"), list(zip(WORDS, CONTRACTS, strict=True)))
def test_the_implementation_states_every_method_of_its_contract(
    importable: Any, kind: str, contract: str
) -> None:
    cls = import_target(importable(kind).target, kind)
    assert len(members(getattr(fabric_core, contract))) > 2
    assert unstated(getattr(fabric_core, contract), cls) == []


def test_a_method_that_a_contract_gains_is_missed(importable: Any) -> None:
    class Grown(Strategy):
        grown_attribute = False

        def grown(self, more: int) -> None:
            """New."""

        @property
        def grown_property(self) -> int:
            """New."""
            return 1

        def barrier(self, name: str | None = None, more: int = 0) -> None:
            """With an argument more."""

    cls = import_target(importable("strategy").target, "strategy")
    assert unstated(Grown, cls) == ["grown_attribute", "grown", "grown_property", "barrier: other arguments"]


@pytest.mark.parametrize("kind", sorted(WITH_OPTIONS))
def test_options_are_the_keywords_of_the_constructor_with_their_defaults(importable: Any, kind: str) -> None:
    spec = importable(kind)
    options = import_target(spec.options_type, kind)
    keywords = inspect.signature(import_target(spec.target, kind)).parameters
    assert {f.name: f.default for f in dataclasses.fields(options)} == {
        p.name: p.default for p in keywords.values()
    }
    for name in keywords:
        assert re.search(rf"\b{name}\b", inspect.getdoc(options) or ""), f"{name} is not explained"


@pytest.mark.parametrize("kind", WORDS)
def test_a_spec_states_the_version_of_the_contract_and_is_carried_by_its_class(
    importable: Any, kind: str
) -> None:
    from fabric_core.contract_versions import CURRENT

    spec = importable(kind)
    assert (spec.name, spec.kind, spec.api) == ("acme", kind.replace("-", " "), CURRENT[spec.kind])
    assert vars(import_target(spec.target, kind))["spec"] is spec


# -- what authors and their users see --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WORDS)
def test_the_check_for_authors_finds_nothing(fabric: Run, make: Any, kind: str) -> None:
    ended = fabric("plugins", "check", str(make(kind).folder), "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert '"findings": []' in ended.stdout


def test_the_check_for_authors_looks_at_what_was_made(fabric: Run, make: Any) -> None:
    made = make("logger")
    (made.folder / made.implementation).unlink()
    ended = fabric("plugins", "check", str(made.folder))
    assert ended.returncode == 1
    assert "logger" in ended.stdout


def test_the_command_says_what_was_made_and_what_to_do_next(fabric: Run, tmp_path: Path) -> None:
    place = "src/fabric_acme_cluster/environment.py"
    ended = fabric("plugins", "new", "cluster-environment", "Acme_Cluster")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        "The name is written 'acme-cluster', as names of distributions are compared.",
        "Made fabric-acme-cluster in ./fabric-acme-cluster: 12 files.",
        f"The cluster environment 'acme-cluster' is the class AcmeClusterEnvironment in {place}.",
        "Next:",
        "    pip install -e './fabric-acme-cluster[test]'",
        "    pytest ./fabric-acme-cluster",
        "    fabric plugins check ./fabric-acme-cluster",
    ]
    assert everything_in(tmp_path)[0] == "fabric-acme-cluster"


def test_the_command_quotes_what_a_shell_would_take_apart(fabric: Run, tmp_path: Path) -> None:
    ended = fabric("plugins", "new", "logger", "acme", "--dir", "my plugins/the first")
    assert "    pytest './my plugins/the first'" in ended.stdout.splitlines()
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    assert (
        f"    pytest {elsewhere}"
        in fabric("plugins", "new", "logger", "acme", "--dir", str(elsewhere)).stdout
    )


def test_the_command_imports_no_torch(python: Run, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fabric_core.cli import main\n"
        "try: main(['plugins', 'new', 'strategy', 'acme'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    ended = python("-c", code)
    assert ended.stdout.splitlines()[-1] == "0 False", ended.stderr
    assert (tmp_path / "fabric-acme").is_dir()


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "distribution", "package"),
    [
        ("acme", "fabric-acme", "fabric_acme"),
        ("fabric-acme", "fabric-acme", "fabric_acme"),
        ("Fabric_Acme.Cluster", "fabric-acme-cluster", "fabric_acme_cluster"),
        ("a1", "fabric-a1", "fabric_a1"),
        ("x", "fabric-x", "fabric_x"),
        ("a" * 32, f"fabric-{'a' * 32}", f"fabric_{'a' * 32}"),
    ],
)
def test_a_name_gives_all_the_others(make: Any, asked: str, distribution: str, package: str) -> None:
    made = make("logger", asked)
    assert (made.names.distribution, made.names.package) == (distribution, package)
    assert made.folder.name == distribution == canonicalize_name(distribution)
    assert (made.folder / "src" / package / "hooks.py").is_file()


@pytest.mark.parametrize(
    ("kind", "asked", "cls"),
    [
        ("cluster-environment", "acme", "AcmeEnvironment"),
        ("checkpoint-io", "acme-checkpoint-io", "AcmeCheckpointIO"),
        ("logger", "acme-logger", "AcmeLogger"),
        ("logger", "logger", "OwnLogger"),
        ("cluster-environment", "cluster", "OwnClusterEnvironment"),
        ("strategy", "a-1-b", "A1BStrategy"),
    ],
)
def test_a_class_is_named_after_the_part_and_never_as_its_contract(
    make: Any, kind: str, asked: str, cls: str
) -> None:
    made = make(kind, asked)
    assert made.names.class_name == cls
    assert f"\nclass {cls}(" in (made.folder / made.implementation).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("two words", "letters a to z"),
        ("", "letters a to z"),
        ("fabric-", "letters a to z"),
        ("1st", "begins with a letter"),
        ("größe", "letters a to z"),
        ("a/b", "letters a to z"),
        ("../acme", "letters a to z"),
        ("acme-", "letters a to z"),
        ("-acme", "letters a to z"),
        ("acme==1", "letters a to z"),
        ("a" * 33, "at most 32"),
        ("class", "a word of Python.*'acme-class'"),
        ("match", "a word of Python"),
        ("auto", "a word of the command line"),
        ("core", "fabric-core .* is installed here already"),
        ("fabric_core", "fabric-core .* is installed here already"),
    ],
)
def test_a_name_that_cannot_be_had_is_refused(make: Any, tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        make("strategy", name)
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "name", "taken"),
    [("strategy", "acme", True), ("strategy", "nickname", True), ("precision", "acme", False)],
)
def test_a_name_that_an_installed_part_of_the_kind_has_is_refused(
    shelf: Shelf, make: Any, tmp_path: Path, kind: str, name: str, taken: bool
) -> None:
    shelf.put("rival", fabric_core.StrategySpec("Acme", "rival.part:Class", aliases=("nickname",)))
    if not taken:
        assert make(kind, name)
        return
    with pytest.raises(ConfigurationError, match=f"The strategy '{name}' is there already, from rival 1"):
        make(kind, name)
    assert everything_in(tmp_path) == []


def test_the_name_of_a_group_of_accelerators_is_refused(shelf: Shelf, make: Any) -> None:
    shelf.put(
        "rival",
        fabric_core.AcceleratorSpec("rival", "rival.part:Class", probe="rival:probe", groups=("gadget",)),
    )
    with pytest.raises(ConfigurationError, match="The accelerator 'gadget' is there already, from rival 1"):
        make("accelerator", "gadget")


def test_the_name_of_an_installed_distribution_is_refused(site: Site, make: Any) -> None:
    site.install("fabric-taken", version="3.1")
    with pytest.raises(ConfigurationError, match=r"fabric-taken 3\.1 is installed here already"):
        make("logger", "taken")


def test_the_name_of_an_installed_package_is_refused_and_that_of_a_mere_folder_is_not(
    site: Site, make: Any
) -> None:
    (site.folder / "fabric_folder").mkdir()
    assert make("logger", "folder")
    package = site.folder / "fabric_package"
    package.mkdir()
    (package / "__init__.py").touch()
    with pytest.raises(ConfigurationError, match="a package fabric_package is installed here already"):
        make("logger", "package")


@pytest.mark.parametrize("text", ["cluster-environment", "cluster environment", "Cluster_Environment"])
def test_the_words_of_a_kind_are_joined_in_any_way(text: str) -> None:
    assert kind_named(text).name == "cluster environment"


def test_an_unknown_kind_is_told_with_the_nearest_and_all(fabric: Run, tmp_path: Path) -> None:
    ended = fabric("plugins", "new", "stratgy", "acme")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "fabric: There is no kind 'stratgy'. Did you mean 'strategy'? Kinds: accelerator, strategy, precision, "
        "cluster-environment, launcher, checkpoint-io, logger.\n"
    )
    assert everything_in(tmp_path) == []


# -- licences and authors --------------------------------------------------------------------------------------------


def test_the_licence_is_the_whole_text_of_apache_unless_another_is_asked_for(make: Any) -> None:
    text = (make(author="Ada").folder / "LICENSE").read_text(encoding="utf-8")
    ours = (ROOT / "LICENSE").read_text(encoding="utf-8")
    year = datetime.date.today().year
    assert text == ours.replace("Copyright [yyyy] [name of copyright owner]", f"Copyright {year} Ada") != ours
    assert licences() == ["Apache-2.0", "BSD-3-Clause", "MIT"]
    made = make("logger", "other", licence="mit", author="Ada Lovelace <ada@example.org>")
    assert re.search(
        r"^Copyright \(c\) \d{4} Ada Lovelace$", (made.folder / "LICENSE").read_text(), re.MULTILINE
    )
    project = tomllib.loads((made.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "MIT"
    assert project["authors"] == [{"name": "Ada Lovelace", "email": "ada@example.org"}]


@pytest.mark.parametrize("author", ['Ada "the" \\ Löv€lace', "O'Brien, Flann", "日本 $name ${x}", "😀"])
def test_an_author_may_have_any_name(make: Any, author: str) -> None:
    made = make("logger", author=author, licence="MIT")
    project = tomllib.loads((made.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["authors"] == [{"name": author}]
    assert author in (made.folder / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"author": ""}, "There cannot be an author ''"),
        ({"author": "two\nlines"}, "There cannot be an author"),
        ({"author": "Ada <nowhere>"}, "There cannot be an author"),
        ({"author": "<ada@example.org>"}, "There cannot be an author"),
        ({"licence": "MIT-0"}, "Did you mean 'mit'.*There are: Apache-2.0, BSD-3-Clause, MIT"),
        ({"licence": "../LICENSE"}, "There is no text of a licence"),
    ],
)
def test_an_author_or_licence_that_cannot_be_is_refused(
    make: Any, tmp_path: Path, more: dict[str, str], why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        make(**more)
    assert everything_in(tmp_path) == []


# -- where it goes ---------------------------------------------------------------------------------------------------


def test_nothing_is_ever_overwritten(fabric: Run, tmp_path: Path) -> None:
    (tmp_path / "fabric-acme").mkdir()
    (tmp_path / "fabric-acme" / "mine.txt").write_text("mine")
    ended = fabric("plugins", "new", "strategy", "acme")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "is not empty: it has 'mine.txt'. Nothing is ever overwritten" in ended.stderr
    assert everything_in(tmp_path) == ["fabric-acme", "fabric-acme/mine.txt"]
    assert (tmp_path / "fabric-acme" / "mine.txt").read_text() == "mine"


def test_an_empty_folder_is_filled_also_the_one_where_one_stands(make: Any, tmp_path: Path) -> None:
    made = make(folder=Path("."))
    assert made.folder == tmp_path
    assert make("logger", folder=Path("nowhere/../../elsewhere")).folder == tmp_path.parent / "elsewhere"
    assert {path.name for path in tmp_path.iterdir()} == {
        *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore", ".github", "src", "tests")
    }
    with pytest.raises(ConfigurationError, match="is not empty"):
        make(folder=Path("."))


def test_folders_above_it_are_made_and_all_are_as_accessible_as_any(make: Any, tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.mkdir()
    made = make(folder=Path("one/two/three"))
    for path in (made.folder, *made.folder.parents[:2], made.folder / "src"):
        assert path.stat().st_mode == usual.stat().st_mode, path
    assert everything_in(tmp_path)[:3] == ["one", "one/two", "one/two/three"]
    assert make("logger", folder=Path("one/two/four")).folder.is_dir()


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_file_in_the_way_is_a_clear_error(make: Any, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"file' is a file\. Choose another place with --dir"):
        make(folder=Path(place))
    assert (tmp_path / "file").read_text() == "mine"
    assert everything_in(tmp_path) == ["file"]


def test_a_link_that_leads_nowhere_is_not_written_through(make: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigurationError):
        make(folder=Path("link"))
    assert everything_in(tmp_path) == ["link"]


@pytest.mark.skipif(os.name == "nt", reason="folders have other rights there")
@pytest.mark.parametrize("mode", [0o555, 0o000])
@pytest.mark.parametrize("place", [".", "new", "new/below"])
def test_a_folder_without_the_right_to_write_is_a_clear_error(make: Any, mode: int, place: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "guarded")
        os.chmod(name, 0o755)
        folder.mkdir()
        folder.chmod(mode)
        with as_somebody_else(), pytest.raises(ConfigurationError, match="Permission denied") as raised:
            make(folder=folder / place)
        assert "--dir" in str(raised.value)
        folder.chmod(0o755)
        assert everything_in(folder) == []


class as_somebody_else:
    """A context in which the rights of folders hold, which they do not for root."""

    def __enter__(self) -> None:
        self._was = os.geteuid()
        if self._was == 0:
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        os.seteuid(self._was)


@pytest.mark.parametrize("place", ["fabric-acme", "one/two", "empty"])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_failure_while_writing_leaves_nothing(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, after: int
) -> None:
    (tmp_path / "empty").mkdir()
    written, write_text = [], Path.write_text

    def write(self: Path, *args: Any, **kwargs: Any) -> int:
        if len(written) == after:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(self)
        return write_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(ConfigurationError, match=r"No space left on device\. Nothing was left there"):
        make(folder=Path(place))
    assert len(written) == after
    assert everything_in(tmp_path) == ["empty"]


@pytest.mark.parametrize("place", ["fabric-acme", "one/two", "empty"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failure_while_moving_leaves_nothing(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, after: int
) -> None:
    (tmp_path / "empty").mkdir()
    moved, rename = [], os.rename

    def fail_once(source: Any, target: Any) -> None:
        moved.append(target)
        if len(moved) == min(after, 0 if place != "empty" else after) + 1:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(ConfigurationError, match="Input/output error"):
        make(folder=Path(place))
    assert everything_in(tmp_path) == ["empty"]


def test_an_interrupt_leaves_nothing(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert everything_in(tmp_path) == []

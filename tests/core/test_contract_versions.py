"""Versions of contracts: what is spoken, how an old part is adapted, and a frozen plugin that goes on working."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fabric_core import ContractVersionError, Precision, PrecisionSpec, Registry, contract_versions
from fabric_core.build import make
from fabric_core.contract_versions import adapt_instance, adapted, check_spoken, is_spoken, oldest, spoken
from fabric_core.plan import Choice
from fabric_core.resolve.asked import choice_of_object, logger_choice
from fabric_core.specs import KINDS
from fabric_core.targets import import_target

if TYPE_CHECKING:
    from conftest import Run

FROZEN = Path(__file__).parent / "frozen"
KIND = "precision"

SHA256 = {
    "hooks.py": "2b84bdcf8a26a4e0e02e9dc0f3800d8d2c80118b93b06c3543c332a316fed770",
    "light.py": "e81c179c0aee3185f5b07fb84340c6417dc399bf2db7dff04a4b42f3f398a9a9",
    "parts.py": "ca501d6d54ce345750fcbadd521c30f4952d9cb365fc44c05f9769b2a37a1a4c",
}
"""What the frozen plugin is. Whoever has to change it to let the tests pass has broken the plugins of others."""

NOT_CALLED = {
    "FrozenFile.remove",
    "FrozenLog.log_hyperparams",
    "FrozenLog.teardown",
    "FrozenStrategy.scale_gradients",
}
"""Methods that a training on one process has no occasion to call."""


# -- the tables ------------------------------------------------------------------------------------------------------


class Old(Precision):
    """A precision of version 1; adapters add to its story."""

    story = ("old",)

    def __init__(self, bits: int = 8) -> None:
        self.bits = bits


def to_2(cls: Any) -> type:
    class Adapted(cls):  # type: ignore[misc]
        story = (*cls.story, "2")

    return Adapted


def to_3(cls: Any) -> type:
    class Adapted(cls):  # type: ignore[misc]
        story = (*cls.story, "3")

    return Adapted


@pytest.fixture
def version_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core whose precisions are of version 3, and which has adapters from version 1 on."""
    monkeypatch.setitem(contract_versions.CURRENT, KIND, 3)
    monkeypatch.setitem(contract_versions.ADAPTERS, (KIND, 1), f"{__name__}:to_2")
    monkeypatch.setitem(contract_versions.ADAPTERS, (KIND, 2), f"{__name__}:to_3")


def test_every_adapter_can_be_imported_and_leads_to_a_current_version() -> None:
    assert set(contract_versions.CURRENT) == set(KINDS)
    for (kind, version), target in contract_versions.ADAPTERS.items():
        assert callable(import_target(target, "a test"))
        assert oldest(kind) <= version < contract_versions.CURRENT[kind]


def test_the_oldest_version_is_the_one_from_which_adapters_lead_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (oldest(KIND), spoken(KIND)) == (1, "version 1")
    monkeypatch.setitem(contract_versions.CURRENT, KIND, 4)
    assert (oldest(KIND), spoken(KIND)) == (4, "version 4")
    monkeypatch.setitem(contract_versions.ADAPTERS, (KIND, 1), "a:b")
    assert oldest(KIND) == 4, "a step is missing between"
    monkeypatch.setitem(contract_versions.ADAPTERS, (KIND, 3), "a:b")
    assert (oldest(KIND), spoken(KIND)) == (3, "versions 3 to 4")
    assert [is_spoken(PrecisionSpec("x", "a:b", api=api)) for api in (1, 2, 3, 4, 5)] == [
        *(False, False, True, True, False)
    ]
    assert spoken("logger") == "version 1", "kinds are counted apart"


def test_a_part_that_is_newer_or_too_old_is_refused_with_both_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ContractVersionError) as newer:
        check_spoken(PrecisionSpec("x", "a:b", api=2), "x (from acme 9)")
    assert str(newer.value).startswith(
        "The precision x (from acme 9) is written for version 2 of its contract; this core, fabric-core "
    )
    assert str(newer.value).endswith(
        "speaks version 1. Upgrade the core (pip install --upgrade fabric-core), or use an older version of the part."
    )
    monkeypatch.setitem(contract_versions.CURRENT, KIND, 3)
    with pytest.raises(
        ContractVersionError, match=r"speaks version 3\. Use a newer version of the part, or an older"
    ):
        check_spoken(PrecisionSpec("x", "a:b", api=2), "x (from acme 9)")


# -- adapting --------------------------------------------------------------------------------------------------------


def test_a_class_of_the_current_version_stays_itself() -> None:
    assert adapted(Old, KIND, 1) is Old


@pytest.mark.usefixtures("version_3")
def test_a_class_goes_through_every_adapter_from_its_version_on() -> None:
    made: Any = adapted(Old, KIND, 1)
    assert made.story == ("old", "2", "3")
    assert issubclass(made, Old)
    assert (made.__name__, made.__module__, made.__qualname__) == ("Old", Old.__module__, "Old")
    assert adapted(Old, KIND, 1) is made
    later: Any = adapted(Old, KIND, 2)
    assert later.story == ("old", "3")
    assert adapted(Old, KIND, 3) is Old


@pytest.mark.usefixtures("version_3")
def test_an_adapted_part_travels_to_other_processes_and_can_be_copied() -> None:
    part = make(Choice(PrecisionSpec("old", Old), "acme", "1", "", options={"bits": 4}))
    assert (part.story, part.bits) == (("old", "2", "3"), 4)
    for other in (pickle.loads(pickle.dumps(part)), copy.deepcopy(part)):
        assert type(other) is type(part)
        assert other.bits == 4


@pytest.mark.usefixtures("version_3")
def test_an_instance_that_users_pass_is_adapted_by_the_version_that_its_class_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Old, "spec", PrecisionSpec("old", "a:b", api=2))
    mine = Old(bits=2)
    assert make(choice_of_object(KIND, mine)) is mine
    assert (mine.story, mine.bits) == (("old", "3"), 2)
    assert make(choice_of_object(KIND, mine)) is mine
    assert mine.story == ("old", "3"), "once is enough"


@pytest.mark.usefixtures("version_3")
def test_a_class_without_a_spec_is_taken_for_one_of_the_current_version() -> None:
    choice = choice_of_object(KIND, Old)
    assert choice.spec.api == 3
    assert type(make(choice)) is Old


def test_an_instance_that_cannot_be_adapted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slim:
        __slots__ = ("lines",)
        story = ()

        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

    monkeypatch.setitem(contract_versions.CURRENT, "logger", 2)
    monkeypatch.setitem(contract_versions.ADAPTERS, ("logger", 1), f"{__name__}:to_2")
    with pytest.raises(
        ContractVersionError, match=r"Slim is written for version 1 .* Pass the class, or its name"
    ):
        adapt_instance(Slim(), "logger", 1)


def test_what_merely_has_the_method_of_a_logger_is_of_the_current_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Duck:
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

    monkeypatch.setitem(contract_versions.CURRENT, "logger", 2)
    duck = Duck()
    assert make(logger_choice(duck, Registry(environ={}, find=list))) is duck


# -- the frozen plugin -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that finds the frozen plugin installed, and the programs that use it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(FROZEN / "version_1" / "frozen_one", folder / "frozen_one")
    (folder / "frozen_one" / "__init__.py").touch()
    info = folder / "frozen_one-1.0.dist-info"
    info.mkdir()
    requirements = "Requires-Dist: click\nRequires-Dist: fabric-core\nRequires-Dist: torch>=2.0\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: frozen-one\nVersion: 1.0\n{requirements}\n")
    (info / "entry_points.txt").write_text("[fabric_core.plugins]\nfrozen = frozen_one.hooks\n")
    return {"PYTHONPATH": f"{folder}:{FROZEN / 'programs'}", "OMP_NUM_THREADS": "1"}


def trained(python: Run, variables: dict[str, str]) -> dict[str, Any]:
    """What a training through the frozen plugin, and one beside it in plain PyTorch, came to."""
    ended = python("-W", "error", str(FROZEN / "programs" / "train_frozen.py"), env=variables)
    assert ended.returncode == 0, ended.stderr
    both = json.loads(ended.stdout)
    found: dict[str, Any] = both["frozen"]
    assert (found["losses"], found["weights"]) == (both["plain"]["losses"], both["plain"]["weights"])
    assert (found["restored"], found["rest"], found["told"]) == (True, {"epoch": 7}, [4, [[1.0]], 1.0])
    assert (found["dtype"], found["elsewhere"]) == ("torch.float64", True)
    return found


def test_the_frozen_plugin_is_as_it_was() -> None:
    files = sorted((FROZEN / "version_1").rglob("*.py"))
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files} == SHA256


def test_the_frozen_plugin_trains_through_a_part_of_every_kind(
    python: Run, installed: dict[str, str], tmp_path: Path
) -> None:
    found = trained(python, installed)
    assert set(found["plan"]) == set(KINDS)
    assert {identity.partition(" ")[2] for identity in found["plan"].values()} == {"(from frozen-one 1.0)"}
    lines = [json.loads(line) for line in (tmp_path / "frozen.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [4, 6, None]
    assert lines[-1] == {"status": "success"}

    tree = ast.parse((FROZEN / "version_1" / "frozen_one" / "parts.py").read_text())
    noted = {
        f"{cls.name}.{method.name}"
        for cls in tree.body
        if isinstance(cls, ast.ClassDef)
        for method in cls.body
        if isinstance(method, ast.FunctionDef)
        and "noted" in [getattr(d, "id", "") for d in method.decorator_list]
    }
    assert len(noted) > 60
    assert noted - set(found["calls"]) == NOT_CALLED


def test_the_frozen_plugin_trains_unchanged_with_a_core_that_has_moved_on(
    python: Run, installed: dict[str, str]
) -> None:
    found = trained(python, installed | {"IMPORT_FIRST": "tomorrow"})
    assert {"FrozenDouble.forward_context", "FrozenDouble.convert_output", "FrozenLog.log_metrics"} <= set(
        found["calls"]
    )


def test_a_core_that_has_moved_on_without_adapters_refuses_it(python: Run, installed: dict[str, str]) -> None:
    program = str(FROZEN / "programs" / "train_frozen.py")
    ended = python(program, env=installed | {"IMPORT_FIRST": "tomorrow", "WITHOUT_ADAPTERS": "1"})
    assert ended.returncode == 1
    assert "frozen_double (from frozen-one 1.0) is written for version 1 of its contract" in ended.stderr
    assert "speaks version 3" in ended.stderr


def test_the_frozen_plugin_is_listed_checked_and_has_its_command(
    fabric: Run, installed: dict[str, str]
) -> None:
    parts = json.loads(fabric("plugins", "list", "--json", env=installed).stdout)["parts"]
    states = {part["kind"]: part["state"] for part in parts if part["distribution"] == "frozen-one"}
    assert states == dict.fromkeys((*KINDS, "command"), "ok")
    checked = fabric("plugins", "check", "--installed", "frozen-one", env=installed)
    assert checked.returncode == 0, checked.stdout
    assert fabric("thaw", env=installed).stdout == "nothing has thawed\n"
    asked = ("--accelerator=frozen_card", "--strategy=frozen_strategy", "--precision=frozen_double")
    explained = fabric("explain", *asked, "--num-nodes=2", env=installed)
    assert "frozen_strategy is for one node, and 2 were asked for. (says frozen-one)" in explained.stderr

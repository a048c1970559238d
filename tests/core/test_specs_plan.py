"""Specs, targets, and parts that are made from a plan."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from fabric_core import (
    AcceleratorSpec,
    CommandSpec,
    Inventory,
    Precision,
    PrecisionSpec,
    Strategy,
    StrategySpec,
)
from fabric_core.build import build, make
from fabric_core.contract_versions import CURRENT
from fabric_core.errors import BrokenPluginError, ConfigurationError, OptionsError
from fabric_core.plan import Choice
from fabric_core.specs import KINDS, SPEC_TYPES
from fabric_core.targets import import_target

if TYPE_CHECKING:
    from conftest import Shelf


def test_a_spec_is_frozen_and_compares_by_value() -> None:
    one = PrecisionSpec("half", "a.b:C", aliases=("16",))
    assert one == PrecisionSpec("half", "a.b:C", aliases=("16",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "other"  # type: ignore[misc]


def test_names_are_compared_in_lower_case() -> None:
    assert PrecisionSpec("BF16-Mixed", "a.b:C", aliases=("BF",)).names == ("bf16-mixed", "bf")


def test_a_target_is_named_the_same_as_text_and_as_class() -> None:
    assert StrategySpec("x", Strategy).target_name == "fabric_core.contracts.strategy:Strategy"
    assert StrategySpec("x", "a.b:C.D").target_name == "a.b:C.D"


def test_the_more_scopes_the_more_specific() -> None:
    scopes: list[dict[str, Any]] = [
        {},
        {"strategies": ("a",)},
        {"strategies": ("a",), "accelerators": ("b",)},
    ]
    assert [PrecisionSpec("x", "a.b:C", **scope).specificity for scope in scopes] == [0, 1, 2]


def test_every_kind_has_a_contract_version_and_a_spec() -> None:
    assert set(CURRENT) == set(KINDS)
    assert len({spec.kind for spec in SPEC_TYPES}) == len(SPEC_TYPES)


@pytest.mark.parametrize(
    ("make_spec", "message"),
    [
        (lambda: AcceleratorSpec("x", "a.b:C", probe=3), "probe=3 has to be 'package.module:function'"),  # type: ignore[arg-type]
        (
            lambda: AcceleratorSpec("x", "a.b:C", probe="a:b", strategies={"one": "y", "some": "z"}),
            "strategies=",
        ),  # type: ignore[dict-item]
        (lambda: AcceleratorSpec("x", "a.b:C", probe="a:b", groups="gpu"), "groups='gpu' has to be a tuple"),  # type: ignore[arg-type]
        (lambda: PrecisionSpec("x", "a.b:C", api=True), "api=True has to be a whole number"),
        (lambda: PrecisionSpec("x", "a.b:C", aliases=("",)), "aliases=.* has to be a word"),
        (lambda: PrecisionSpec("x", "a.b:C", options=["a"]), "options=.* has to be a dictionary"),  # type: ignore[arg-type]
        (lambda: CommandSpec("two words", "a.b:c"), "CommandSpec: name='two words' has to be a word"),
        (lambda: CommandSpec("x", print), "target=.* has to be 'package.module:command'"),  # type: ignore[arg-type]
    ],
)
def test_a_slip_in_a_spec_is_an_error_where_it_is_made(make_spec: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_spec()


def test_an_inventory_is_available_with_a_device_or_without_number() -> None:
    assert Inventory(indices=(3,)).available
    assert Inventory(virtual=True).available
    assert not Inventory(note="no driver").available


# -- targets ---------------------------------------------------------------------------------------------------------


def test_a_target_is_imported_by_its_path() -> None:
    assert import_target("fabric_core.specs:PrecisionSpec.specificity", "a test") is PrecisionSpec.specificity
    assert import_target(print, "a test") is print


@pytest.mark.parametrize("path", ["no_colon", ":name", "module:", ""])
def test_a_path_of_the_wrong_form_is_an_error(path: str) -> None:
    with pytest.raises(ConfigurationError, match="named by a test, is not of the form 'package.module:Name'"):
        import_target(path, "a test")


@pytest.mark.parametrize("path", ["no.such.module:name", "fabric_core.specs:absent", "..:a"])
def test_a_path_that_leads_nowhere_names_who_asked_and_keeps_the_cause(path: str) -> None:
    with pytest.raises(BrokenPluginError, match="A test cannot be loaded from") as caught:
        import_target(path, "A test")
    assert caught.value.__cause__ is not None


# -- from a plan to parts --------------------------------------------------------------------------------------------


class Tuned(Strategy):
    """A strategy with options, one of them required."""

    def __init__(self, bucket_size: int, overlap: bool = True) -> None:
        self.bucket_size, self.overlap = bucket_size, overlap


class Greedy(Strategy):
    """A strategy that takes anything."""

    def __init__(self, **anything: Any) -> None:
        self.anything = anything


def choice(target: Any, **options: Any) -> Choice:
    return Choice(StrategySpec("mine", target), "acme", "1.0", "a test", options=options)


def test_the_parts_of_a_plan_are_made_and_wired(shelf: Shelf) -> None:
    parts = build(shelf.plan())
    assert parts.strategy.surroundings.precision is parts.precision
    assert parts.strategy.surroundings.cluster_environment is parts.cluster_environment
    assert str(parts.strategy.root_device) == "cpu"
    assert parts.launcher is None


def test_an_instance_that_was_passed_is_the_part(shelf: Shelf) -> None:
    mine = Greedy()
    assert build(shelf.plan(strategy=mine)).strategy is mine


def test_options_reach_the_class() -> None:
    assert make(choice(Tuned, bucket_size=3)).bucket_size == 3
    assert make(choice(Greedy, anything=1, else_=2)).anything == {"anything": 1, "else_": 2}


def test_an_unknown_option_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        OptionsError, match=r"has no option 'bucket_sise'\. Did you mean 'bucket_size'\? It has: .*overlap"
    ):
        make(choice(Tuned, bucket_sise=3))


def test_a_missing_option_is_named() -> None:
    with pytest.raises(OptionsError, match="needs a value for bucket_size"):
        make(choice(Tuned))


def test_a_target_that_is_no_part_of_its_kind_is_a_fault_of_its_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("acme_module")
    module.Number, module.Half = 3, Precision  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acme_module", module)
    for target in ("acme_module:Number", "acme_module:Half", int):
        with pytest.raises(BrokenPluginError, match="is no strategy: .* fault of acme"):
            make(choice(target))

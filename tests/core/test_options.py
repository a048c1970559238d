"""Options that a part declares: what is read from code, files and the command line, and what is refused."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from fabric_core import (
    BrokenPluginError,
    ConfigurationError,
    Fabric,
    LoggerSpec,
    NoOptions,
    OptionsError,
    Strategy,
    StrategySpec,
)
from fabric_core.build import make
from fabric_core.plan import Late, OptionTable, Plan
from fabric_core.resolve.annotations import form_of
from fabric_core.resolve.declared import REQUIRED, declared_options
from fabric_core.resolve.forms import Unfit
from fabric_core.resolve.stated import check_preset

if TYPE_CHECKING:
    from conftest import Run, Shelf


@dataclass(frozen=True)
class Base:
    """What others share.

    Args:
        patience: How long to wait,
            in seconds.
    """

    patience: float = 1.5


@dataclass(frozen=True)
class Tuning(Base):
    """Options of a strategy.

    Attributes:
        level: How much.
        mode, colour: Two things: at once.
        needed (str): What cannot be left out.

    No section: this is not one.
    """

    needed: str = field(kw_only=True)
    level: int = 1
    mode: Literal["fast", "slow"] = "fast"
    colour: str | None = None
    shape: tuple[int, ...] = ()
    table: dict[str, Any] = field(default_factory=dict, metadata={"help": "Entries."})
    hook: Callable[..., Any] | None = None
    thing: Any = None
    hidden: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.level > 2 and self.mode == "fast":
            raise ValueError("a level above 2 needs mode='slow'")


class Tuned(Strategy):
    """A strategy that keeps what it was given."""

    def __init__(self, **options: Any) -> None:
        self.given = options


class Free(Tuned):
    """One that declares nothing."""


TUNED = StrategySpec(
    "tuned", Tuned, supports=("*",), options_type=Tuning, aliases=("fine",), options={"level": 2}
)
HERE = f"{__name__}:helper"


def helper() -> None:
    """What the path of an option leads to."""


@pytest.fixture
def tuned(shelf: Shelf) -> Callable[..., Plan]:
    """Plans with a strategy that declares its options, or with one that does not."""
    shelf.put("acme", TUNED, StrategySpec("free", Free), StrategySpec("bare", Tuned, options_type=NoOptions))

    def plan(
        code: Mapping[str, Any] | None = None,
        texts: Mapping[str, str] | None = None,
        tables: Iterable[OptionTable] = (),
        strategy: Any = "tuned",
    ) -> Plan:
        return shelf.plan(
            strategy=strategy,
            options={"strategy": code or {}},
            texts={"strategy": texts or {}},
            tables=tuple(tables),
        )

    return plan


def table(name: str = "tuned", kind: str = "strategy", **values: Any) -> OptionTable:
    return OptionTable(kind, name, values, f"[{kind}.{name}] in fabric.toml")


# -- what is declared -------------------------------------------------------------------------------------------------


def test_a_declaration_is_read_with_its_defaults_and_what_its_docstring_says() -> None:
    options = declared_options(TUNED) or {}
    assert list(options) == [each.name for each in fields(Tuning) if each.init]
    said = {name: option.help for name, option in options.items() if option.help}
    assert said == {
        "patience": "How long to wait, in seconds.",
        "level": "How much.",
        "mode": "Two things: at once.",
        "colour": "Two things: at once.",
        "needed": "What cannot be left out.",
        "table": "Entries.",
    }
    assert options["needed"].default is REQUIRED
    assert (options["level"].default, options["table"].default) == (1, {})


def test_a_part_that_declares_nothing_is_told_from_one_that_takes_nothing() -> None:
    assert declared_options(StrategySpec("x", Free)) is None
    assert declared_options(StrategySpec("x", Free, options_type=NoOptions)) == {}


@dataclass
class Unreadable:
    x: Nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("options_type", "words"),
    [
        (int, "which is no dataclass"),
        ("json:dumps", "which is no dataclass"),
        ("no.such.module:Options", "cannot be loaded"),
        (Unreadable, "annotations cannot be read: NameError"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_the_plugins_fault(options_type: Any, words: str) -> None:
    with pytest.raises(BrokenPluginError, match=f"strategy 'x'.*{words}"):
        declared_options(StrategySpec("x", Free, options_type=options_type))


def test_a_spec_says_at_once_that_its_declaration_is_none() -> None:
    with pytest.raises(ConfigurationError, match="options_type=3 has to be"):
        StrategySpec("x", Free, options_type=3)  # type: ignore[arg-type]


def test_authors_find_out_whether_a_preset_fits_its_declaration() -> None:
    check_preset(TUNED)
    with pytest.raises(OptionsError, match=r"no option 'lvel'.*Did you mean 'level'"):
        check_preset(StrategySpec("x", Tuned, options_type=Tuning, options={"lvel": 1}))
    with pytest.raises(OptionsError, match="cannot take level='1'"):
        check_preset(StrategySpec("x", Tuned, options_type=Tuning, options={"level": "1"}))


def test_reading_a_declaration_imports_nothing_heavy(python: Run) -> None:
    code = "from fabric_core.resolve.declared import declared_options\nfrom fabric_core import Registry\n"
    code += "for offer in Registry(environ={}).offers(): declared_options(offer.spec)\n"
    code += "import sys; print(sorted({'torch', 'numpy', 'click', 'rich', 'tomllib'} & set(sys.modules)))"
    ended = python("-c", code)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


# -- values -----------------------------------------------------------------------------------------------------------


class Colour:
    """A class of somebody's."""


RED = Colour()
TAKEN: list[tuple[Any, Any, Any]] = [
    (int, 3, 3),
    (float, 3, 3),
    (float, 0.5, 0.5),
    (bool, True, True),
    (str, "3", "3"),
    (int | None, None, None),
    (Literal[1, "a"], 1, 1),
    (list[int], (1, 2), [1, 2]),
    (tuple[int, ...], [1, 2], (1, 2)),
    (tuple[int, str], [1, "a"], (1, "a")),
    (tuple, [1, "a"], (1, "a")),
    (Iterable[str], {"a"}, {"a"}),
    (Collection[type], {int}, {int}),
    (Iterable[str], (name for name in "ab"), ["a", "b"]),
    (frozenset[int], [1, 1], frozenset({1})),
    (dict[str, int], {"a": 1}, {"a": 1}),
    (Mapping[str, Any], {"a": [1]}, {"a": [1]}),
    (Callable[..., Any], print, print),
    (type, int, int),
    (type[Colour], Colour, Colour),
    (Colour, RED, RED),
    (Any, RED, RED),
    (Any, HERE, HERE),
    (str | PathLike[str], Path("x"), Path("x")),
    (float | datetime.timedelta, datetime.timedelta(1), datetime.timedelta(1)),
]


@pytest.mark.parametrize(("annotation", "value", "taken"), TAKEN)
def test_a_value_from_code_that_fits_is_taken(annotation: Any, value: Any, taken: Any) -> None:
    found = form_of(annotation).take(value)
    assert (found, type(found)) == (taken, type(taken))


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, True),
        (int, 3.0),
        (int, "3"),
        (float, "0.5"),
        (float, False),
        (bool, 1),
        (bool, "true"),
        (str, 3),
        (str, None),
        (int | None, "none"),
        (Literal[1, "a"], True),
        (Literal[1, "a"], "1"),
        (list[int], "12"),
        (list[int], [1, "2"]),
        (list[int], {1: 2}),
        (list[int], 3),
        (tuple[int, str], [1]),
        (dict[str, int], {"a": "b"}),
        (dict[str, int], [("a", 1)]),
        (Callable[..., Any], HERE),
        (type, 3),
        (Colour, Colour),
        (Path, "x"),
    ],
)
def test_a_value_from_code_of_another_type_is_refused(annotation: Any, value: Any) -> None:
    with pytest.raises(Unfit):
        form_of(annotation).take(value)


READ: list[tuple[Any, str, Any]] = [
    (int, "3", 3),
    (int, "-3", -3),
    (float, "5e8", 5e8),
    (float, "3", 3.0),
    (bool, "true", True),
    (bool, "No", False),
    (bool, "0", False),
    (str, "none", "none"),
    (str, "", ""),
    (int | None, "None", None),
    (str | None, "none", None),
    (str | None, "x", "x"),
    (int | str, "3", 3),
    (str | int, "three", "three"),
    (bool | int | None, "1", 1),
    (bool | int | None, "false", False),
    (Literal["3", 4], "3", "3"),
    (Literal["3", 4], "4", 4),
    (int | Literal["auto"], "auto", "auto"),
    (int | Literal["auto"], "2", 2),
    (list[int], "1, 2", [1, 2]),
    (list[int], "[1, 2]", [1, 2]),
    (list[str], "", []),
    (tuple[float, float], "0.9,0.95", (0.9, 0.95)),
    (list[list[int]], "[[1], [2]]", [[1], [2]]),
    (dict, '{"a": {"b": 1}}', {"a": {"b": 1}}),
    (dict[str, int], '{"a": 1}', {"a": 1}),
    (dict[str, Any] | str, "file.json", "file.json"),
    (dict[str, Any] | str, '{"a": "b.c:d"}', {"a": "b.c:d"}),
    (Any, "fast", "fast"),
    (Any, "3", 3),
    (Any, "true", True),
    (Any, "localhost:8080", "localhost:8080"),
    (Any, "a.b:c", Late("a.b:c")),
    (Callable[..., Any], "a.b:c", Late("a.b:c")),
    (str | Callable[..., Any], "fast", "fast"),
    (str | Callable[..., Any], "a.b:c", Late("a.b:c")),
    (Colour, "a:b", Late("a:b")),
    (Collection[type], "a:B,c:D", [Late("a:B"), Late("c:D")]),
    (Callable[..., Any] | Collection[type], "a:B", Late("a:B")),
    (Callable[..., Any] | Collection[type], "a:B,", [Late("a:B")]),
    (tuple[int, ...] | Any | None, "2,2", (2, 2)),
    (Path, "x", Path("x")),
]


@pytest.mark.parametrize(("annotation", "text", "value"), READ)
def test_a_text_of_the_command_line_becomes_what_the_field_holds(
    annotation: Any, text: str, value: Any
) -> None:
    found = form_of(annotation).read(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "3.0"),
        (int, ""),
        (float, "much"),
        (bool, "maybe"),
        (Literal["a", "b"], "c"),
        (int | None, "x"),
        (list[int], "1,x"),
        (list[int], "[1"),
        (tuple[float, float], "0.9"),
        (dict, "[1]"),
        (dict, "a=1"),
        (dict[str, int], '{"a": "b"}'),
        (Callable[..., Any], "print"),
        (Callable[..., Any], "a b:c"),
        (Colour, "red"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(annotation: Any, text: str) -> None:
    with pytest.raises(Unfit):
        form_of(annotation).read(text)


@pytest.mark.parametrize(
    ("annotation", "value", "loaded"),
    [
        (int, 3, 3),
        (int, "3", 3),
        (int | str, "3", "3"),
        (int | None, "none", None),
        (float, 1, 1),
        (tuple[int, ...] | Any | None, [2, 2], (2, 2)),
        (list[str], ["a:b"], ["a:b"]),
        (Collection[type], ["a:B"], [Late("a:B")]),
        (dict[str, Any], {"a": "b:c"}, {"a": "b:c"}),
        (dict[str, float], {"a": "1.5"}, {"a": 1.5}),
        (Any, "a:b", Late("a:b")),
        (Any, "3", "3"),
        (Any, {"a": "b:c"}, {"a": "b:c"}),
        (str | Callable[..., Any], "a:b", Late("a:b")),
        (str | Callable[..., Any] | None, "fast", "fast"),
        (Path, "x", Path("x")),
        (bool | Callable[..., Any] | Collection[type], True, True),
    ],
)
def test_a_value_of_a_file_is_taken_or_stands_for_what_files_cannot_hold(
    annotation: Any, value: Any, loaded: Any
) -> None:
    found = form_of(annotation).load(value)
    assert (found, type(found)) == (loaded, type(loaded))


@pytest.mark.parametrize(("annotation", "value"), [(int, 3.5), (bool, 1), (str, 3), (list[int], {"a": 1})])
def test_a_value_of_a_file_of_another_type_is_refused(annotation: Any, value: Any) -> None:
    with pytest.raises(Unfit):
        form_of(annotation).load(value)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "a whole number or none"),
        (Literal["a", 1], "one of 'a', 1"),
        (int | Literal["auto"], "a whole number or 'auto'"),
        (tuple[int, float], "a list (a whole number, then a number)"),
        (list[bool], "a list (each true or false)"),
        (Callable[..., Any] | Collection[type], "a function or a list (each a class)"),
        (dict[str, Any] | Colour, "a table (as JSON on the command line) or a Colour"),
        (Any, "anything"),
    ],
)
def test_what_a_value_has_to_be_is_said_in_words(annotation: Any, words: str) -> None:
    assert form_of(annotation).words == words


# -- who states what --------------------------------------------------------------------------------------------------


def test_preset_file_and_the_users_words_lie_over_each_other_in_this_order(tuned: Any) -> None:
    assert tuned().strategy.options == {"level": 2}
    assert tuned().strategy.origins == {"level": "the preset"}
    filed = [table(level=3, patience=1, mode="slow"), table("fine", colour="red"), table("free", level=9)]
    choice = tuned({"patience": 4}, {"level": "5"}, filed).strategy
    assert choice.options == {"level": 5, "patience": 4, "mode": "slow", "colour": "red"}
    assert choice.origins == {
        "level": "the command line",
        "patience": "the code",
        "mode": "[strategy.tuned] in fabric.toml",
        "colour": "[strategy.fine] in fabric.toml",
    }


def test_the_plan_shows_who_states_an_option(tuned: Any) -> None:
    plan = json.loads(json.dumps(tuned({}, {"hook": HERE}, [table(patience=2)]).to_dict()))
    assert plan["parts"][1]["options"] == {"level": 2, "patience": 2, "hook": HERE}
    assert plan["parts"][1]["origins"] == {
        "level": "the preset",
        "patience": "[strategy.tuned] in fabric.toml",
        "hook": "the command line",
    }


@pytest.mark.parametrize(
    ("sources", "source"),
    [
        (({"lvel": 1},), "the code"),
        (({}, {"lvel": "1"}), "the command line"),
        (({}, {}, [table(lvel=1)]), "[strategy.tuned] in fabric.toml"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest_with_all_and_with_who_states_it(
    tuned: Any, sources: Any, source: str
) -> None:
    with pytest.raises(OptionsError) as caught:
        tuned(*sources)
    assert str(caught.value) == (
        f"The strategy 'tuned' has no option 'lvel', which {source} states. Did you mean 'level'? It has: colour, "
        "hook, level, mode, needed, patience, shape, table, thing."
    )


@pytest.mark.parametrize(
    ("sources", "value", "source"),
    [
        (({"level": "high"},), "'high'", "the code"),
        (({}, {"level": "high"}), "'high'", "the command line"),
        (({}, {}, [table(level=1.5)]), "1.5", "[strategy.tuned] in fabric.toml"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_what_it_has_to_be_and_who_states_it(
    tuned: Any, sources: Any, value: str, source: str
) -> None:
    with pytest.raises(OptionsError) as caught:
        tuned(*sources)
    assert str(caught.value) == (
        f"The strategy 'tuned' cannot take level={value} from {source}: it has to be a whole number."
    )


def test_a_part_without_options_says_so(tuned: Any) -> None:
    with pytest.raises(
        OptionsError, match=r"'bare' has no option 'x', which the code states\. It has: none\."
    ):
        tuned({"x": 1}, strategy="bare")


def test_code_and_command_line_have_to_agree(tuned: Any) -> None:
    assert tuned({"level": 5}, {"level": "5"}).strategy.options["level"] == 5
    assert tuned({"hook": helper}, {"hook": HERE}).strategy.options["hook"] is helper
    with pytest.raises(ConfigurationError) as caught:
        tuned({"level": 4}, {"level": "5"}, [table(level=6)])
    assert str(caught.value) == (
        "The code says level=4 for the strategy, and the command line says --strategy.level 5. Make them agree, or "
        "leave level out of the code so that the command line decides."
    )
    with pytest.raises(ConfigurationError, match="Make them agree"):
        tuned({"hook": print}, {"hook": HERE})


def test_two_tables_of_one_part_have_to_agree(tuned: Any) -> None:
    assert tuned(tables=[table(level=5), table("fine", level=5)]).strategy.options["level"] == 5
    with pytest.raises(
        ConfigurationError, match=r"\[strategy.tuned\] .* level = 5, and \[strategy.fine\] .* 6"
    ):
        tuned(tables=[table(level=5), table("fine", level=6)])


def test_tables_of_other_parts_are_not_even_read(tuned: Any) -> None:
    others = [table("free", whatever=1), table("nobody", level="x"), table("32-true", "precision")]
    assert tuned(tables=others).strategy.options == {"level": 2}
    assert tuned(tables=others).warnings == ()


def test_a_table_whose_name_is_nearly_that_of_the_chosen_part_is_noticed(tuned: Any) -> None:
    (warning,) = tuned(tables=[table("tunned", level=1)]).warnings
    assert warning == (
        "[strategy.tunned] in fabric.toml is not used: no installed strategy has that name. Did you mean 'tuned'?"
    )


def test_a_part_that_declares_nothing_takes_any_option(tuned: Any) -> None:
    texts = {"a": "3", "b": "true", "c": "some text", "d": "[1]", "e": "json:dumps"}
    choice = tuned({"f": helper}, texts, [table("free", g="x:y")], strategy="free").strategy
    read = {"a": 3, "b": True, "c": "some text", "d": [1], "e": "json:dumps"}
    assert choice.options == {**read, "f": helper, "g": "x:y"}
    assert not any(isinstance(value, Late) for value in choice.options.values())


def test_a_class_that_is_passed_has_the_options_that_its_own_spec_declares(tuned: Any) -> None:
    class Own(Tuned):
        spec = StrategySpec("own", "x:y", options_type=Tuning, options={"level": 2})

    class Further(Own):
        pass

    choice = tuned({}, {"level": "3"}, [table("own", patience=2)], strategy=Own).strategy
    assert choice.options == {"level": 3, "patience": 2}, "the preset's options are those of the name"
    with pytest.raises(OptionsError, match="'own' has no option 'x'"):
        tuned({"x": 1}, strategy=Own)
    assert tuned({"x": 1}, {"y": "2"}, strategy=Further).strategy.options == {"x": 1, "y": 2}, (
        "a constructor of its own has options of its own"
    )


def test_an_object_that_is_made_already_takes_no_options(tuned: Any) -> None:
    for sources in (({"level": 3},), ({}, {"level": "3"})):
        with pytest.raises(
            OptionsError, match=r"\(level\), together with an instance of Tuned, which is made"
        ):
            tuned(*sources, strategy=Tuned())


def test_a_table_for_an_object_that_is_made_already_is_named_and_not_used(tuned: Any) -> None:
    tables = [table("tuned", level=3), table("own", level=3)]
    _, warning = tuned(tables=tables, strategy=Tuned()).warnings  # the other one: nothing vouches for it
    assert warning == (
        "[strategy.tuned] in fabric.toml is not used: the code passes a Tuned that is made already."
    )


@pytest.mark.parametrize(
    "kind", ["accelerator", "precision", "cluster environment", "checkpoint io", "logger"]
)
def test_a_table_reaches_a_part_of_every_kind(shelf: Shelf, kind: str) -> None:
    loggers = ("sink",) if kind == "logger" else ()
    names = {"accelerator": "cpu", "precision": "32", "checkpoint io": "torch_file", "logger": "sink"}
    shelf.put("acme", LoggerSpec("sink", "x:Y", options_type=NoOptions))
    name = names.get(kind, "local")
    with pytest.raises(OptionsError, match=rf"The {kind} '[^']+' has no option 'x', which \[{kind}.{name}\]"):
        shelf.plan(loggers=loggers, tables=(table(name, kind, x=1),))


# -- making the part --------------------------------------------------------------------------------------------------


def test_a_path_is_imported_when_the_part_is_made_and_not_before(tuned: Any) -> None:
    choice = tuned({}, {"hook": "no_such_module_yet:f", "needed": "x"}).strategy
    with pytest.raises(BrokenPluginError, match="the option 'hook' of the strategy 'tuned' cannot be loaded"):
        make(choice)
    made = make(tuned({"needed": "x"}, {"hook": "json:dumps", "thing": "json:loads"}).strategy)
    assert made.given == {"needed": "x", "hook": json.dumps, "thing": json.loads, "level": 2}
    made = make(tuned({"needed": "x", "thing": "json:loads"}).strategy)
    assert made.given["thing"] == "json:loads", "a text in code is a text"


def test_paths_in_lists_and_tables_are_imported_where_classes_are_wanted(shelf: Shelf) -> None:
    @dataclass(frozen=True)
    class Nested:
        classes: Collection[type] = ()
        byname: dict[str, type] = field(default_factory=dict)

    shelf.put("acme", StrategySpec("nested", Tuned, options_type=Nested))
    texts = {"classes": "json:JSONDecoder,json:JSONEncoder", "byname": '{"a": "json:JSONDecoder"}'}
    made = make(shelf.plan(strategy="nested", texts={"strategy": texts}).strategy)
    assert made.given == {
        "classes": [json.JSONDecoder, json.JSONEncoder],
        "byname": {"a": json.JSONDecoder},
    }


def test_the_dataclass_has_its_say_on_what_goes_together_when_the_part_is_made(tuned: Any) -> None:
    choice = tuned({"needed": "x"}, {"level": "3"}).strategy
    with pytest.raises(OptionsError, match="'tuned' refuses its options: a level above 2 needs mode='slow'"):
        make(choice)
    assert make(tuned({"needed": "x", "mode": "slow"}, {"level": "3"}).strategy).given["level"] == 3


def test_an_option_that_cannot_be_left_out_is_missed_when_the_part_is_made(tuned: Any) -> None:
    with pytest.raises(OptionsError, match="'tuned' needs a value for needed"):
        make(tuned({"level": 1}).strategy)


def test_no_options_make_no_dataclass(shelf: Shelf) -> None:
    shelf.put("acme", StrategySpec("lazy", Tuned, options_type="no.such.module:Options"))
    assert make(shelf.plan(strategy="lazy").strategy).given == {}
    with pytest.raises(BrokenPluginError, match="the options_type of the strategy 'lazy' cannot be loaded"):
        shelf.plan(strategy="lazy", options={"strategy": {"x": 1}})


def test_the_constructor_of_a_fabric_checks_options(core_alone: Any) -> None:
    with pytest.raises(
        OptionsError, match=re.escape("'single_device' has no option 'x', which the code states.")
    ):
        Fabric(strategy="single_device", strategy_options={"x": 1})

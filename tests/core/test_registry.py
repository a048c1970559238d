"""The registry: every plugin stands alone, every problem is kept and told, and the order of folders means nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabric_core import Registry, Request, StrategySpec, hookimpl
from fabric_core.errors import AmbiguousPluginError, BrokenPluginError, UnknownPluginError
from fabric_core.registry import discovery
from fabric_core.resolve import resolve

if TYPE_CHECKING:
    from conftest import Run, Site

GOOD = """
    from fabric_core import StrategySpec, hookimpl

    @hookimpl
    def fabric_strategies():
        yield StrategySpec("good", "package.module:Class")
"""


def names(registry: Registry) -> set[str]:
    return {offer.spec.name for offer in registry.offers("strategy")}


def problems(registry: Registry, distribution: str) -> list[str]:
    return [problem.message for problem in registry.problems if problem.distribution == distribution]


def test_an_installed_plugin_is_found_with_its_distribution_and_version(site: Site) -> None:
    site.install("acme-Parts", GOOD, version="2.5")
    offer = site.registry().one("strategy", "GOOD")
    assert (offer.spec.name, offer.distribution, offer.version) == ("good", "acme-Parts", "2.5")
    assert offer.full_name == "good@acme-Parts"


def test_the_core_registers_its_own_parts_through_the_same_door() -> None:
    owners = {(o.spec.kind, o.spec.name, o.distribution) for o in Registry(environ={}).offers()}
    for part in [
        ("accelerator", "cpu"),
        ("strategy", "single_device"),
        ("precision", "32-true"),
        ("cluster environment", "local"),
        ("checkpoint io", "torch_file"),
    ]:
        assert (*part, "fabric-core") in owners


# -- one broken plugin does not stop the others -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('built for another version')", "RuntimeError: built for another version"),
        ("import sys; sys.exit('no device')", "SystemExit: no device"),
        ("import a_module_that_is_not_installed", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_kept_as_a_problem(site: Site, code: str, message: str) -> None:
    site.install("aaa-broken", code)
    site.install("good", GOOD)
    registry = site.registry()
    assert "good" in names(registry)
    (told,) = problems(registry, "aaa-broken")
    assert message in told
    with pytest.raises(
        UnknownPluginError, match=r"Found but broken: aaa-broken \(.*" + message.split(":")[0]
    ):
        registry.one("strategy", "aaa")
    with pytest.raises(BrokenPluginError, match="aaa-broken") as caught:
        registry.one("strategy", "aaa@aaa_broken")
    assert isinstance(caught.value.__cause__, Exception | SystemExit), "the original cause is chained"


HALF = """
    import sys
    from fabric_core import PrecisionSpec, StrategySpec, hookimpl

    @hookimpl
    def fabric_precisions():
        yield PrecisionSpec("half_precision", "half.module:Class")

    @hookimpl
    def fabric_strategies():
        yield StrategySpec("before", "half.module:Class")
        {failure}
"""


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("raise KeyError('HOME_OF_ACME')", "fabric_strategies: KeyError: 'HOME_OF_ACME'"),
        ("sys.exit(3)", "fabric_strategies: SystemExit: 3"),
        ("yield 'a name'", "fabric_strategies has to yield specs, not 'a name'"),
        ("yield StrategySpec", "fabric_strategies has to yield specs"),
        ("yield StrategySpec(None, 'a.b:C')", "StrategySpec: name=None has to be a word"),
        ("yield StrategySpec('two words', 'a.b:C')", "name='two words' has to be a word"),
        ("yield StrategySpec('auto', 'a.b:C')", "name='auto' has to be a word"),
        ("yield StrategySpec('a@b', 'a.b:C')", "name='a@b' has to be a word"),
        ("yield StrategySpec('x', None)", "target=None has to be 'package.module:Class' or a class"),
        ("yield StrategySpec('x', 'a.b:C', supports='cpu')", "supports='cpu' has to be a tuple of texts"),
        ("yield StrategySpec('x', 'a.b:C', aliases=(1,))", "aliases=(1,) has to be a tuple of texts"),
        ("yield StrategySpec('x', 'a.b:C', priority='high')", "priority='high' has to be a whole number"),
        ("yield StrategySpec('x', 'a.b:C', volunteers_for=('much',))", "volunteers_for=('much',) has to be"),
        ("yield StrategySpec('x', 'a.b:C', processes='one')", "processes='one' has to be 'per_device'"),
    ],
)
def test_a_hook_that_fails_half_way_loses_its_own_parts_and_nobody_elses(
    site: Site, failure: str, message: str
) -> None:
    site.install("half", HALF.format(failure=failure))
    site.install("good", GOOD)
    registry = site.registry()
    assert "good" in names(registry)
    assert "before" not in names(registry), "half of a list is not offered as if it were the whole"
    assert registry.one("precision", "half_precision").distribution == "half"
    (told,) = problems(registry, "half")
    assert message in told


def test_a_hook_that_yields_something_else_than_a_list_is_a_problem(site: Site) -> None:
    site.install("odd", "from fabric_core import hookimpl\n@hookimpl\ndef fabric_loggers():\n    return 7\n")
    (told,) = problems(site.registry(), "odd")
    assert "TypeError" in told


def test_a_misspelled_hook_is_reported_and_the_other_hooks_work(site: Site) -> None:
    site.install(
        "typo",
        """
        from fabric_core import PrecisionSpec, StrategySpec, hookimpl

        @hookimpl
        def fabric_stratgies():
            yield StrategySpec("lost", "typo.module:Class")

        @hookimpl
        def fabric_precisions():
            yield PrecisionSpec("typo_precision", "typo.module:Class")
        """,
    )
    registry = site.registry()
    assert registry.one("precision", "typo_precision").distribution == "typo"
    (told,) = problems(registry, "typo")
    assert told == (
        "it implements a hook 'fabric_stratgies' that does not exist. Did you mean 'fabric_strategies'?"
    )
    with pytest.raises(UnknownPluginError, match="Did you mean 'fabric_strategies'"):
        registry.one("strategy", "lost")


def test_a_hook_without_its_decorator_is_reported(site: Site) -> None:
    site.install("plain", "def fabric_strategies():\n    return []\n")
    (told,) = problems(site.registry(), "plain")
    assert told == "its function 'fabric_strategies' lacks the decorator @hookimpl, so it is not called"


def test_a_hook_may_be_implemented_under_another_name(site: Site) -> None:
    site.install(
        "renamed",
        """
        from fabric_core import StrategySpec, hookimpl

        @hookimpl(specname="fabric_strategies")
        def parts():
            return [StrategySpec("renamed", "renamed.module:Class")]
        """,
    )
    registry = site.registry()
    assert "renamed" in names(registry)
    assert problems(registry, "renamed") == []


def test_a_hook_with_wrong_arguments_breaks_its_plugin_only(site: Site) -> None:
    site.install(
        "args",
        """
        from fabric_core import hookimpl

        @hookimpl
        def fabric_check_plan(plan):
            return "never asked, because the plugin is broken"

        @hookimpl
        def fabric_strategies(registry):
            return []
        """,
    )
    registry = site.registry()
    (told,) = problems(registry, "args")
    assert "registry" in told
    assert resolve(Request(accelerator="cpu"), registry).strategy.name == "single_device"


@pytest.mark.parametrize(
    ("code", "hides"),
    [
        ("raise RuntimeError\ndef fabric_strategies(): ...", False),
        ("raise RuntimeError\ndef fabric_accelerators(): ...", True),
        ("from fabric_core import hookimpl\n@hookimpl\ndef fabric_accelerators():\n    1 / 0", True),
        ("from fabric_core import hookimpl\n@hookimpl\ndef fabric_acelerators(): ...", True),
        ("def fabric_accelerators(): ...", True),
        ("from fabric_core import hookimpl\n@hookimpl\ndef fabric_stratgies(): ...", False),
    ],
)
def test_only_what_may_offer_hardware_stands_in_the_way_of_auto(site: Site, code: str, hides: bool) -> None:
    site.install("ruin", code)
    (problem,) = (p for p in site.registry().problems if p.distribution == "ruin")
    assert problem.hides_accelerators is hides


def test_a_hooks_module_without_a_package_or_a_file_is_judged_too(site: Site) -> None:
    (site.folder / "lonely.py").write_text("raise RuntimeError")
    site.modules.add("lonely")
    for module in ("lonely", "not_even_there.hooks"):
        site.install("ruin", entry_points=f"[fabric_core.plugins]\nmain = {module}\n")
        (problem,) = (p for p in site.registry().problems if p.distribution == "ruin")
        assert problem.hides_accelerators is (module != "lonely"), "what cannot be read may hide anything"


# -- files that other people wrote ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"[console_scripts\nthis is no entry point\n[[]]\n===",
        b"\xff\xfe\x00 fabric_core.plugins \x80",
        b"fabric_core.plugins is only mentioned here",
        b"[fabric_core.plugins_of_another]\nmain = nowhere.hooks\n",
        b"",
    ],
)
def test_a_malformed_foreign_entry_points_file_disturbs_nobody(site: Site, text: bytes) -> None:
    site.install("foreign", entry_points=text)
    site.install("good", GOOD)
    registry = site.registry()
    assert "good" in names(registry)
    assert problems(registry, "foreign") == []


@pytest.mark.parametrize(
    "metadata", ["", "Metadata-Version: 2.1\n\nName: in the description\n", "Version: 1\n"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_plugin_whose_metadata_has_no_name_is_reported_by_its_folder(site: Site, metadata: str) -> None:
    site.install("nameless", GOOD, metadata=metadata)
    site.install_strategy("good", "fine")
    registry = site.registry()
    assert "fine" in names(registry)
    assert "good" not in names(registry)
    (told,) = problems(registry, "nameless-1.0.dist-info")
    assert "have no name" in told


def test_a_plugin_whose_metadata_has_no_version_is_reported(site: Site) -> None:
    site.install("versionless", GOOD, metadata="Name: versionless\n")
    (told,) = problems(site.registry(), "versionless")
    assert "have no version" in told


@pytest.mark.parametrize(
    "line", ["main =", "main = not a module", "main = a.b:c", "nonsense", "= a.b", "main=a..b"]
)
def test_an_entry_of_ours_that_names_no_module_is_reported(site: Site, line: str) -> None:
    site.install("lines", entry_points=f"[fabric_core.plugins]\n{line}\n")
    site.install("good", GOOD)
    registry = site.registry()
    assert "good" in names(registry)
    assert len(problems(registry, "lines")) == 1


def test_comments_and_spaces_among_entry_points_are_fine(site: Site) -> None:
    text = "# first\n[fabric_core.plugins]\n; a comment\n\n  main=good.hooks  \n[other]\nmain = nowhere\n"
    site.install("good", GOOD, entry_points=text)
    registry = site.registry()
    assert "good" in names(registry)
    assert problems(registry, "good") == []


def test_of_two_copies_of_a_distribution_the_first_on_the_path_counts(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("twice", GOOD, version="1.0")
    site.install("Twice", GOOD, version="2.0", folder=tmp_path / "other")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "other")])
    assert site.registry().one("strategy", "good").version == "1.0"


# -- order -----------------------------------------------------------------------------------------------------------


CLASHING = {
    "zeta": 'strategies=(("shared", 5, "many"), ("z_only", 0, "one"))',
    "alpha": 'strategies=(("a_only", 0, "many"), ("single", 7, "one"))',
    "mid-dle": 'strategies=(("m_only", 90, "many"), ("shared", 0, "many_nodes"))',
}
"""What the generated distributions offer: name, priority, and what it volunteers for."""

ORDERED = """
    from fabric_core import StrategySpec, hookimpl

    @hookimpl
    def fabric_strategies({defaults}):
        for name, priority, situation in strategies:
            yield StrategySpec(
                name, "a.b:C", priority=priority, volunteers_for=(situation,), supports=("*",), launcher="script"
            )
"""


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(list(CLASHING)), devices=st.sampled_from([1, 2, 3]))
def test_the_order_of_the_folders_on_the_path_changes_nothing(
    site: Site, tmp_path: Path, order: list[str], devices: int
) -> None:
    for name, data in CLASHING.items():
        site.install(name, ORDERED.format(defaults=data), folder=tmp_path / name)
    before = list(sys.path)
    answers = []
    try:
        for folders in (order, sorted(order)):
            sys.path[:] = [*(str(tmp_path / name) for name in folders), *before]
            registry = site.registry()
            plan = resolve(Request(accelerator="cpu", devices=devices), registry)
            with pytest.raises(AmbiguousPluginError) as clash:
                registry.one("strategy", "shared")
            answers.append((plan.to_dict(), str(clash.value), [o.full_name for o in registry.offers()]))
    finally:
        sys.path[:] = before
    assert answers[0] == answers[1]
    assert answers[0][0]["parts"][1]["name"] == ("single" if devices == 1 else "m_only")


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clash(site: Site) -> Site:
    site.install_strategy("acme", "fast", version="1.1")
    site.install_strategy("zenith", "Fast", version="2.2")
    return site


def test_two_distributions_with_one_name_are_an_error_only_when_it_is_used(clash: Site) -> None:
    registry = clash.registry()
    assert resolve(Request(accelerator="cpu"), registry).strategy.name == "single_device"
    with pytest.raises(AmbiguousPluginError) as caught:
        resolve(Request(accelerator="cpu", strategy="fast"), registry)
    told = str(caught.value)
    for part in (
        "acme 1.1",
        "zenith 2.2",
        "'fast@acme'",
        "'Fast@zenith'",
        "FABRIC_PLUGINS_DENY=acme",
        "uninstall",
    ):
        assert part in told


def test_the_first_way_out_of_a_clash_is_to_name_the_distribution(clash: Site) -> None:
    registry = clash.registry()
    assert registry.one("strategy", "fast@ZENITH").distribution == "zenith"
    assert registry.one("strategy", "fast@acme").distribution == "acme"


def test_the_second_way_out_of_a_clash_is_to_block_a_distribution(clash: Site) -> None:
    assert clash.registry(FABRIC_PLUGINS_DENY="acme").one("strategy", "fast").distribution == "zenith"


def test_the_third_way_out_of_a_clash_is_to_uninstall_a_distribution(clash: Site) -> None:
    clash.uninstall("zenith")
    assert clash.registry().one("strategy", "fast").distribution == "acme"


def test_a_distribution_that_offers_a_name_twice_is_told_so(site: Site) -> None:
    hooks = """
        from fabric_core import StrategySpec, hookimpl

        @hookimpl
        def fabric_strategies():
            return [StrategySpec("same", "a.b:C"), StrategySpec("other", "a.b:D", aliases=("same",))]
    """
    site.install("stutter", hooks)
    with pytest.raises(AmbiguousPluginError, match=r"stutter 1.0 offers 2 parts .* 'same': a.b:C, a.b:D"):
        site.registry().one("strategy", "same")


def test_an_unknown_name_is_answered_with_what_there_is() -> None:
    with pytest.raises(UnknownPluginError) as caught:
        Registry(environ={}).one("strategy", "single_devize")
    told = str(caught.value)
    assert told.startswith("No strategy is named 'single_devize'. Did you mean 'single_device'?")
    assert "Installed: " in told


def test_a_name_of_another_kind_is_recognised() -> None:
    with pytest.raises(UnknownPluginError, match="'cpu' is the name of another kind of part: accelerator"):
        Registry(environ={}).one("strategy", "cpu")


def test_a_known_name_that_is_not_installed_is_answered_with_what_to_install() -> None:
    registry = Registry(environ={}, find=list)
    with pytest.raises(UnknownPluginError, match="It belongs to fabric-backends, which is installed"):
        registry.one("precision", "bf16-mixed")


def test_hints_say_pip_install_only_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabric_core.registry.hints.installed_version", lambda name: None)
    registry = Registry(environ={}, find=list)
    with pytest.raises(UnknownPluginError, match="It comes with: pip install fabric-backends"):
        registry.one("precision", "bf16-mixed")


# -- blocking --------------------------------------------------------------------------------------------------------


MARKED = "open({marker!r}, 'a').close()"


@pytest.mark.parametrize(
    ("environ", "imported"),
    [
        ({}, True),
        ({"FABRIC_PLUGINS_DENY": "other, Marked_Plugin"}, False),
        ({"FABRIC_PLUGINS_ALLOW": "other"}, False),
        ({"FABRIC_PLUGINS_ALLOW": "other,marked.plugin"}, True),
        ({"FABRIC_PLUGINS_AUTOLOAD": "0"}, False),
        ({"FABRIC_PLUGINS_AUTOLOAD": "1"}, True),
        ({"FABRIC_PLUGINS_AUTOLOAD": "0", "FABRIC_PLUGINS_ALLOW": "marked-plugin"}, True),
        ({"FABRIC_PLUGINS_ALLOW": "marked-plugin", "FABRIC_PLUGINS_DENY": "marked-plugin"}, False),
    ],
)
def test_a_blocked_plugin_is_never_imported(
    site: Site, tmp_path: Path, environ: dict[str, str], imported: bool
) -> None:
    marker = tmp_path / "marker"
    site.install_strategy("marked-plugin", "marked", before=MARKED.format(marker=str(marker)))
    registry = site.registry(**environ)
    assert problems(registry, "marked-plugin") == []
    assert marker.exists() == imported
    assert ("marked_plugin.hooks" in sys.modules) == imported
    assert ("marked" in names(registry)) == imported
    assert ("marked-plugin" in {found.distribution for found in registry.blocked}) != imported
    assert "single_device" in names(registry), "the core itself cannot be blocked"
    if not imported:
        with pytest.raises(UnknownPluginError, match=r"Blocked by FABRIC_PLUGINS_\*: .*marked-plugin"):
            registry.one("strategy", "marked")


# -- heavy manifests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heavy", ["torch", "numpy"])
def test_a_hooks_module_that_imports_a_heavy_package_is_reported(site: Site, python: Run, heavy: str) -> None:
    site.install_strategy("heavy", "weighty", before=f"import {heavy}")
    (site.folder / f"{heavy}.py").write_text("stub = True\n")
    code = (
        f"import sys; sys.path.insert(0, {str(site.folder)!r})\n"
        "from fabric_core import Registry\n"
        "r = Registry(environ={})\n"
        "assert r.one('strategy', 'weighty')\n"
        "print([(p.distribution, p.message, p.fatal) for p in r.problems if p.distribution == 'heavy'])"
    )
    ended = python("-c", code)
    assert ended.returncode == 0, ended.stderr
    assert eval(ended.stdout) == [("heavy", f"its hooks module heavy.hooks imports {heavy}", False)]


def test_a_hooks_module_that_is_slow_to_import_is_reported(site: Site) -> None:
    busy = "import time\nstop = time.process_time() + 0.15\nwhile time.process_time() < stop: pass\n"
    site.install("slow", busy)
    (told,) = problems(site.registry(), "slow")
    assert told.startswith("its hooks module slow.hooks takes 0.")


# -- a second look ---------------------------------------------------------------------------------------------------


def test_what_is_installed_later_is_found_at_the_second_look(site: Site) -> None:
    registry = site.registry()
    with pytest.raises(UnknownPluginError):
        registry.one("strategy", "late")
    site.install_strategy("latecomer", "late")
    assert registry.one("strategy", "late").distribution == "latecomer"


def test_a_repaired_version_of_a_broken_plugin_is_found_at_the_second_look(site: Site) -> None:
    site.install("fixed-later", "raise RuntimeError('old')", version="1.0")
    registry = site.registry()
    assert problems(registry, "fixed-later") == ["RuntimeError: old"]
    site.uninstall("fixed-later")
    # A file of the same size and second as its predecessor would be taken from the bytecode cache.
    site.install_strategy("fixed-later", "repaired", version="1.1")
    assert registry.one("strategy", "repaired").version == "1.1"
    assert problems(registry, "fixed-later") == []


def test_a_new_version_of_a_plugin_at_work_waits_for_a_restart(site: Site) -> None:
    site.install_strategy("upgraded", "same_name", version="1.0")
    registry = site.registry()
    site.uninstall("upgraded")
    site.install_strategy("upgraded", "same_name", version="2.0")
    with pytest.raises(UnknownPluginError):
        registry.one("strategy", "something_else")
    assert registry.one("strategy", "same_name").version == "1.0"
    assert problems(registry, "upgraded") == [
        "version 2.0 has been installed, but another one is at work until a restart"
    ]


# -- by hand, and time -----------------------------------------------------------------------------------------------


def test_any_object_with_hooks_can_be_registered_by_hand() -> None:
    class Hooks:
        @hookimpl
        def fabric_strategies(self) -> list[StrategySpec]:
            return [StrategySpec("by_hand", "a.b:C")]

    registry = Registry(environ={}, find=list)
    registry.register(Hooks(), distribution="mine")
    assert registry.one("strategy", "by_hand@mine").version == "0"
    simple = SimpleNamespace(fabric_strategies=hookimpl(lambda: [StrategySpec("simple", "a.b:C")]))
    registry.register(simple, distribution="other")
    assert registry.one("strategy", "simple").distribution == "other"


TIMED = """
import json, sys, time
sys.path.insert(0, {folder!r})
{first}
from fabric_core.registry import Registry
started = time.process_time()
registry = Registry(environ={{}})
seconds = time.process_time() - started
print(json.dumps({{
    "seconds": seconds,
    "parts": len([o for o in registry.offers("strategy") if o.distribution.startswith("plugin-")]),
    "torch": "torch" in sys.modules,
    "problems": [str(p) for p in registry.problems],
}}))
"""


def test_hundreds_of_distributions_are_searched_within_sixty_milliseconds(
    site: Site, python: Run, least: Any
) -> None:
    for number in range(300):
        site.install(f"foreign-{number}", entry_points="[console_scripts]\nx = y:z\n")
    for number in range(20):
        site.install_strategy(f"plugin-{number}", f"strategy_{number}")

    def measure() -> float:
        ended = python("-c", TIMED.format(folder=str(site.folder), first=""))
        assert ended.returncode == 0, ended.stderr
        found = json.loads(ended.stdout)
        assert (found["parts"], found["torch"], found["problems"]) == (20, False, [])
        return float(found["seconds"])

    measure()  # the first writes the bytecode
    assert least(measure, 0.060) < 0.060


@pytest.mark.parametrize(
    "first", ["import importlib_metadata", "import importlib.metadata, pkgutil", "import torch"]
)
def test_what_was_imported_first_changes_nothing(site: Site, python: Run, first: str) -> None:
    pytest.importorskip(first.split()[1].rstrip(","))
    site.install_strategy("plugin-1", "strategy_1")
    site.install("foreign", entry_points="[broken")
    ended = python("-c", TIMED.format(folder=str(site.folder), first=first))
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert (found["parts"], found["problems"]) == (1, [])


def test_distribution_names_are_compared_as_pip_does() -> None:
    assert {discovery.canonical(name) for name in ("Fabric_Core", "fabric.core", "fabric--core")} == {
        "fabric-core"
    }


def test_the_version_of_what_is_not_installed_is_none() -> None:
    assert discovery.installed_version("a-distribution-that-nobody-has") is None
    assert discovery.installed_version("fabric_core") is not None

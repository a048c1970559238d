"""The conformance kit as pytest runs it: what is refused, what is strict, what is written, and what is left alone."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from fabric_core.testing import ClusterEnvironmentConformance, fresh
from fabric_core.testing.fresh import ask, run_side_by_side
from fabric_core.testing.manifest import SPIED
from fabric_core.testing.places import KEPT, Place, for_all, job, only_environment

pytest_plugins = ["pytester"]

LOCAL = """
from fabric_core.testing import ClusterEnvironmentConformance

class TestLocal(ClusterEnvironmentConformance):
    name = "local"
    expected_failures = {expected!r}

    def variables(self, place, folder):
        return {{
            "FABRIC_LAUNCHED": "1", "MASTER_ADDR": place.main_address, "MASTER_PORT": str(place.main_port),
            "RANK": str({rank}), "LOCAL_RANK": str(place.local_rank), "NODE_RANK": str(place.node_rank),
            "WORLD_SIZE": str(place.world_size), "LOCAL_WORLD_SIZE": str(place.processes_per_node),
        }}
"""
WRONG_RANK = "place.local_rank"  # which ignores the node
TWICE = "test_teardown_can_be_called_twice"
COUNTED = "test_global_ranks_count_every_process_of_the_job_once"
CHEAP = f"{TWICE} or {COUNTED}"


def run(
    pytester: pytest.Pytester, *words: str, rank: str = "place.global_rank", **expected: str
) -> pytest.RunResult:
    """Run a conformance class of the local environment, and a test that is none."""
    pytester.makepyfile(
        test_local=LOCAL.format(expected=expected, rank=rank), test_other="def test_other(): pass"
    )
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", f"{CHEAP} or test_other", *words)


def written(pytester: pytest.Pytester, name: str = "fabric-conformance.json") -> dict[str, Any]:
    report: dict[str, Any] = json.loads((pytester.path / name).read_text())
    return report


# -- what a class may say --------------------------------------------------------------------------------------------


def test_a_class_that_replaces_a_check_of_the_kit_is_refused() -> None:
    with pytest.raises(TypeError, match=rf"replaces {TWICE}.*expected_failures"):
        type("TestMine", (ClusterEnvironmentConformance,), {TWICE: lambda self: None})


def test_a_mixin_that_replaces_a_check_is_refused_as_well() -> None:
    mixin = type("Mixin", (), {TWICE: lambda self: None})
    with pytest.raises(TypeError, match=TWICE):
        type("TestMine", (mixin, ClusterEnvironmentConformance), {})


def test_a_class_may_add_checks_of_its_own() -> None:
    cls = type("TestMine", (ClusterEnvironmentConformance,), {"test_mine": lambda self: None})
    assert type("TestOurs", (cls,), {"test_mine": lambda self: None})


def test_a_check_that_is_none_cannot_be_expected_to_fail() -> None:
    with pytest.raises(TypeError, match=r"expects test_tear_down to fail.*does not have"):
        type("TestMine", (ClusterEnvironmentConformance,), {"expected_failures": {"test_tear_down": "why"}})


@pytest.mark.parametrize("reason", ["", "  ", None])
def test_an_expected_failure_needs_a_reason(reason: Any) -> None:
    with pytest.raises(TypeError, match="does not say why"):
        type("TestMine", (ClusterEnvironmentConformance,), {"expected_failures": {TWICE: reason}})


# -- as pytest runs it -----------------------------------------------------------------------------------------------


def test_what_was_found_is_a_table_and_a_file(pytester: pytest.Pytester) -> None:
    ended = run(pytester)
    ended.assert_outcomes(passed=3, deselected=17)
    ended.stdout.fnmatch_lines(
        ["*= conformance =*", "part *passed *failed*", "cluster environment local *2 *"]
    )
    report = written(pytester)
    assert report["format"] == 1
    assert report["plugins"].keys() == {"fabric-core"}
    assert report["core"] == report["plugins"]["fabric-core"]
    assert report["contracts"]["cluster environment"] >= 1
    results = {result["test"]: result for result in report["results"]}
    assert sorted(results) == sorted([TWICE, COUNTED])
    entry = results[TWICE]
    assert {entry[key] for key in ("kind", "name", "class")} == {"cluster environment", "local", "TestLocal"}
    assert (entry["outcome"], entry["distribution"]) == ("passed", "fabric-core")


def test_the_file_can_go_elsewhere_or_nowhere(pytester: pytest.Pytester) -> None:
    run(pytester, "--fabric-conformance=elsewhere.json")
    assert written(pytester, "elsewhere.json")["results"]
    run(pytester, "--fabric-conformance=")
    assert [path.name for path in pytester.path.glob("*.json")] == ["elsewhere.json"]


def test_a_failure_says_what_is_wrong(pytester: pytest.Pytester) -> None:
    ended = run(pytester, rank=WRONG_RANK)
    ended.assert_outcomes(passed=2, failed=1, deselected=17)
    (entry,) = (result for result in written(pytester)["results"] if result["outcome"] == "failed")
    assert entry["test"] == COUNTED
    assert "the global ranks of" in entry["reason"]


def test_an_expected_failure_is_told_with_its_reason(pytester: pytest.Pytester) -> None:
    ended = run(pytester, rank=WRONG_RANK, **{COUNTED: "nodes do not know each other"})
    ended.assert_outcomes(passed=2, xfailed=1, deselected=17)
    ended.stdout.fnmatch_lines(
        [f"expected: cluster environment local: {COUNTED}: nodes do not know each other"]
    )
    (entry,) = (result for result in written(pytester)["results"] if result["test"] == COUNTED)
    assert (entry["outcome"], entry["reason"]) == ("expected failure", "nodes do not know each other")


def test_an_expected_failure_that_passes_is_a_failure(pytester: pytest.Pytester) -> None:
    ended = run(pytester, **{TWICE: "long repaired"})
    ended.assert_outcomes(passed=2, failed=1, deselected=17)
    (entry,) = (result for result in written(pytester)["results"] if result["test"] == TWICE)
    assert entry["outcome"] == "failed"


def test_a_part_that_is_not_installed_fails_every_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(LOCAL.format(expected={}, rank="0").replace('"local"', '"lokal"'))
    ended = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", CHEAP)
    ended.assert_outcomes(failed=2, deselected=17)
    ended.stdout.fnmatch_lines(["*No cluster environment is named 'lokal'*Did you mean 'local'*"])
    assert written(pytester)["plugins"].keys() == {"not installed"}


def test_a_suite_without_conformance_classes_is_left_alone(pytester: pytest.Pytester) -> None:
    """Wherever the core is installed, pytest loads the plugin."""
    pytester.makepyfile("""
        import sys

        def test_the_plugin_is_light(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("fabric-conformance")
            assert not {"torch", "hypothesis", "fabric_core.testing.conformance"} & set(sys.modules)
    """)
    quiet = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    ended = pytester.runpytest_subprocess(*quiet)
    ended.assert_outcomes(passed=1)
    assert "= conformance =" not in ended.stdout.str()
    assert list(pytester.path.glob("*.json")) == []


# -- what the checks are made with -----------------------------------------------------------------------------------


def test_an_environment_of_its_own_holds_what_it_is_given_and_is_put_back() -> None:
    before = dict(os.environ)
    with only_environment({"A": "1"}) as inside:
        assert dict(os.environ) == inside
        assert set(inside) <= {*KEPT, "A"}
        os.environ["B"] = "2"
    assert dict(os.environ) == before


def test_places_count_every_process_of_a_job() -> None:
    assert [place.global_rank for place in job(2, 3)] == list(range(6))
    assert Place(1, 2, 2, 3).world_size == 6


def test_a_property_that_does_not_hold_fails_with_the_same_example_each_time() -> None:
    def failure() -> str:
        with pytest.raises(AssertionError) as raised:
            for_all(50, small, number=st.integers(0, 1000))
        return str(raised.value).splitlines()[0]

    def small(number: int) -> None:
        assert number < 10, f"{number} is not small"

    assert failure() == failure() == "10 is not small"


def test_a_fresh_process_that_fails_or_says_nothing_is_told() -> None:
    assert ask("answer([1, sys.argv[1]])", "x") == [1, "x"]
    with pytest.raises(AssertionError, match=r"ended with 1(.*\n)*.*ValueError: no luck"):
        ask("raise ValueError('no luck')")
    with pytest.raises(AssertionError, match="did not answer"):
        ask("pass")
    with pytest.raises(AssertionError, match=r"not ended after 0\.5 s"):
        ask("import time; time.sleep(30)", timeout=0.5)


def test_processes_side_by_side_end_with_the_first_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleeping_program.py").write_text(
        "import os, time\n"
        "def main(arguments):\n"
        "    if os.environ['WHO'] == '1':\n"
        "        raise ValueError('no luck')\n"
        "    time.sleep(60)\n"
    )
    environs = [{**os.environ, "PYTHONPATH": str(tmp_path), "WHO": who} for who in "01"]
    began = time.monotonic()
    with pytest.raises(AssertionError, match="ValueError: no luck"):
        run_side_by_side("sleeping_program", {}, environs)
    assert time.monotonic() - began < 50


def test_a_hooks_module_that_reads_the_environment_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "nosy_hooks.py").write_text(
        "import os\nos.environ['NOSY'] = '1'\ndef fabric_strategies():\n    yield os.getenv('HOME')\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    found = ask(SPIED, json.dumps(["nosy_hooks"]), environ={"PYTHONPATH": path})
    assert found == {"read": ["HOME (nosy_hooks)"], "changed": ["NOSY"]}
    assert fresh.ANSWER

"""The checks of a cluster environment: who every process of a job is, and where they meet."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.errors import ConfigurationError
from fabric_core.resolve.hardware import detection
from fabric_core.specs import Detection
from fabric_core.testing.conformance import PartConformance
from fabric_core.testing.fresh import ask, run_side_by_side
from fabric_core.testing.needs import why_no_plan
from fabric_core.testing.places import Place, for_all, job, only_environment

EXAMPLES = 25

_RANKS_OF_OTHERS = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "NODE_RANK": "0",
    "GROUP_RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}

FOREIGN: Mapping[str, Mapping[str, str]] = {
    "no job at all": {},
    "a job of an unknown starter": _RANKS_OF_OTHERS,
    "a job of 'fabric run'": {"FABRIC_LAUNCHED": "1", **_RANKS_OF_OTHERS},
}
"""What the environment variables hold where somebody else, or nobody, has started the processes."""

GARBLED = ("x", "", "-1", "1.5")
"""What a variable that holds a number may have been changed to."""

RANKS = ("world_size", "global_rank", "local_rank", "node_rank")
PLACES = ("main_address", "main_port")


class ClusterEnvironmentConformance(PartConformance):
    """Checks of a cluster environment, over the variables that its scheduler sets.

    A subclass states `variables`. Nothing is started but one job of two processes, with those variables.

    Attributes:
        max_nodes: The most nodes that a job can have. 4 by default, which shows all that there is to see.
        max_processes_per_node: The most processes that a node can have. 4 by default; 1 where a node is a process.
        recognises_one_process: Whether a job of one process is detected as well, as it is by default.
    """

    kind = "cluster environment"

    max_nodes: ClassVar[int] = 4
    max_processes_per_node: ClassVar[int] = 4
    recognises_one_process: ClassVar[bool] = True

    def variables(self, place: Place, folder: Path) -> Mapping[str, str]:
        """The environment variables that the scheduler sets for one process, and the files that they point to.

        Args:
            place: Which process of which job. A scheduler that says where ranks meet says ``place.main_address`` and
                ``place.main_port``; one that leaves that open is believed.
            folder: For files; empty at first, and the same for all processes of a job.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has to state which variables the scheduler sets: variables(place, folder)"
        )

    def around(self, place: Place) -> AbstractContextManager[Any]:
        """What else is to be so while this process stands for another one, such as the name of the host.

        Nothing by default. The job of two processes runs without it.
        """
        return nullcontext()

    # -- detection ------------------------------------------------------------------------------------------------

    def test_detection_tells_the_size_of_the_job(self, tmp_path: Path) -> None:
        """Numbers that a detection states are those of the job; a plan is made of them."""

        def check(place: Place) -> None:
            with self._at(place, tmp_path) as environ:
                found = self._detect(environ)
            if found is None:
                alone = place.world_size == 1 and not self.recognises_one_process
                assert alone, (
                    f"it does not recognise its own job of {place.world_size} process(es): {environ}"
                )
                return
            told = found.processes_per_node, found.num_nodes
            for number, true, what in zip(
                told,
                (place.processes_per_node, place.num_nodes),
                ("processes_per_node", "num_nodes"),
                strict=True,
            ):
                assert number in (None, true), f"its detection says {what}={number} of {place}"

        self._need_detection()
        for_all(EXAMPLES, check, place=self._places())

    def test_detection_leaves_foreign_jobs_alone(self, tmp_path: Path) -> None:
        """Where others, or nobody, have started the process, the answer is None."""
        self._need_detection()
        own = set(self.variables(Place(0, 0, 1, 1), tmp_path))
        for whose, environ in FOREIGN.items():
            if own <= set(environ):
                continue  # these are its own variables
            with only_environment(environ) as inside:
                found = self._detect(inside)
            assert found is None, f"it takes {whose} for its own ({found.note}): {dict(environ)}"

    def test_detection_does_not_raise(self, tmp_path: Path) -> None:
        """Missing or garbled variables are an answer as well: everybody's jobs ask every environment."""
        self._need_detection()
        for name, value, place in self._changes(tmp_path):
            with self._at(place, tmp_path, name, value) as environ:
                try:
                    self._detect(environ)
                except Exception as error:
                    pytest.fail(f"its detection fails where {name} is {_told(value)}: {error}")

    def test_detection_changes_nothing(self, tmp_path: Path) -> None:
        """Neither what it is given, nor the environment of the process."""
        self._need_detection()
        with self._at(self._last_place, tmp_path) as environ:
            given = dict(environ)
            self._detect(given)
            assert given == environ, "its detection changes the variables that it is given"
            assert dict(os.environ) == environ, "its detection changes os.environ"

    def test_detection_reads_what_it_is_given(self, tmp_path: Path) -> None:
        """It is asked about other processes, too, so that os.environ is none of its business."""
        self._need_detection()
        environ = dict(self.variables(self._last_place, tmp_path))
        with only_environment({}), self.around(self._last_place):
            assert self._detect(environ) is not None, "its detection reads os.environ instead of its argument"

    def test_detection_imports_nothing_heavy_and_is_quick(self, tmp_path: Path) -> None:
        """It runs in every command, also in those that train nothing."""
        detect = self._need_detection()
        if not isinstance(detect, str):
            pytest.skip("its detection is a function that is imported already")
        environ = dict(self.variables(self._last_place, tmp_path))
        code = """
import fabric_core, fabric_core.contracts.cluster_environment, time
from fabric_core.targets import import_target
before = set(sys.modules)
target, environ = json.loads(sys.argv[1])
began = time.process_time()
detect = import_target(target, "the kit")
detect({}), detect(environ)
seconds = time.process_time() - began
heavy = {"torch", "numpy", "pandas", "scipy", "tensorflow", "jax"} & (set(sys.modules) - before)
answer([seconds, sorted(heavy)])
"""
        import json

        asked = json.dumps([detect, environ])
        seconds, heavy = min(
            (ask(code, asked, environ=environ) for _ in range(2)), key=lambda answer: answer[0]
        )
        assert not heavy, f"its detection imports {', '.join(heavy)}"
        assert seconds < 0.1, f"its detection takes {seconds:.2f} s of CPU time"

    # -- ranks ----------------------------------------------------------------------------------------------------

    def test_the_world_size_is_nodes_times_processes(self, tmp_path: Path) -> None:
        """On every rank of every job."""

        def check(place: Place) -> None:
            size = self._ask(place, tmp_path)["world_size"]
            assert size == place.world_size, f"world_size() is {size} for {place}"

        for_all(EXAMPLES, check, place=self._places())

    def test_node_and_local_rank_are_those_of_the_process(self, tmp_path: Path) -> None:
        """A device is chosen by the local rank, and files are written once per node."""

        def check(place: Place) -> None:
            answers = self._ask(place, tmp_path)
            found = answers["node_rank"], answers["local_rank"]
            assert found == (place.node_rank, place.local_rank), (
                f"node and local rank are {found} for {place}"
            )

        for_all(EXAMPLES, check, place=self._places())

    def test_global_ranks_count_every_process_of_the_job_once(self, tmp_path: Path) -> None:
        """From 0 to the world size, exclusive; a rank that ignores the node occurs twice."""

        def check(place: Place) -> None:
            ranks = [
                self._ask(other, tmp_path)["global_rank"]
                for other in job(place.num_nodes, place.processes_per_node)
            ]
            assert sorted(ranks) == list(range(place.world_size)), (
                f"the global ranks of {place.num_nodes} node(s) with {place.processes_per_node} process(es) are {ranks}"
            )

        for_all(EXAMPLES // 2, check, place=self._places())

    def test_all_ranks_meet_at_one_address_and_port(self, tmp_path: Path) -> None:
        """The same on every rank, and one that can be connected to."""

        def check(place: Place) -> None:
            places = job(place.num_nodes, place.processes_per_node)
            meeting = {tuple(self._ask(other, tmp_path)[name] for name in PLACES) for other in places}
            assert len(meeting) == 1, (
                f"the ranks of one job would meet at different places: {sorted(meeting)}"
            )
            address, port = meeting.pop()
            assert isinstance(address, str), f"main_address is {address!r}"
            assert address, "main_address is empty"
            assert port in range(1, 65536), f"main_port is {port!r}"

        for_all(EXAMPLES // 2, check, place=self._places())

    def test_the_processes_of_its_job_are_there_already(self, tmp_path: Path) -> None:
        """Otherwise every process would start others."""
        answers = self._ask(self._last_place, tmp_path)
        assert answers["creates_processes_externally"] is True

    def test_single_node_is_true_on_one_node_only(self, tmp_path: Path) -> None:
        """Where it is true, nothing listens beyond loopback, so that other nodes could not join."""
        if self.max_nodes == 1:
            pytest.skip("its jobs have one node")
        place = Place(self.max_nodes - 1, 0, self.max_nodes, self.max_processes_per_node)
        assert self._ask(place, tmp_path)["single_node"] is False, f"single_node is true for {place}"

    def test_it_answers_the_same_when_asked_twice(self, tmp_path: Path) -> None:
        """A rank is asked for again and again."""
        with self._at(self._last_place, tmp_path):
            environment = self.make()
            first, second = _answers(environment), _answers(environment)
        assert first == second

    # -- what is wrong --------------------------------------------------------------------------------------------

    def test_a_missing_variable_is_named_in_a_clear_error(self, tmp_path: Path) -> None:
        """A ConfigurationError names it; or the answers do not depend on it. Never a KeyError, never a wrong rank."""
        self._hold_changes([change for change in self._changes(tmp_path) if change[1] is None], tmp_path)

    def test_a_garbled_variable_is_named_in_a_clear_error(self, tmp_path: Path) -> None:
        """Likewise where it holds no number. Never a ValueError, never a wrong rank."""
        self._hold_changes([change for change in self._changes(tmp_path) if change[1] is not None], tmp_path)

    def test_outside_of_its_job_it_answers_or_says_what_is_missing(self) -> None:
        """By name it can be asked for anywhere."""
        with only_environment({}):
            _, errors = _answers_or_errors(self.make)
        for question, error in errors.items():
            assert isinstance(error, ConfigurationError), f"{question}: {type(error).__name__}: {error}"

    def test_a_job_of_another_size_is_refused(self, tmp_path: Path) -> None:
        """Training on fewer or more processes than were asked for would go unnoticed."""
        place = self._last_place
        with self._at(place, tmp_path):
            environment = self.make()
            environment.validate(place.processes_per_node, place.num_nodes)
            for nodes in (place.num_nodes + 1, place.num_nodes + 7):
                with pytest.raises(ConfigurationError):
                    environment.validate(place.processes_per_node, nodes)

    def test_teardown_can_be_called_twice(self, tmp_path: Path) -> None:
        """It is, where a job fails while it is closed."""
        with self._at(self._last_place, tmp_path):
            environment = self.make()
            environment.teardown()
            environment.teardown()

    # -- a job ----------------------------------------------------------------------------------------------------

    def test_two_processes_meet_and_train(self, tmp_path: Path) -> None:
        """A job of two processes, started with these variables, ends with the numbers of a plain loop."""
        from fabric_core.testing.programs import small_training

        nodes, per_node = (1, 2) if self.max_processes_per_node > 1 else (2, 1)
        places = list(job(nodes, per_node, main_port=_free_port()))
        environs = []
        for place in places:
            with only_environment(self.variables(place, tmp_path)) as environ:
                environs.append(environ)
        self.make()
        why_not = why_no_plan()
        arguments = {
            "trains": not why_not,
            "environment": (self.kind, self.name, dict(self.options)),
            "fabric": {"accelerator": "cpu", "devices": per_node, "num_nodes": nodes},
        }
        answers = run_side_by_side("fabric_core.testing.programs.meeting", arguments, environs)
        ranks = [(place.global_rank, place.local_rank, place.node_rank, 2) for place in places]
        assert sorted(answer["rank"] for answer in answers) == sorted(ranks)
        for answer in answers:
            if why_not:
                assert answer["heard"] == [0, 1]
            else:
                assert small_training.distance(answer, small_training.plain()) < 1e-5

    # -- how it is asked ------------------------------------------------------------------------------------------

    @property
    def _last_place(self) -> Place:
        """The last process of a job of two nodes with two processes each, as far as there may be as many."""
        nodes, processes = min(self.max_nodes, 2), min(self.max_processes_per_node, 2)
        return Place(nodes - 1, processes - 1, nodes, processes)

    def _places(self) -> Any:
        from hypothesis import strategies as st

        return (
            st.tuples(st.integers(1, self.max_nodes), st.integers(1, self.max_processes_per_node))
            .flatmap(
                lambda size: st.tuples(
                    st.integers(0, size[0] - 1), st.integers(0, size[1] - 1), *map(st.just, size)
                )
            )
            .map(lambda numbers: Place(*numbers))
        )

    @contextmanager
    def _at(
        self, place: Place, folder: Path, changed: str | None = None, value: str | None = None
    ) -> Iterator[dict[str, str]]:
        """Stand for a process; with one variable missing or changed, perhaps."""
        variables = dict(self.variables(place, folder))
        if changed is not None:
            variables.pop(changed)
            variables |= {} if value is None else {changed: value}
        with only_environment(variables) as environ, self.around(place), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield environ

    def _ask(self, place: Place, folder: Path) -> dict[str, Any]:
        with self._at(place, folder):
            return _answers(self.make())

    def _need_detection(self) -> Any:
        if self.spec.detect is None:
            pytest.skip("it is only ever asked for by name: its spec has no detect")
        return self.spec.detect

    def _detect(self, environ: Mapping[str, str]) -> Detection | None:
        return detection(self.spec, environ)

    def _changes(self, folder: Path) -> list[tuple[str, str | None, Place]]:
        """Every variable missing; and each that holds a number, garbled."""
        place = self._last_place
        variables = self.variables(place, folder)
        missing: list[tuple[str, str | None, Place]] = [(name, None, place) for name in variables]
        numbers = [name for name, value in variables.items() if value.isdigit()]
        return missing + [(name, text, place) for name in numbers for text in GARBLED]

    def _hold_changes(self, changes: list[tuple[str, str | None, Place]], folder: Path) -> None:
        wrong = []
        for name, value, place in changes:
            with self._at(place, folder):
                true, _ = _answers_or_errors(self.make)
            with self._at(place, folder, name, value):
                answers, errors = _answers_or_errors(self.make)
            fault = _fault(name, true, answers, errors)
            if fault:
                wrong.append(f"where {name} is {_told(value)}, {fault}")
        assert not wrong, "\n".join(wrong)


def _answers(environment: ClusterEnvironment) -> dict[str, Any]:
    return {name: question(environment) for name, question in QUESTIONS.items()}


def _answers_or_errors(make: Callable[[], ClusterEnvironment]) -> tuple[dict[str, Any], dict[str, Exception]]:
    answers: dict[str, Any] = {}
    errors: dict[str, Exception] = {}
    try:
        environment = make()
    except Exception as error:
        return {}, {"making it": error}
    for name, question in QUESTIONS.items():
        try:
            answers[name] = question(environment)
        except Exception as error:
            errors[name] = error
    return answers, errors


def _fault(
    name: str, true: Mapping[str, Any], answers: Mapping[str, Any], errors: Mapping[str, Exception]
) -> str:
    """What is wrong with the answers where a variable was changed; empty when nothing is."""
    for question, error in errors.items():
        if not isinstance(error, ConfigurationError):
            return f"{question} raises {type(error).__name__} instead of a ConfigurationError: {error}"
    if errors:
        named = any(name in str(error) for error in errors.values())
        return "" if named else f"the error does not name the variable: {next(iter(errors.values()))}"
    if not answers["creates_processes_externally"]:
        return ""  # it takes the process for one that nobody has started
    differ = [
        f"{rank} is {answers[rank]} instead of {true[rank]}" for rank in RANKS if answers[rank] != true[rank]
    ]
    return " and ".join(differ)


QUESTIONS: Mapping[str, Callable[[ClusterEnvironment], Any]] = {
    "creates_processes_externally": lambda environment: environment.creates_processes_externally,
    "world_size": lambda environment: environment.world_size(),
    "global_rank": lambda environment: environment.global_rank(),
    "local_rank": lambda environment: environment.local_rank(),
    "node_rank": lambda environment: environment.node_rank(),
    "main_address": lambda environment: environment.main_address,
    "main_port": lambda environment: environment.main_port,
    "single_node": lambda environment: environment.single_node,
}


def _told(value: str | None) -> str:
    return "missing" if value is None else repr(value)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])

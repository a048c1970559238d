"""Hearing that the job is to be stopped, in one process: whose handler is called when, and what reading costs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from fabric_core import Fabric
from fabric_core.errors import ConfigurationError, SetupError
from fabric_core.parts.local import LocalEnvironment
from fabric_core.preemption import reads_between, signal_number

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What was installed before is installed afterwards."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    assert {signum: signal.getsignal(signum) for signum in before} == before


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with Fabric(accelerator="cpu", devices=1) as made:
        yield made


def test_a_signal_turns_it_true_and_it_stays_so(fabric: Fabric) -> None:
    assert not fabric.preempted
    signal.raise_signal(signal.SIGTERM)
    assert [fabric.preempted for _ in range(3)] == [True] * 3


def test_nothing_is_installed_before_it_is_asked_for_and_nothing_left_after_the_end() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.launch()
        assert signal.getsignal(signal.SIGTERM) is before
        assert not fabric.preempted
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_signals_are_chosen_by_name_or_number(fabric: Fabric) -> None:
    before = signal.getsignal(signal.SIGTERM)
    fabric.watch_for_preemption("usr1", signal.SIGUSR2)
    assert signal.getsignal(signal.SIGTERM) is before
    signal.raise_signal(signal.SIGUSR2)
    assert fabric.preempted


def test_a_signal_that_is_asked_for_twice_is_heard_once_and_its_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.watch_for_preemption("SIGTERM", "term", signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert fabric.preempted
    fabric.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_of_two_that_listen_the_second_goes_on_when_the_first_has_ended() -> None:
    before = signal.getsignal(signal.SIGTERM)
    first, second = (Fabric(accelerator="cpu", devices=1) for _ in range(2))
    for fabric in (first, second):
        fabric.launch()
        assert not fabric.preempted
    first.close()
    os.kill(os.getpid(), signal.SIGTERM)  # which the first would have left to the system
    assert second.preempted
    second.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_may_be_an_announcement_and_a_second_one_interrupts(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fabric_core.preemption._SAME_NOTICE", 0.05)
    fabric.watch_for_preemption("SIGINT")
    signal.raise_signal(signal.SIGINT)
    assert fabric.preempted
    time.sleep(0.06)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_handler_that_was_there_is_called_each_time_and_put_back() -> None:
    calls: list[int] = []

    def users(signum: int, _: Any) -> None:
        calls.append(signum)

    before = signal.signal(signal.SIGUSR1, users)
    try:
        with Fabric(accelerator="cpu", devices=1) as fabric:
            fabric.watch_for_preemption("SIGUSR1")
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            assert fabric.preempted
        assert signal.getsignal(signal.SIGUSR1) is users
        assert calls == [signal.SIGUSR1] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_the_user_installs_later_is_theirs(fabric: Fabric) -> None:
    assert not fabric.preempted
    ours, users = signal.getsignal(signal.SIGTERM), lambda *_: None
    signal.signal(signal.SIGTERM, users)
    fabric.close()
    assert signal.getsignal(signal.SIGTERM) is users
    signal.signal(signal.SIGTERM, ours)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("later", [False, True])
def test_the_same_notice_may_come_twice_but_a_second_signal_ends_the_process(later: bool) -> None:
    """A scheduler and a supervisor may both pass one notice on, a moment apart."""
    child = os.fork()
    if child == 0:
        with Fabric(accelerator="cpu", devices=1) as fabric:
            assert not fabric.preempted
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            if later:
                time.sleep(2.1)
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7 if fabric.preempted else 8)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGTERM if later else 7)


@pytest.mark.parametrize(("sent", "ends"), [("SIGTERM", True), ("SIGUSR1", False)])
def test_a_forked_process_ends_when_it_is_told_to_and_is_spared_by_a_notice(
    fabric: Fabric, sent: str, ends: bool
) -> None:
    """A scheduler that announces an end sends it to the workers of the loaders, too."""
    fabric.watch_for_preemption("SIGTERM", "SIGUSR1")
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.Signals[sent])
        time.sleep(0.01)
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGTERM if ends else 7)
    assert not fabric.preempted


class Announcing(LocalEnvironment):
    """A cluster that says when it will start the job again."""

    requeue_requested = False
    accepted = 0

    def accept_requeue(self) -> None:
        self.accepted += 1


def test_what_the_cluster_announces_is_heard_and_accepted_once() -> None:
    environment = Announcing()
    with Fabric(accelerator="cpu", devices=1, plugins=[environment]) as fabric:
        assert not fabric.preempted
        environment.requeue_requested = True
        assert fabric.preempted
        assert fabric.preempted
    assert environment.accepted == 1


def test_a_signal_that_the_cluster_does_not_mean_starts_nothing_again() -> None:
    """SIGTERM is what ``scancel`` sends."""
    environment = Announcing()
    with Fabric(accelerator="cpu", devices=1, plugins=[environment]) as fabric:
        assert not fabric.preempted
        signal.raise_signal(signal.SIGTERM)
        assert fabric.preempted
    assert environment.accepted == 0


def test_outside_of_the_main_thread_one_is_told_that_this_rank_hears_nothing(fabric: Fabric) -> None:
    caught: list[str] = []
    fabric.launch()

    def read() -> None:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert not fabric.preempted
        caught.extend(str(warning.message) for warning in warned)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    (sentence,) = caught
    assert "Call fabric.watch_for_preemption() in the main thread before" in sentence


def test_what_cannot_be_heard_is_refused(fabric: Fabric) -> None:
    with pytest.raises(ConfigurationError, match="'SIGUSR9' is no signal of this system"):
        fabric.watch_for_preemption("SIGUSR9")
    with pytest.raises(ConfigurationError, match="No process can hear 'kill'"):
        fabric.watch_for_preemption("kill")
    fabric.watch_for_preemption()
    with pytest.raises(SetupError, match="is listening already"):
        fabric.watch_for_preemption("SIGUSR1")
    assert signal_number(15) == signal.SIGTERM


def test_the_next_agreement_is_half_a_second_of_the_slowest_steps_away() -> None:
    assert reads_between(1, 0.0) == 2, "nothing is known yet"
    assert [reads_between(64, step) for step in (1e-4, 0.01, 0.1, 0.4, 3.0)] == [64, 50, 5, 1, 1]
    assert reads_between(4, 0.01) == 8, "the past of a loop is not its future"


def test_reading_costs_a_few_microseconds(fabric: Fabric) -> None:
    assert not fabric.preempted
    count = 20_000
    best = min(_seconds(fabric, count) for _ in range(3))
    assert best / count < 10e-6


def _seconds(fabric: Fabric, count: int) -> float:
    started = time.process_time()
    for _ in range(count):
        fabric.preempted  # noqa: B018
    return time.process_time() - started

"""The checks of a launcher: what it starts, what comes back, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fabric_core.testing.conformance import PartConformance
from fabric_core.testing.fresh import ANSWER, environment_without_a_job
from fabric_core.testing.needs import need_plan
from fabric_core.testing.programs import small_training
from fabric_core.testing.ranks import MARK, end_leftovers

IN_A_PROMPT = """
import json, sys
from fabric_core.contracts.launcher import LaunchJob
from fabric_core.errors import LaunchError
from fabric_core.registry import default_registry
from fabric_core.testing.parts import made
name, options = json.loads(sys.argv[1])
def function():
    return 7
try:
    answer = made(default_registry().one("launcher", name), options).launch(function, LaunchJob(1))
except LaunchError as error:
    answer = "LaunchError"
print({mark!r} + json.dumps(answer), flush=True)
"""

ALL = ("who", "alone", "fail", "be_killed")
"""What is launched in one script, where launches return."""


@dataclass(frozen=True)
class Seen:
    """What is known of a launch.

    Attributes:
        told: By the script that launched, after the launch: nothing, where the launch does not return.
        ranks: What each rank said of itself, by rank.
        code: The exit code of the script.
        err: What was printed.
        seconds: How long the launch took.
        left: Processes that outlived the script.
    """

    told: dict[str, Any]
    ranks: dict[int, dict[str, Any]]
    code: int
    err: str
    seconds: float
    left: tuple[str, ...]


class LauncherConformance(PartConformance):
    """Checks of a launcher, in scripts of their own.

    Attributes:
        seconds: How long a launch may take until its processes are there, or have ended after one of them failed. 30
            by default.
    """

    kind = "launcher"

    seconds: ClassVar[float] = 30.0

    # -- a launch -------------------------------------------------------------------------------------------------

    def test_every_process_finds_its_place_in_the_documented_variables(self) -> None:
        """As many processes as were asked for, numbered from 0, with one place to meet."""
        seen = self._seen("who")
        assert sorted(seen.ranks) == [0, 1], f"the ranks that ran are {sorted(seen.ranks)}\n{seen.err}"
        for rank, answer in seen.ranks.items():
            wanted = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": 2,
                "NODE_RANK": 0,
                "WORLD_SIZE": 2,
            }
            found = {name: answer[name] for name in wanted}
            assert found == {name: str(value) for name, value in wanted.items()}, f"rank {rank} finds {found}"
        meeting = {(answer["MASTER_ADDR"], answer["MASTER_PORT"]) for answer in seen.ranks.values()}
        assert len(meeting) == 1, f"the ranks would meet at different places: {meeting}"
        address, port = meeting.pop()
        assert address, "MASTER_ADDR is missing"
        assert str(port).isdigit(), f"MASTER_PORT is {port!r}"

    def test_every_rank_is_a_process_of_its_own(self) -> None:
        """And none of them is the parent."""
        pids = {answer["pid"] for answer in self._seen("who").ranks.values()}
        assert len(pids) == 2

    def test_one_process_can_be_asked_for(self) -> None:
        """A job of one is a job."""
        seen = self._seen("alone")
        assert sorted(seen.ranks) == [0]
        assert seen.ranks[0]["WORLD_SIZE"] == "1"

    def test_a_launch_returns_what_rank_zero_returned(self) -> None:
        """Where it returns at all; one that starts the script again ends with it."""
        seen = self._seen("who")
        if self.spec.needs_function:
            assert seen.told, f"its spec says needs_function=True, but the launch does not return\n{seen.err}"
            assert seen.told["result"] == seen.ranks[0], "the result is not that of rank 0"
        else:
            assert not seen.told, "its spec says needs_function=False, but the launch returns in the parent"
            assert seen.code == 0, (
                f"the script ends with {seen.code}, though all ranks ended well\n{seen.err}"
            )

    def test_several_launches_work_in_one_program(self) -> None:
        """Also after one that failed."""
        if not self.spec.needs_function:
            pytest.skip("a launch of it ends the program")
        for name in ALL:
            assert self._seen(name).told, f"the launch {name!r} did not come to its end"

    def test_it_works_without_a_script_where_it_says_so(self) -> None:
        """In a notebook or at a prompt; elsewhere it is one clear error there."""
        self.make()
        asked = json.dumps([self.name, dict(self.options)])
        with self._program("-c", IN_A_PROMPT.format(mark=ANSWER), asked) as (process, folder):
            _wait_for(process, 2 * self.seconds)
            out, err = _printed(folder, "out"), _printed(folder, "err")
        answers = [line.removeprefix(ANSWER) for line in out.splitlines() if line.startswith(ANSWER)]
        assert answers, f"without a script, it ends with {process.returncode} and no LaunchError:\n{err}"
        answer = json.loads(answers[-1])
        wanted = 7 if self.spec.interactive else "LaunchError"
        assert answer == wanted, (
            f"without a script comes {answer!r}, and interactive={self.spec.interactive}\n{err}"
        )

    # -- what is left ---------------------------------------------------------------------------------------------

    def test_the_environment_of_the_parent_stays_as_it_was(self) -> None:
        """Ranks that are left there would make the next job part of this one."""
        if not self.spec.needs_function:
            pytest.skip("a launch of it ends the program")
        for name in ALL:
            changed = self._seen(name).told["environment"]
            assert not changed, f"after the launch {name!r}, {', '.join(changed)} differ in the parent"

    def test_no_process_is_left_dead_or_alive(self) -> None:
        """After launches that went well, and after those that failed."""
        for name in ALL:
            seen = self._seen(name)
            left = [*seen.told.get("left", ()), *seen.left]
            assert not left, f"after the launch {name!r} there is still {left}"

    def test_launches_hold_nothing_more_each_time(self) -> None:
        """No thread, no file descriptor, no semaphore: a notebook launches all day."""
        if not self.spec.needs_function:
            pytest.skip("a launch of it ends the program")
        first, last = (self._seen(name).told["held"] for name in (ALL[0], ALL[-1]))
        more = {what: (first[what], last[what]) for what in first if last[what] > first[what]}
        assert not more, f"after one launch and after {len(ALL)}, the parent holds {more}"

    # -- failures -------------------------------------------------------------------------------------------------

    def test_an_exception_on_one_rank_ends_all_and_names_it(self) -> None:
        """With its traceback, and without waiting for ranks that never end."""
        seen = self._seen("fail")
        text = seen.told.get("error", "") if self.spec.needs_function else seen.err
        assert "NoLuckError" in text, f"the exception is not shown:\n{text}\n{seen.err}"
        assert "in fail" in text, f"the traceback of the rank is not shown:\n{text}"
        assert "rank 1" in text.lower(), f"the rank that failed is not named:\n{text}"
        self._ended_for_rank_1(seen)

    def test_a_killed_rank_ends_all_and_is_named(self) -> None:
        """``kill -9``, as the kernel does when memory runs out."""
        seen = self._seen("be_killed")
        text = seen.told.get("error", "") if self.spec.needs_function else seen.err
        assert "rank 1" in text.lower(), f"the rank that was killed is not named:\n{text}\n{seen.err}"
        assert "SIGKILL" in text, f"what ended the rank is not told:\n{text}"
        self._ended_for_rank_1(seen)

    def test_when_the_parent_is_killed_its_processes_end(self) -> None:
        """``kill -9`` of the parent: orphans would hold the devices."""
        with self._waiting() as (process, pids):
            process.kill()
            process.wait()
            self._all_end(pids, "the parent was killed")

    def test_an_interrupt_ends_everything_within_seconds(self) -> None:
        """Ctrl-C, which a terminal sends to the whole group."""
        with self._waiting() as (process, pids):
            os.killpg(process.pid, signal.SIGINT)
            if not _wait_for(process, 15):
                pytest.fail("15 s after Ctrl-C the script is still there")
            assert process.returncode != 0, "after Ctrl-C the script ends as if all was well"
            self._all_end(pids, "Ctrl-C")

    # -- use ------------------------------------------------------------------------------------------------------

    def test_a_training_by_name_equals_the_plain_loop(self) -> None:
        """Two processes, started by it, in a script that asks for it by name."""
        self.make()
        need_plan()
        with self._program("-m", "fabric_core.testing.programs.launched_training") as (process, folder):
            _wait_for(process, 4 * self.seconds)
            err = _printed(folder, "err")
            assert process.returncode == 0, err
            answers = [torch.load(file, weights_only=True) for file in sorted(folder.glob("trained-*.pt"))]
        assert len(answers) == 2, f"{len(answers)} of 2 ranks have trained\n{err}"
        for trained in answers:
            assert small_training.distance(trained, small_training.plain()) < 1e-5

    def test_it_is_torn_down_twice_without_complaint(self) -> None:
        """It is, where a job fails while it is closed."""
        launcher = self.make()
        launcher.teardown()
        launcher.teardown()

    # -- how it is asked ------------------------------------------------------------------------------------------

    def _seen(self, name: str) -> Seen:
        """What is known of one launch. Launches that return share one script."""
        self.make()
        known: dict[str, Seen] = vars(type(self)).get("_known", {})
        if name not in known:
            known |= self._run(ALL if self.spec.needs_function else (name,))
            type(self)._known = known  # type: ignore[attr-defined]
        return known[name]

    def _run(self, launches: tuple[str, ...]) -> dict[str, Seen]:
        began = time.monotonic()
        with self._program("-m", "fabric_core.testing.programs.launches", launches=launches) as (
            process,
            folder,
        ):
            ended = _wait_for(process, len(launches) * self.seconds)
            seconds = time.monotonic() - began
            left = end_leftovers(str(folder))
            err = _printed(folder, "err") + ("" if ended else "\n(it was killed, because it took too long)")
            file = folder / "told.json"
            told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            return {
                name: Seen(
                    told.get(name, {}),
                    {
                        int(rank.stem.rpartition("-")[2]): _read(rank)
                        for rank in folder.glob(f"{name}-*.json")
                    },
                    process.returncode,
                    err,
                    told.get(name, {}).get("seconds", seconds),
                    left,
                )
                for name in launches
            }

    @contextmanager
    def _waiting(self) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
        """A script whose ranks wait to be ended, and their process ids."""
        self.make()
        with self._program("-m", "fabric_core.testing.programs.launches", launches=("wait",)) as (
            process,
            folder,
        ):
            until = time.monotonic() + self.seconds
            while len(files := list(folder.glob("wait-*.json"))) < 2:
                if process.poll() is not None or time.monotonic() > until:
                    process.kill()
                    pytest.fail(f"of 2 ranks {len(files)} came to life:\n{_printed(folder, 'err')}")
                time.sleep(0.02)
            yield process, [_read(file)["pid"] for file in files]

    @contextmanager
    def _program(
        self, *words: str, launches: tuple[str, ...] = ()
    ) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """A program in a process group of its own, with a folder; nothing of it is left afterwards."""
        asked = {"name": self.name, "options": dict(self.options), "launches": launches}
        with tempfile.TemporaryDirectory(prefix="fabric-conformance-") as name:
            Path(name, "asked.json").write_text(json.dumps(asked), encoding="utf-8")
            with Path(name, "out").open("wb") as out, Path(name, "err").open("wb") as err:
                process = subprocess.Popen(
                    [sys.executable, *words, *([name] if words[0] == "-m" else [])],
                    env=environment_without_a_job({MARK: name}),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            try:
                yield process, Path(name)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                end_leftovers(name)

    def _ended_for_rank_1(self, seen: Seen) -> None:
        if self.spec.needs_function:
            assert seen.told.get("rank") == 1, f"the failed rank is told as {seen.told.get('rank')}"
            assert seen.told["exit code"] != 0
        else:
            assert seen.code != 0, "the script ends as if all was well"
        assert seen.seconds < self.seconds, f"it takes {seen.seconds:.0f} s until the other rank is ended"

    def _all_end(self, pids: list[int], after: str) -> None:
        import psutil

        until = time.monotonic() + 10
        while left := [pid for pid in pids if _lives(psutil, pid)]:
            assert time.monotonic() < until, (
                f"10 s after {after}, {len(left)} of {len(pids)} ranks are still there"
            )
            time.sleep(0.02)


def _wait_for(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a script, and not for what it has left behind; kill it when it takes longer than that."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def _printed(folder: Path, stream: str) -> str:
    return (folder / stream).read_text(encoding="utf-8", errors="replace")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _lives(psutil: Any, pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

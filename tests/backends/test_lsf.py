"""Processes of LSF's jsrun, of which there is no free engine: made-up variables and rank files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fabric_backends.environments.lsf import LSFEnvironment, detect
from fabric_core.errors import ConfigurationError
from fabric_core.specs import Detection


@pytest.fixture
def jsrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Become a process of jsrun on one of two nodes with two processes each."""

    def become(rank: int, host: str, lines: str = "batch1 c1 c1 c2 c2") -> dict[str, str]:
        (tmp_path / "ranks").write_text(lines.replace(" ", "\n") + "\n")
        variables = {
            "LSB_JOBID": "1234",
            "LSB_DJOB_RANKFILE": str(tmp_path / "ranks"),
            "JSM_NAMESPACE_RANK": str(rank),
            "JSM_NAMESPACE_SIZE": "4",
            "JSM_NAMESPACE_LOCAL_RANK": str(rank % 2),
        }
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("fabric_backends.environments.lsf.socket.gethostname", lambda: host)
        return variables

    return become


def test_hosts_and_sizes_come_from_the_rank_file_whose_first_line_only_launches(jsrun: Any) -> None:
    for rank, host in enumerate(["c1", "c1.site.org", "c2", "c2.site.org"]):
        found = detect(jsrun(rank, host))
        note = "jsrun has started this process (LSB_JOBID and JSM_NAMESPACE_RANK are set)"
        assert found == Detection(2, 2, note)
        environment = LSFEnvironment()
        assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (
            rank,
            rank % 2,
            rank // 2,
        )
        assert (environment.main_address, environment.main_port) == ("c1", 13234)
        environment.validate(2, 2)


def test_address_and_port_can_be_given(jsrun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jsrun(0, "c1")
    monkeypatch.setenv("MASTER_ADDR", "c9")
    monkeypatch.setenv("MASTER_PORT", "7777")
    assert (LSFEnvironment().main_address, LSFEnvironment().main_port) == ("c9", 7777)


def test_a_rank_file_that_does_not_fit_is_explained(jsrun: Any, tmp_path: Path) -> None:
    jsrun(0, "elsewhere")
    with pytest.raises(
        ConfigurationError, match=r"This host, 'elsewhere', is not in the rank file .* c1, c2"
    ):
        LSFEnvironment().node_rank()
    variables = jsrun(0, "c1", lines="batch1")
    with pytest.raises(ConfigurationError, match="names no host beside the one that launches"):
        LSFEnvironment().main_address.strip()
    (tmp_path / "ranks").unlink()
    assert detect(variables) == Detection(
        note="jsrun has started this process (LSB_JOBID and JSM_NAMESPACE_RANK are set)"
    )
    with pytest.raises(
        ConfigurationError, match=f"rank file of LSF, {re.escape(str(tmp_path))}.* cannot be read"
    ):
        LSFEnvironment().node_rank()


def test_processes_with_a_device_of_their_own_are_told_from_those_that_see_all(jsrun: Any) -> None:
    variables = jsrun(0, "c1")
    for visible, own in (("0", True), ("0,1", False), ("", False)):
        found = detect({**variables, "CUDA_VISIBLE_DEVICES": visible})
        assert found is not None
        assert found.own_devices == own

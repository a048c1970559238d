"""Training in jobs of a real SLURM."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from slurm_cluster import Cluster

from fabric_backends.environments.nodelist import expand

pytestmark = pytest.mark.engine

DETECTED = (sys.executable, Path(slurm_cluster.__file__).parent / "detected.py")


@pytest.fixture(scope="module")
def slurm(clean_environ: dict[str, str]) -> Iterator[Cluster]:
    reason = slurm_cluster.why_not()
    if reason is not None:
        pytest.skip(f"not run: {reason}")
    with Cluster(clean_environ) as cluster:
        yield cluster


def seen(slurm: Cluster, *command: object, **options: Any) -> list[dict[str, Any]]:
    """What the processes that a command has started see of their job."""
    done = slurm.run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def written(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{text}\n")
    return path


def test_two_tasks_on_one_node_train_as_a_plain_loop(slurm: Cluster, job: Any) -> None:
    done = slurm.run("srun", "-N1", "-n2", *job.command())
    assert done.returncode == 0, done.stderr
    job.check("slurm", ranks=[[0, 0, 0], [1, 1, 0]])
    assert job.ranks()[0]["place"][0] == "127.0.0.1"


def test_a_job_that_is_requeued_on_two_nodes_goes_on_from_its_checkpoint(slurm: Cluster, job: Any) -> None:
    """The signal comes in the middle; the second run gives the numbers of one that was not interrupted."""
    script = written(job.folder, f"srun {' '.join(job.command('--wait-at', 3))}")
    log = job.folder / "log"
    submit = (
        "sbatch",
        "--parsable",
        "-N2",
        "-n2",
        "--requeue",
        "--open-mode=append",
        f"--output={log}",
        script,
    )
    number = slurm.ask(*submit)
    waiting = [job.folder / f"waiting-{rank}" for rank in range(2)]
    slurm.wait_until(lambda: all(path.exists() for path in waiting), 60, "two ranks in the middle")
    slurm.ask("scancel", "--signal=USR1", number)
    slurm.wait_until(
        lambda: slurm.ask("squeue", "-h", "-j", number, "-o", "%T") == "PENDING", 30, "the requeue"
    )
    time.sleep(2)  # nodes refuse a job that begins within the second in which they were told to end it
    slurm.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
    slurm.wait_until(
        lambda: "JobState=COMPLETED" in slurm.ask("scontrol", "show", "job", number), 60, "the end"
    )
    assert "DUE TO JOB REQUEUE" in log.read_text()
    job.check("slurm", ranks=[[0, 0, 0], [1, 0, 1]])
    assert [(facts["began"], facts["restarts"]) for facts in job.ranks()] == [(4, 1)] * 2


def test_unequal_numbers_of_tasks_are_explained_on_every_rank(slurm: Cluster, job: Any) -> None:
    done = slurm.run("srun", "-N2", "-n3", *job.command())
    assert done.returncode != 0
    assert "srun has started 3 tasks, 2 and 1 on the nodes of the step" in done.stderr
    assert "give --ntasks-per-node together with --nodes" in done.stderr
    assert job.ranks() == []


def test_the_sizes_of_steps_are_their_own_and_not_those_of_the_job(slurm: Cluster, tmp_path: Path) -> None:
    script = written(tmp_path, f"srun -N1 -n2 {' '.join(map(str, DETECTED))}")
    (tmp_path / "out").touch()
    slurm.ask("sbatch", "--wait", "-N2", "--ntasks-per-node=2", f"--output={tmp_path}/out", script)
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [(one["environment"], one["size"]) for one in found] == [("slurm", [2, 1])] * 2
    assert not any(one["torch"] or one["warnings"] for one in found)


def test_a_script_that_srun_has_not_started_is_no_task_and_is_told_so(slurm: Cluster, tmp_path: Path) -> None:
    script = written(tmp_path, " ".join(map(str, DETECTED)))
    slurm.ask("sbatch", "--wait", "-n2", f"--output={tmp_path}/out", script)
    (found,) = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert found["environment"] == "local"
    assert "SLURM has 2 tasks for this job, but this process was not started by srun" in found["warnings"][0]


def test_interactive_shells_are_no_jobs_but_the_steps_that_are_started_from_them_are(
    slurm: Cluster, tmp_path: Path
) -> None:
    detected, out = " ".join(map(str, DETECTED)), tmp_path / "out"  # a terminal may lose what is printed last
    shell = written(tmp_path, f"{detected} >> {out}\nsrun -n2 {detected} </dev/null >> {out}")
    # "script" gives srun and salloc the terminal that they want.
    slurm.ask("script", "-qec", "salloc -n2", "/dev/null", input=f"bash {shell}\nexit\n")
    by_salloc = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["environment"] for one in by_salloc] == ["local", "slurm", "slurm"]
    shell = written(tmp_path, f"{detected} > {out}")
    slurm.ask("script", "-qec", f"srun -n1 --job-name=training --pty bash {shell}", "/dev/null")
    by_srun = json.loads(out.read_text())
    assert (by_srun["environment"], by_srun["warnings"]) == ("local", [])
    # A job whose script happens to be run by bash is a job all the same.
    shell = written(tmp_path, detected)
    assert [one["environment"] for one in seen(slurm, "srun", "-n2", "bash", shell)] == ["slurm"] * 2


def test_a_batch_script_is_no_task_of_the_shell_that_it_was_submitted_from(
    slurm: Cluster, tmp_path: Path
) -> None:
    script = written(tmp_path, " ".join(map(str, DETECTED)))
    submit = f"sbatch --wait -n1 --output={tmp_path}/out {script}"
    done = slurm.run("script", "-qec", f"srun -n1 --pty {submit}", "/dev/null")
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "out").read_text())["environment"] == "local"
    slurm.ask("srun", "-n2", "bash", "-c", f"[ $SLURM_PROCID = 0 ] && {submit} || true")
    assert json.loads((tmp_path / "out").read_text())["environment"] == "local"


def test_ranks_of_mpirun_are_no_tasks_though_srun_starts_its_daemons(slurm: Cluster, tmp_path: Path) -> None:
    if shutil.which("mpirun.openmpi") is None:
        pytest.skip("not run: mpirun of Open MPI is not installed (apt-get install openmpi-bin)")
    mpirun = "mpirun.openmpi --allow-run-as-root --oversubscribe --map-by ppr:2:node -n 4"
    script = written(tmp_path, f"{mpirun} {' '.join(map(str, DETECTED))}")
    slurm.ask("sbatch", "--wait", "-N2", "--ntasks-per-node=2", f"--output={tmp_path}/out", script)
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [(one["environment"], one["size"]) for one in found] == [("mpi", [2, 2])] * 4


def test_tasks_with_a_gpu_of_their_own_are_told_from_those_that_see_all(slurm: Cluster) -> None:
    for arguments, own in (
        (("--gpus-per-task=1",), True),
        (("--gres=gpu:2", "--gpu-bind=single:1"), True),
        (("--gres=gpu:2",), False),
        (("--gres=gpu:1",), False),
        ((), False),
    ):
        found = seen(slurm, "srun", "-N1", "-n2", *arguments, *DETECTED)
        assert [one["own_devices"] for one in found] == [own] * 2, arguments


PLACE = """
from fabric_backends.environments.slurm import SlurmEnvironment
environment = SlurmEnvironment()
if environment.global_rank() == 0:
    print(environment.node_rank(), environment.main_address)
"""


def test_rank_zero_is_found_on_whichever_node_it_was_put(slurm: Cluster, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.2\n127.0.0.1\n")
    command = ("srun", "-N2", "-n2", "--distribution=arbitrary", sys.executable, "-c", PLACE)
    assert slurm.ask("env", f"SLURM_HOSTFILE={hostfile}", *command) == "1 127.0.0.2"
    for distribution in ("cyclic", "block"):
        command = ("srun", "-N2", "-n2", f"--distribution={distribution}", sys.executable, "-c", PLACE)
        assert slurm.ask(*command) == "0 127.0.0.1"


def test_node_lists_are_read_as_slurm_reads_them(slurm: Cluster) -> None:
    lists = ("a1", "a[1-3]", "a[08-11,3]", "a[001-2],b", "x,y[1,3],z[7-8]", "r[1-2]n[08-10]", "127.0.0.[1-2]")
    for nodelist in lists:
        assert list(expand(nodelist)) == slurm.ask("scontrol", "show", "hostnames", nodelist).split(), (
            nodelist
        )

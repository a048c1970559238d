"""A real SLURM on this machine: a controller, and two nodes that are called by addresses of loopback.

Nothing is written outside of one temporary folder, everything listens on loopback, and all of it ends with this
process. The key that its programs prove themselves with is made for each cluster.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fabric_core.orphans import die_with_parent

NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "salloc", "scontrol", "script")
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))

CONFIGURATION = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=5
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=500 Gres=gpu:2
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=500 Gres=gpu:2
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def why_not() -> str | None:
    """Why there can be no cluster on this machine."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"SLURM lacks {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "SLURM's daemons want to be started by root"


class Cluster:
    """The running cluster.

    Attributes:
        environ: The variables that the programs of SLURM need.
    """

    def __init__(self, environ: dict[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []
        configuration = str(self._folder / "slurm.conf")
        self.environ = {**environ, "PATH": PATH, "SHELL": "/bin/bash", "SLURM_CONF": configuration}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the jobs, then the daemons; nothing that belongs to the folder may be left."""
        if self._daemons:
            subprocess.run(["scancel", "--full", f"--user={getpass.getuser()}"], env=self.environ, timeout=20)
            self.wait_until(lambda: not self.ask("squeue", "-h"), 20, "jobs that end")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            daemon.wait(timeout=20)
        self.wait_until(lambda: not self.processes(), 20, "processes that end")
        shutil.rmtree(self._folder)

    def run(self, *command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program of SLURM, or under it, and wait for it."""
        return subprocess.run(
            [str(part) for part in command],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=options.pop("timeout", 90),
            **options,
        )

    def ask(self, *command: object, **options: Any) -> str:
        """What a program prints; it must succeed."""
        done = self.run(*command, timeout=30, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def wait_until(self, is_so: Callable[[], Any], seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < until, f"waited {seconds} s for {what}\n{self.logs()}"
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """What runs in the cluster, or is part of it."""
        mine = str(self._folder)
        return [process for process in psutil.process_iter() if mine in _described(process)]

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in self._folder.glob("*.log"))

    def _configure(self) -> None:
        folder = self._folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        (folder / "plugstack.conf").touch()
        for index in range(
            2
        ):  # /dev/null and /dev/zero by other names: SLURM hands them out as it would GPUs
            os.mknod(folder / f"nvidia{index}", 0o666 | 0o020000, os.makedev(1, (3, 5)[index]))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-1]\n")
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                folder=folder,
                nodes=NODES,
                ports=_free_ports(3),
            )
        )

    def _start(self) -> None:
        folder = self._folder
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
        munge = {name: f"{folder}/munge.{name}" for name in ("socket", "pid", "seed", "log")}
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder}/munge.key",
            f"--socket={munge['socket']}",
            f"--pid-file={munge['pid']}",
            f"--seed-file={munge['seed']}",
            f"--log-file={munge['log']}",
        )
        self.wait_until(Path(munge["socket"]).exists, 20, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.wait_until(self._is_idle, 40, "idle nodes")

    def _is_idle(self) -> bool:
        done = self.run("sinfo", "-h", "-N", "-o", "%T", timeout=30)
        return done.stdout.split() == ["idle"] * len(NODES)

    def _daemon(self, *command: str) -> None:
        with open(self._folder / f"{command[0]}-{len(self._daemons)}.log", "wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environ,
                    cwd=self._folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def _described(process: psutil.Process) -> str:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return f"{process.cmdline()} {process.environ()}"
    except psutil.Error:
        return ""

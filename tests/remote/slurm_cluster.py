"""A real Slurm on this machine: munged, slurmctld and a slurmd for each of two nodes, all with ports of their own.

The daemons are the distribution's. Nothing of them is stood in for, but that both nodes are this machine, that no
accounting is kept, and that processes are tracked by their parents: cgroups would need another machine.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.ports import free_port
from tests.remote.hosts import wait_for

NODES = ("n1", "n2")
GPUS = ("/dev/zero", "/dev/full")  # Slurm wants devices, and opens none of them
SBIN = "/usr/sbin:/usr/bin"
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=10
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=5
MessageTimeout=100
TCPTimeout=60
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,sched_interval=2,bf_interval=2
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=9

PartitionName=down Nodes=n1,n2 MaxTime=INFINITE State=DOWN
"""


@dataclass
class Cluster:
    """A running Slurm. Its clients find it by SLURM_CONF."""

    directory: Path
    # of the slurmd of each node
    processes: dict[str, int] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": f"{self.directory}/slurm.conf"}

    def ask(self, *command: str) -> str:
        """Run one of Slurm's programs; return what it prints."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    @contextlib.contextmanager
    def without(self, path: Path, node: str) -> Iterator[None]:
        """Have a node see an empty directory in place of `path`, as where it has another home."""
        inside = ["nsenter", "-t", str(self.processes[node]), "-m"]
        empty = self.directory / "empty"
        empty.mkdir(exist_ok=True)
        subprocess.run([*inside, "mount", "--bind", str(empty), str(path)], check=True)
        try:
            yield
        finally:
            # lazily: a process of the job may be in it still
            subprocess.run([*inside, "umount", "-l", str(path)], check=True)

    def jobs(self) -> str:
        """Return the jobs that are not over: a line each, name and state."""
        return self.ask("squeue", "-h", "-o", "%j %T")


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """Two idle nodes, n1 and n2, each with 8 CPUs and 2 GPUs."""
    (directory / "state").mkdir(parents=True)
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    host = socket.gethostname()
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=8"
        " RealMemory=2000 Gres=gpu:2"
        for name in NODES
    )
    user = pwd.getpwuid(os.getuid()).pw_name
    text = CONFIG.format(host=host, port=free_port(), user=user, directory=directory, nodes=nodes)
    (directory / "slurm.conf").write_text(text)
    gres = "".join(f"NodeName=n[1-2] Name=gpu File={device}\n" for device in GPUS)
    (directory / "gres.conf").write_text(gres)
    made = Cluster(directory)
    with contextlib.ExitStack() as stack:
        names = {"key-file": key.name, "socket": "munge.sock", "seed-file": "munged.seed"}
        names |= {"pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{name}={directory / file}" for name, file in names.items()]
        stack.enter_context(_daemon(directory, "munged", "--foreground", "--force", *options))
        wait_for((directory / "munge.sock").exists, "munge's socket")
        stack.enter_context(_daemon(directory, "slurmctld", "-D", "-c"))
        for name in NODES:
            # with mounts of its own, where they can be made
            own = ("unshare", "-m", "--propagation", "private") if os.geteuid() == 0 else ()
            options = ["-D", "-N", name]
            made.processes[name] = stack.enter_context(
                _daemon(directory, "slurmd", *options, wrapper=own)
            )
        wait_for(
            lambda: (
                made.ask("sinfo", "-h", "-N", "-p", "debug", "-o", "%T").split() == ["idle"] * 2
            ),
            "nodes",
        )
        yield made


@contextlib.contextmanager
def _daemon(
    directory: Path, name: str, *options: str, wrapper: tuple[str, ...] = ()
) -> Iterator[int]:
    program = shutil.which(name, path=SBIN)
    assert program is not None, f"{name} is missing: scripts/setup dev installs it"
    environment = {**os.environ, "SLURM_CONF": f"{directory}/slurm.conf", "PATH": SBIN}
    with (directory / f"{name}.out").open("ab") as out:
        command = [*wrapper, program, *options]
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()

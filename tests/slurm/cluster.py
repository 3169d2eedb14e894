"""A Slurm of two virtual nodes on this machine, from Debian's packages; needs root.

Its daemons run in the foreground and keep all that they write in one folder; nothing under /etc changes. A
node is a slurmd with a host name and an address of its own on the loopback, in namespaces of its own, and
with GPUs that are links to /dev/null.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv")
PACKAGES = "munge slurmctld slurmd slurm-client"
NODES = ("node1", "node2")
NUM_GPUS = 4
START_SECONDS = 120.0
STOP_SECONDS = 30.0
SYSTEM_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
# Ranks meet at a port that follows from the job: not at that of another cluster on this machine
FirstJobId={first_job}
SlurmUser=root
AuthType=auth/munge
# After cred_expire seconds a requeued job starts again: 120 by default
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
# A step calls its srun back at 127.0.0.1, so that only the controller may be bound to one address
CommunicationParameters=NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
# The nodes claim more than this machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
# Decisions are taken at once, and what can never run is refused
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
EnforcePartLimits=ALL
MinJobAge=3600
KillWait=30
ReturnToService=2
{nodes}
PartitionName=test Nodes={names} Default=YES MaxTime=60 State=UP
"""
NODE = (
    "NodeName={name} NodeAddr={address} NodeHostname={name} Port={port} "
    "CPUs=8 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN"
)
ON_NODE = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


class ClusterError(Exception):
    """The cluster cannot be started here."""


def find_missing() -> str | None:
    """Return why no cluster can be started here, None if it can be tried."""
    if os.geteuid() != 0:
        return "a Slurm on this machine needs root, for its nodes' namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    return f"no {', '.join(missing)}; Debian's packages: {PACKAGES}" if missing else None


class Cluster:
    """A running cluster; its commands need ``environment``."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wan-slurm-"))
        self.folder.chmod(0o755)  # munged refuses a folder that others can write or not read
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SYSTEM_PATH}
        self.daemons: list[subprocess.Popen[bytes]] = []
        self._write_configuration()

    def _write_configuration(self) -> None:
        first_port = find_free_port()
        addresses = {name: f"127.0.1.{number}" for number, name in enumerate(NODES, start=1)}
        nodes = [
            NODE.format(name=name, address=address, port=first_port + number, gpus=NUM_GPUS)
            for number, (name, address) in enumerate(addresses.items(), start=1)
        ]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                port=first_port,
                first_job=1 + os.getpid() % 80 * 20,
                folder=self.folder,
                nodes="\n".join(nodes),
                names=",".join(NODES),
            )
        )
        for number in range(NUM_GPUS):
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        gpus = f"Name=gpu File={self.folder}/gpu[0-{NUM_GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} {gpus}\n")
        hosts = {"127.0.0.1": f"localhost {socket.gethostname()}"}
        hosts |= {address: name for name, address in addresses.items()}
        (self.folder / "hosts").write_text(
            "".join(f"{address} {name}\n" for address, name in hosts.items())
        )
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        (self.folder / "state").mkdir()
        for name in NODES:
            (self.folder / f"spool-{name}").mkdir()

    def start(self) -> None:
        """Start the daemons and wait until the nodes take jobs; raises ClusterError."""
        munge = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "seed")]
        munge += [f"--pid-file={self.folder}/munge.pid", f"--key-file={self.folder}/munge.key"]
        self._start("munged", "--foreground", *munge)
        self._wait_for((self.folder / "munge.socket").exists, "munged listens")
        self._start("slurmctld", "-D")
        for name in NODES:
            namespaces = ["unshare", "--mount", "--uts", "--propagation", "private"]
            be_node = ["bash", "-euc", ON_NODE, "bash", name, str(self.folder / "hosts")]
            self._start(*namespaces, "--", *be_node, "slurmd", "-D", "-N", name)
        self._wait_for(
            lambda: self("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES),
            "the nodes take jobs",
        )

    def _start(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            # they end with this process, however it ends
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.daemons.append(daemon)

    def _wait_for(self, is_so: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not is_so():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self.daemons):
                log = (self.folder / "daemons.log").read_text(errors="replace")
                raise ClusterError(f"not so: {what}; {log[-500:]}")
            time.sleep(0.1)

    def __call__(self, *command: str) -> str:
        """Return what one of Slurm's commands prints, whatever its exit code."""
        return subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()

    def wait_for_job(self, job: str, seconds: float) -> str:
        """Wait for a job or for a task of an array, JOB_INDEX; return its state, code and restarts.

        `sbatch --wait` asks ever more seldom, and is up to half a minute late.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            told = self("scontrol", "--oneliner", "show", "job", job)
            facts = dict(word.partition("=")[::2] for word in told.split())
            if facts.get("JobState") in ENDED:
                return f"{facts['JobState']} {facts['ExitCode']} restarts={facts['Restarts']}"
            time.sleep(0.1)
        return f"not ended after {seconds:.0f} s: {told}"

    def stop(self) -> None:
        """Cancel the jobs, which would outlive the daemons, end these and remove the folder."""
        if len(self.daemons) > 1:
            self("scancel", "--user=root")
            end = time.monotonic() + STOP_SECONDS
            while self("squeue", "-h") and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def find_free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])

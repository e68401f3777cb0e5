"""A real SLURM on this machine: munged, slurmctld and a few slurmd, as children of the calling process.

Node names are addresses of the loopback interface, 127.0.0.1, 127.0.0.2, ..., so that ranks find each other by them
without a name service. All files lie below one directory with a short path, since sockets live there.
"""

import contextlib
import fcntl
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from karat_scale.foundation.machine import be_killed_with_parent
from tests.conftest import ROOT, wait_until
from tests.slurm.janitor import kill_processes
from tests.slurm.packages import find

CPUS, GPUS = 64, 4
FIRST_PORT, PORTS, PLACES = 11_000, 300, 26
# A requeued job waits until its old credentials expire, which takes two minutes by default.
CREDENTIAL_SECONDS = 5  # the least that SLURM takes

CONFIGURATION = """
ClusterName=small
SlurmctldHost={host}({address})
SlurmctldPort={port}
SrunPortRange={first_srun_port}-{last_srun_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge,cred_expire={credential_seconds}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.pid
SlurmctldLogFile={root}/log/slurmctld
SlurmdLogFile={root}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=10
KillWait=5
MinJobAge=3600
FirstJobId={first_job}
GresTypes={gres_types}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{node_lines}PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=2
"""


class Cluster:
    """A SLURM cluster of `nodes` nodes. Use it as a context manager, which leaves nothing behind."""

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [f"127.0.0.{number}" for number in range(1, nodes + 1)]
        self.root = Path(tempfile.mkdtemp(prefix="ks", dir="/tmp"))
        self.configuration = self.root / "etc" / "slurm.conf"
        self._place, self._lock = _claim_place()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # Its standard input closes when this process ends, however that happens.
        command = [sys.executable, "-m", "tests.slurm.janitor", str(self.root), *self.nodes]
        self._janitor = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True)

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment in which SLURM's commands find this cluster, without settings of a surrounding job."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "RANK", "MASTER_"))}
        return {**kept, "SLURM_CONF": str(self.configuration)}

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in self.nodes:
                self.start_node(node)
            self.wait_idle(30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.command("scancel", "--quiet", "--signal=KILL", "--full", f"--user={os.environ.get('USER', 'root')}")
        for daemon in reversed(list(self._daemons.values())):  # munged last
            daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._janitor.communicate(timeout=30)
        os.close(self._lock)

    def command(self, *arguments: str, check: bool = True, **options: object) -> str:
        """Run one of SLURM's commands; return what it printed."""
        done = subprocess.run(
            arguments, env=self.environment, capture_output=True, text=True, timeout=30, check=False, **options
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(arguments)}: {done.stderr or done.stdout}\n{self.logs()}")
        return done.stdout + done.stderr

    def logs(self) -> str:
        """Return the last lines of the daemons' logs."""
        ends = [
            f"{path.name}: {line}" for path in self.root.glob("log/*") for line in path.read_text().splitlines()[-8:]
        ]
        return "\n".join(ends)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        (self.root / "spool" / node).mkdir(parents=True, exist_ok=True)
        self._start(node, "slurmd", "-D", "-N", node, "-c")

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon, its steps and their tasks at once, as a power cut does."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        kill_processes(self.root, [node])

    def wait_idle(self, seconds: float = 60) -> None:
        """Wait until every node is up and has no job."""

        def all_idle() -> bool:
            shown = self.command("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False)
            return sorted(set(shown.split())) == sorted(self.nodes)  # listed once for each partition

        wait_until(all_idle, seconds, "all nodes idle")

    def _configure(self) -> None:
        for name in ("etc", "log", "run", "state", "dev", "munge"):
            (self.root / name).mkdir(mode=0o700 if name == "munge" else 0o755)
        self.root.chmod(0o755)
        host = socket.gethostname().partition(".")[0]
        address = socket.gethostbyname(host)
        port = FIRST_PORT + self._place * PORTS
        gpus = self._make_gpus()
        node_lines = "".join(
            f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={port + number} CPUs={CPUS} "
            f"RealMemory=1000000 State=UNKNOWN{f' Gres=gpu:{gpus}' if gpus else ''}\n"
            for number, node in enumerate(self.nodes, start=1)
        )
        text = CONFIGURATION.format(
            node_lines=node_lines,
            host=host,
            address=address,
            port=port,
            first_srun_port=port + 20,
            last_srun_port=port + PORTS - 1,
            root=self.root,
            nodes=",".join(self.nodes),
            credential_seconds=CREDENTIAL_SECONDS,
            # A rendezvous port is made of the job's last four digits, so another cluster begins at other digits.
            first_job=random.SystemRandom().randrange(1, 100) * 10_000 + self._place * (10_000 // PLACES),
            gres_types="gpu" if gpus else "",
        )
        self.configuration.write_text(text)
        (self.root / "etc" / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def _make_gpus(self) -> int:
        """Make copies of /dev/null, which slurmd takes for GPUs as character devices; return their number."""
        devices = self.root / "dev" / "nvidia"
        try:
            for number in range(GPUS):
                os.mknod(f"{devices}{number}", 0o666 | 0o020000, os.makedev(1, 3))
        except PermissionError:
            return 0
        lines = f"AutoDetect=off\nName=gpu File={devices}[0-{GPUS - 1}]\n"
        (self.root / "etc" / "gres.conf").write_text(lines)
        return GPUS

    def _start_munge(self) -> None:
        key = self.root / "munge" / "key"
        key.write_bytes(random.SystemRandom().randbytes(128))
        key.chmod(0o600)
        socket_file = self.root / "run" / "munge"
        here = self.root / "munge"
        options = [f"--{name}-file={here / name}" for name in ("key", "pid", "log", "seed")]
        options += ["--force", "--origin=127.0.0.1", f"--socket={socket_file}"]  # everyone may write to /tmp
        self._start("munged", "munged", "--foreground", *options)
        wait_until(socket_file.exists, 10, "munged's socket")

    def _start(self, name: str, *command: str) -> None:
        program = find(command[0])
        assert program is not None
        log = (self.root / "log" / f"{name}.out").open("ab")
        environment = self.environment
        if name in self.nodes:
            environment["SLURMD_NODENAME"] = name
        with log:
            self._daemons[name] = subprocess.Popen(
                [program, *command[1:]],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                preexec_fn=be_killed_with_parent,
                start_new_session=True,
            )


def _claim_place() -> tuple[int, int]:
    """Return a number for the ports that no other cluster on this machine has, and the lock that reserves it."""
    for place in random.SystemRandom().sample(range(PLACES), PLACES):
        name = f"{tempfile.gettempdir()}/karat-slurm-{os.geteuid()}-{place}.lock"
        lock = os.open(name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        with contextlib.suppress(OSError), contextlib.ExitStack() as ports:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for port in range(10):
                ports.enter_context(socket.socket()).bind(("", FIRST_PORT + place * PORTS + port))
            return place, lock
        os.close(lock)
    raise AssertionError("no free ports for SLURM's daemons")

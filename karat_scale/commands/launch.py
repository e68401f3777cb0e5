"""`karat launch`: run a command on several ranks by torchrun's agent. The first failure is reported once, at the end.

In a step of srun with one task on each node, each task is the agent of its node, and all nodes' ranks form one group.

If a rank is killed, crashes or stalls, training resumes from the newest checkpoint, up to IDLE_RESTARTS (3) times
without a new checkpoint. In a job, slurm/launch.sh does that instead, as it survives a lost agent or node.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from karat_scale.engine.heartbeat import START, is_restart
from karat_scale.foundation.errors import EXIT_LOST_PEER, EXIT_STOPPED, PeerError, UserError, say_in_one_write
from karat_scale.foundation.files import write_atomically
from karat_scale.foundation.machine import LAUNCHED, LAUNCHER, number_in, stop_signals, usable_cores

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

STOPPED = "KARAT_STOPPED"
"""Environment variable of each rank: the file that it creates if it saved on a signal, which is no failure."""
ERROR = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of each rank that torchrun or we start: the file to which it writes its error."""
WRAPPER = "KARAT_RANK_WRAPPER"
"""Environment variable of a launcher: a tab-separated command that runs each rank; its caller restarts and reports."""
# The agent asks the remaining ranks to end. They may be waiting for the failed one, so they get no more time than this.
_END_SECONDS = 3
# How long the launchers of several nodes wait for each other.
_MEETING = timedelta(minutes=10)
_POLL_SECONDS = 0.1
# CUDA's and ROCm's lists of the GPUs that a process may use. ROCm reads all three.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_NVIDIA, _AMD = Path("/dev"), Path("/sys/class/kfd/kfd/topology/nodes")


def launch(arguments: Sequence[str], ranks: int, trains: bool, trained: Path | None) -> int:
    """Run `karat` with these arguments on `ranks` processes of each node.

    trains: whether the command trains a run.
    trained: the directory of that run; None if there is none, or if a wrapper restarts the command itself.

    Returns the exit code of the first process that failed.
    """
    wrapper = [word for word in os.environ.get(WRAPPER, "").split("\t") if word]
    command = [*wrapper, sys.executable, "-m", "karat_scale", *arguments]
    idle, most = 0, os.environ.get("IDLE_RESTARTS", "3")
    if not most.isdecimal():
        raise UserError(f"IDLE_RESTARTS = {most}: should be a whole number")
    with _signals_forwarded() as told:
        for attempt in count():
            begun = time.time()
            if trains and (attempt or is_restart()):  # a recipe's `never` was for the first start
                command = [*(word for word in command if not word.startswith("resume.mode=")), "resume.mode=auto"]
            # This reference keeps the store and its port until this launcher ends.
            code, line, _store = _run(command, ranks, attempt, trained, told)
            if code in (0, 2, EXIT_STOPPED) or trained is None or told:
                break
            saved_at = 0.0
            with suppress(OSError):
                saved_at = (trained / "checkpoints" / "latest").stat().st_mtime
            idle = 0 if saved_at > begun else idle + 1
            if idle > int(most):
                break
            say_in_one_write(f"{line}; training begins again from the newest checkpoint")
    os.environ.pop(STOPPED, None)  # it is for the ranks
    if line and not wrapper:
        say_in_one_write(f"error: {line}")
    return code


def say_to_launcher(text: str) -> bool:
    """Leave a rank's last error to the launcher; returns whether a launcher will print it."""
    file = None if WRAPPER in os.environ else os.environ.get(ERROR)
    try:
        if file:
            write_atomically(Path(file), json.dumps({"message": f"error: {text}", "timestamp": int(time.time())}))
    except OSError:
        return False
    return bool(file)


def code_for_launcher(code: int) -> int:
    """Return the exit code that our launcher should see."""
    if code != EXIT_STOPPED or STOPPED not in os.environ:
        return code
    Path(os.environ[STOPPED]).touch()
    return 0


def default_ranks() -> int:
    """Return the number of GPUs that this process may use, or 1 if there is none. Does not import torch."""
    lists = [os.environ[name].split(",") for name in _VISIBLE if name in os.environ]
    if lists:  # CUDA and ROCm stop at the first name that is empty or negative
        named = [takewhile(lambda name: name.strip() and not name.strip().startswith("-"), names) for names in lists]
        return max(1, min(len([*names]) for names in named))
    nvidia = sum(1 for path in _NVIDIA.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal())
    amd = 0
    for path in _AMD.glob("*/gpu_id"):  # processors have id 0; a job reads only its own GPUs
        with suppress(OSError, ValueError):
            amd += int(path.read_text()) != 0
    return max(1, nvidia or amd)


def _run(
    command: Sequence[str], ranks: int, attempt: int, trained: Path | None, told: Sequence[int]
) -> tuple[int, str, Any]:
    """Run the ranks of this node once; returns an exit code, the error if they failed, and the ranks' store."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import PContext, SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from karat_scale.training.agreement import StoppedError

    def close(self: PContext, death_sig: signal.Signals | None = None, timeout: int = _END_SECONDS) -> None:
        PContext.close(self, death_sig, min(timeout, _END_SECONDS))

    SubprocessContext.close = close  # type: ignore[method-assign]  # the agent's own 30 s cannot be set
    logging.disable()  # we report in one line what the agent logs
    node, nodes = _node_of_step(os.environ)
    with tempfile.TemporaryDirectory(prefix="karat-launch-") as files:
        stopped = Path(files, "stopped")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
        os.environ[LAUNCHED] = "1"
        if WRAPPER not in os.environ:
            start = stopped.parent.name if nodes == 1 else _step()
            os.environ |= {STOPPED: str(stopped), START: f"{start}.{attempt}" if attempt else start}
        try:
            endpoint, store = _meet(node, nodes, told)
        except (StoppedError, PeerError):
            if not told:  # else node 0 may have stopped first
                raise
            print("stopped before all nodes had met; run the same command to resume", flush=True)
            return EXIT_STOPPED, "", None
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=ranks,
            run_id=f"attempt-{attempt}",
            rdzv_backend="static",  # the number of a node is the same at each start
            rdzv_endpoint=endpoint,
            rdzv_configs={"rank": node},
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=files),
            signals_to_handle="SIGQUIT",  # we pass on the others, and let the ranks save
        )
        try:
            with _stalls_ended(trained, nodes * ranks) as verdict:
                elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            code, line = _first_failure(error.failures)
            return (1, verdict[0], store) if verdict else (code, line, store)
        except DistError as error:
            raise PeerError(f"lost another node: {str(error)[:200]}") from None
        return (EXIT_STOPPED if stopped.exists() else 0), "", store


def _node_of_step(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return this node's number and the number of nodes. Raises UserError."""
    nodes, tasks = (number_in(environ, f"SLURM_STEP_NUM_{what}", "1") for what in ("NODES", "TASKS"))
    if tasks > nodes:
        raise UserError(f"srun started {tasks} of these on {nodes} nodes; start one on each: --ntasks-per-node=1")
    return (number_in(environ, "SLURM_PROCID") if nodes > 1 else 0), nodes


def _meet(node: int, nodes: int, told: Sequence[int]) -> tuple[str, Any]:
    """Wait for the launchers of all nodes; returns the address and the store, which the agents and the ranks use, too.

    torch's own rendezvous would wait where no signal can end it. Each start has its own names, so an early node finds
    nothing of the last start.

    Raises:
        UserError: the port is taken, or a node does not come.
        PeerError: node 0 has ended.
        StoppedError: a signal has come.
    """
    from karat_scale.engine.distributed import meeting_place
    from karat_scale.engine.peers import Place, meet
    from karat_scale.training.agreement import StoppedError

    def check() -> None:
        if told:
            raise StoppedError

    host, port = ("127.0.0.1", 0) if nodes == 1 else meeting_place()
    store: Any = meet(Place(host, port, node, nodes, _MEETING, "launchers", check, "node"))
    return f"{host}:{store.underlying_store.port}", store


def _step() -> str:
    """Return the name of the first start in a step of srun. It is the same on all nodes of the step."""
    job, restart, step = (os.environ.get(f"SLURM_{what}", "0") for what in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return f"{job}-{restart}-{step}"


def _first_failure(failures: "Mapping[int, ProcessFailure]") -> tuple[int, str]:
    """Return the exit code and the error of the rank that failed first. A rank that lost another one comes last."""
    rank, first = min(failures.items(), key=lambda each: (each[1].exitcode == EXIT_LOST_PEER, each[1].timestamp))
    code = 1 if first.exitcode == EXIT_LOST_PEER else first.exitcode
    if code < 0:
        return 128 - code, f"rank {rank} was ended by {first.signal_name()}"  # as a shell reports it
    if not Path(first.error_file).is_file():
        return code, f"rank {rank} ended with exit code {code}"
    where = "" if code == 2 else f"rank {rank}: "  # all ranks report a mistake of the user
    return code, where + first.message.removeprefix("error: ")


@contextmanager
def _signals_forwarded() -> Iterator[list[int]]:
    """Forward the signals that ask for a checkpoint, and SIGTERM if this launcher's own launcher ends; yields them.

    The ranks are in sessions of their own, so a terminal's Ctrl-C reaches only this process.
    """

    def forward(ended: threading.Event) -> None:
        sent = 0
        while not ended.wait(_POLL_SECONDS):
            if LAUNCHER.is_gone and not told:
                told.append(signal.SIGTERM)
            if sent < len(told) and _signal_ranks(told[sent]):
                sent += 1

    with stop_signals() as told, _beside(forward):
        yield told


@contextmanager
def _beside(run: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run a function in a thread during the context. Its event is set when the context ends."""
    ended = threading.Event()
    thread = threading.Thread(target=run, args=[ended], daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _signal_ranks(number: int) -> bool:
    """Send a signal to all ranks, also to those in a wrapper; returns whether there are any."""
    ranks = psutil.Process().children()
    for rank in ranks:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.killpg(rank.pid, number) if WRAPPER in os.environ else rank.send_signal(number)
    return bool(ranks)


@contextmanager
def _stalls_ended(trained: Path | None, ranks: int) -> Iterator[list[str]]:
    """Kill this node's ranks if any rank makes no progress for KARAT_STALL_SECONDS; yields a list that will name it."""
    from karat_scale.commands.submit.within_job import watch
    from karat_scale.engine.heartbeat import StallLimits

    verdict: list[str] = []
    try:
        limits = StallLimits.parse(os.environ.get("KARAT_STALL_SECONDS", ""))
    except ValueError as error:
        raise UserError(f"KARAT_STALL_SECONDS: {error}") from None

    def look(ended: threading.Event) -> None:
        if trained and limits and (found := watch(trained, ranks, limits, ended)):
            verdict.append(found)
            _signal_ranks(signal.SIGKILL)

    with _beside(look):
        yield verdict

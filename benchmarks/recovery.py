"""How long a job takes from a failure to its next step: `python -m benchmarks.recovery`.

The shipped training script runs as a job on the SLURM simulation of the tests, on one node and on two, with a spare
node where one is lost. In training SIGKILL ends a rank, an agent (`karat launch`) or all that a node
runs, or SIGSTOP stops a rank. The seconds are from then to the end of the first step after the restart. Beside them is
the time that the job's first start took, from srun to the end of its first step, since a restart needs as much again.
"""

import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from karat_scale.engine.heartbeat import read_signs
from karat_scale.foundation.arguments import OneLineParser, count, new_file
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import UserError, run_script
from tests.conftest import SMALL, events, wait_until
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, submit
from tests.slurm.packages import SLURM, missing_reason
from tests.slurm.training import RECIPE, SCRIPT, process_of, run_of, wait_for
from tests.training.runs import assert_same_run

VICTIMS = ("rank", "agent", "node", "stall")
STALL_SECONDS = 10
OVERRIDES = (
    *SMALL,
    "train.global_batch=32",
    *("data.backend=synthetic", "data.synthetic_samples=64", "log.every_steps=1"),
    *("train.epochs=100000", "train.eval_every_epochs=100000", "checkpoint.every_steps=20"),
)
PATIENCE = 300.0


@dataclass(frozen=True)
class Recovery:
    """What one failure cost. seconds: from the failure to the end of the next step. start: the same of a start."""

    nodes: int
    victim: str
    seconds: float
    start: float
    steps_lost: int
    same_bits: bool


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the file of `--json`."""
    parser = OneLineParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=VICTIMS, default=VICTIMS, help="(default: all of these)")
    parser.add_argument("--nodes", nargs="+", type=count, default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--steps", type=count, default=400, help="of a run (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    if reason := missing_reason(SLURM):
        raise UserError(reason)
    found = []
    with Cluster(nodes=max(options.nodes) + 1) as cluster, tempfile.TemporaryDirectory() as scratch:
        for nodes in options.nodes:
            place = Path(scratch, str(nodes))
            whole = _submit(cluster, place / "whole", nodes, options.steps)
            _end(whole)
            for victim in options.only:
                if victim == "node" and nodes == 1:
                    continue  # that of the batch script itself: SLURM requeues the job
                found.append(_measure(cluster, place, nodes, victim, options.steps, run_of(whole)))
                print(found[-1], file=sys.stderr, flush=True)
    _print(found)
    write_json(options.json, {"rows": [asdict(one) for one in found]})


def _measure(cluster: Cluster, place: Path, nodes: int, victim: str, steps: int, whole: Path) -> Recovery:
    job = _submit(cluster, place / victim, nodes, steps, has_spare=victim == "node")
    run = run_of(job)
    wait_until(lambda: bool(list(run.glob("logs/*"))), PATIENCE, "the start")
    begun = time.time()
    wait_for(job, "train", steps // 10)
    if victim == "stall":  # a heartbeat that still tells of the start has the start's limit
        wait_until(lambda: all(sign.step for sign in read_signs(run)), PATIENCE, "heartbeats that tell of a step")
    rank = process_of(job, nodes - 1)
    node, failed = rank.environ()["SLURMD_NODENAME"], time.time()
    if victim == "node":
        cluster.kill_node(node)
    elif victim == "agent":
        next(parent for parent in rank.parents() if "launch" in parent.cmdline()).kill()
    else:
        rank.send_signal(signal.SIGKILL if victim == "rank" else signal.SIGSTOP)
    try:
        _end(job)
    finally:
        if victim == "node":
            cluster.start_node(node)
            cluster.wait_idle()
    resumed, trained = events(run, "resume")[0], events(run, "train")
    after = next(event["time"] for event in trained if event["time"] > resumed["time"])
    # Ranks whose agent has died train on for a moment, and save.
    lost = max(event["step"] for event in trained if event["time"] <= resumed["time"]) - resumed["step"]
    same = True
    try:
        assert_same_run(run, whole)
    except AssertionError:
        same = False
    return Recovery(nodes, victim, after - failed, trained[0]["time"] - begun, lost, same)


def _submit(cluster: Cluster, place: Path, nodes: int, steps: int, has_spare: bool = False) -> Job:
    place.mkdir(parents=True)
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE.replace("path: set by the script", "backend: synthetic"))
    settings: dict[str, str | Path] = {
        "RECIPE": recipe,
        "SHARDS": "",
        "RUN": place / "run",
        "STALL_SECONDS": f"900,step={STALL_SECONDS},save={STALL_SECONDS}",  # it may stop in a save
    }
    options = [f"--nodes={nodes + has_spare}"]
    if has_spare:
        settings["SPARES"] = "1"
        options.append("--no-kill")
    return submit(
        cluster, SCRIPT, *OVERRIDES, f"train.max_steps={steps}", options=tuple(options), cwd=place, **settings
    )


def _end(job: Job) -> None:
    if (how := job.wait(PATIENCE)) != "COMPLETED 0" or job.starts > 1:
        raise UserError(f"the job ended {how} after {job.starts} starts:\n{job.log}")


def _print(found: list[Recovery]) -> None:
    rows = [
        [str(one.nodes), one.victim, f"{one.seconds:.1f}", f"{one.start:.1f}", str(one.steps_lost), str(one.same_bits)]
        for one in found
    ]
    columns = ["nodes", "what failed", "seconds to the next step", "a start", "steps lost", "same bits"]
    print_table("recovery", columns, rows, texts=(1, 5))


if __name__ == "__main__":
    run_script(main)

"""Runs of two ranks, each on a node of its own, that are killed between two checkpoints of the run's directory.

`python -m tests.checkpoint.near SCRATCH CASE ...` writes outcomes.json: the step from which each run resumed, and how
its result differs from that of an undisturbed run.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from karat_scale.engine.reporting.progress import Reporter
from tests.conftest import events, summary
from tests.faults.runs import imported, tiny_recipe
from tests.small_engines import equal
from tests.training.forked_ranks import ForkedRanks
from tests.training.runs import last_tensors, losses

SHARED, KILLED = 10, 13
WITHIN = 240.0


def train(
    scratch: Path, name: str, *overrides: str, prepare: Callable[[int], object] = lambda rank: None
) -> tuple[Path, list[int], str]:
    """Run one start of a run to its end, with ranks on nodes a and b; return its directory, exit codes and output."""

    def on_a_node(rank: int) -> None:
        os.environ.update(LOCAL_RANK="0", SLURMD_NODENAME="ab"[rank])
        prepare(rank)

    log = scratch / f"{name}.log"
    arguments = ("train", str(scratch / "tiny.yaml"), f"run.dir={scratch / name}", *overrides)
    ranks = ForkedRanks(arguments, 2, log, on_a_node)
    assert ranks.wait(WITHIN), log.read_text()
    return scratch / name, [ranks.codes[pid] for pid in ranks.ranks], log.read_text()


def killed(rank: int) -> None:
    """Let this rank kill itself when the checkpoint after KILLED steps is on all nodes."""
    told = Reporter.checkpoint

    def tell(self, state, *arguments) -> None:
        told(self, state, *arguments)
        if state.step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)

    Reporter.checkpoint = tell


def back(scratch: Path, folders: list[Path]) -> None:
    """Change nothing: both nodes come back."""


def without_a_node(scratch: Path, folders: list[Path]) -> None:
    """Remove the files of node b, as if another node had taken its place."""
    shutil.rmtree(folders[1])


def damaged(scratch: Path, folders: list[Path]) -> None:
    """Flip a bit in the newest checkpoint on node b."""
    file = max(max(folders[1].glob("step-*")).glob("*.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damaged_later(scratch: Path, folders: list[Path]) -> None:
    """Add a newer, damaged checkpoint to the run's directory."""
    store = scratch / "damaged_later/checkpoints"
    shutil.copytree(store / f"step-{SHARED:08d}", store / f"step-{KILLED + 1:08d}")


def anew(scratch: Path, folders: list[Path]) -> None:
    """Remove the run's directory, so that another run begins there."""
    shutil.rmtree(scratch / "anew")


CASES = {case.__name__: case for case in (back, without_a_node, damaged, damaged_later, anew)}


def main(scratch: Path, names: Sequence[str]) -> None:
    """Run the named cases, one after the other."""
    own = (f"checkpoint.every_steps={SHARED}", "checkpoint.snapshots=0", "checkpoint.asynchronous=false")
    tiny_recipe(scratch, "1", *own, "train.epochs=10")
    imported()
    whole, codes, said = train(scratch, "whole")
    assert codes == [0, 0], said
    outcomes = {}
    for name in names:
        near = scratch / f"near-{name}"
        own = f"checkpoint.local={near}"
        run, _, said = train(scratch, name, own, prepare=killed)
        folders = sorted(near.iterdir())
        assert len(folders) == 2, said
        CASES[name](scratch, folders)
        _, codes, said = train(scratch, name, own)
        outcomes[name] = {
            "codes": codes,
            "resumed": [event["step"] for event in events(run, "resume")],
            "differs": [
                what
                for what, same in {
                    "losses": losses(run) == losses(whole),
                    "data": summary(run)["data_digest"] == summary(whole)["data_digest"],
                    "tensors": equal(last_tensors(run), last_tensors(whole)),
                }.items()
                if not same
            ],
            "left": [path.name for path in near.iterdir()],
            "said": said,
        }
    (scratch / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""A training run that takes milliseconds a step and saves after each, and campaigns that disturb it.

Call `imported()` first, because the runs are forks of a process that has imported everything.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the same sums in the same order

from safetensors.torch import load_file

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.recipe.loading import dump_recipe, load_recipe
from tests.conftest import SMALL, events
from tests.small_engines import equal
from tests.training.forked_ranks import ForkedRanks
from tests.training.runs import last_tensors, losses

TINY = (
    "model.embed_dim=16",
    "model.depth=1",
    "model.proj_drop=0.1",  # so that the ranks' random generators have an effect
    "data.workers=0",
    "data.prefetch=1",
    "schedule.warmup_epochs=0",
    "train.epochs=2",
    "checkpoint.every_steps=1",
    "checkpoint.snapshots=2",
)
STEPS = 4
_SCORES = ("exit", "steps", "samples", "best_top1", "best_step", "last_top1", "data_digest", "train_images", "seed")


def imported() -> None:
    """Import and prepare once what each start of a run needs."""
    import tests.imported  # noqa: F401
    from karat_scale.engine.deepspeed_internals import quieten_and_skip_builds

    quieten_and_skip_builds()


def tiny_recipe(
    directory: Path, stage: str, *overrides: str, data: str = "backend: synthetic, synthetic_samples: 16"
) -> Path:
    """Write the recipe of a run of `STEPS` steps; return its path.

    Its images need no files unless `data` says otherwise.
    """
    path = directory / "tiny.yaml"
    path.write_text(f"data: {{{data}}}\nattention: {{kind: karat}}\n")
    path.write_text(dump_recipe(load_recipe(path, [*SMALL, *TINY, f"deepspeed.config=zero{stage}", *overrides])))
    return path


def left_by(run: Path) -> dict[str, object]:
    """Return what a finished run leaves that no fault may change.

    These are all bits of its checkpoint, its losses, scores and snapshots, and parts of its summary.
    """
    summary = json.loads((run / "summary.json").read_text())
    return {
        "tensors": last_tensors(run),
        "best": CheckpointStore(run / "checkpoints").pointed("best"),
        "losses": losses(run),
        "scores": {event["step"]: event["top1"] for event in events(run, "eval")},
        "summary": {key: summary.get(key) for key in _SCORES},
        "snapshots": {path.name: load_file(path) for path in sorted((run / "snapshots").glob("step-*"))},
    }


def torn(run: Path) -> list[str]:
    """Return what is wrong with the checkpoints that `latest` and `best` name, if one is not whole."""
    store = CheckpointStore(run / "checkpoints")
    named = {pointer: store.pointed(pointer) for pointer in ("latest", "best")} if store.root.is_dir() else {}
    damage = {pointer: store.damage(name) for pointer, name in named.items() if name is not None}
    return [f"{pointer} names {named[pointer]}: {what}" for pointer, what in damage.items() if what is not None]


FINISHES_WITHIN = 180.0


@dataclass
class Outcome:
    """What a campaign has found; `problems` is empty when all is well."""

    ranks: int
    stage: str
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    """Temporary files of an interrupted write that the next start has not removed, and what had disturbed the run."""


class Campaign(ABC):
    """Runs of one recipe in one directory: each is disturbed, and must then end like the undisturbed one."""

    def __init__(self, recipe: Path, directory: Path, outcome: Outcome) -> None:
        self.recipe, self.directory, self.outcome = recipe, directory, outcome
        begun = time.monotonic()
        problems = self._finish(directory / "whole")
        assert not problems, problems
        self.whole_seconds = time.monotonic() - begun
        self._expected = left_by(directory / "whole")

    @abstractmethod
    def play(self, options: argparse.Namespace) -> Iterator[None]:
        """Disturb runs, and yield after each of them."""

    def start(self, run: Path, prepare: Callable[[int], object] = lambda rank: None) -> ForkedRanks:
        return ForkedRanks(["train", str(self.recipe), f"run.dir={run}"], self.outcome.ranks, self.log(run), prepare)

    def log(self, run: Path) -> Path:
        return self.directory / f"{run.name}.log"

    def end(self, run: Path, disturbed: str, problems: list[str]) -> None:
        """Note the problems of a disturbed run, and remove it.

        Without problems so far, run the same command again, and note what differs from the undisturbed run.
        """
        problems = problems or self._finish(run)
        if not problems:
            left = left_by(run)
            problems = [f"{part} differ" for part in self._expected if not equal(left[part], self._expected[part])]
            hidden = [path for path in sorted(run.rglob(".*")) if path.name != ".lock"]
            self.outcome.left_over += [f"{disturbed}: {path.relative_to(run)}" for path in hidden]
        if problems:
            said = self.log(run).read_text()[-3000:]
            self.outcome.problems.append(f"{run.name}, {disturbed}: {'; '.join(problems)}\n{said}")
        shutil.rmtree(run, ignore_errors=True)

    def _finish(self, run: Path) -> list[str]:
        ranks = self.start(run)
        is_good = ranks.wait(FINISHES_WITHIN) and not any(ranks.codes.values())
        return [] if is_good else [f"exit codes {[*ranks.codes.values()]} of the last start"]


def command_line(
    parser: argparse.ArgumentParser,
    kind: type[Campaign],
    outcome_type: type[Outcome],
    make_recipe: Callable[[Path, str], Path],
) -> int:
    """Play a campaign with the options that all campaigns have, and the parser's own; return the exit code."""
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", default="0", help="a file of ds_configs, such as 3_offload")
    parser.add_argument("--seed", type=int, default=0, help="of all that is chosen")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write the outcome there")
    options = parser.parse_args()
    outcome, begun = outcome_type(options.ranks, options.stage), time.monotonic()
    imported()
    with tempfile.TemporaryDirectory(prefix="karat-faults-") as name:
        campaign = kind(make_recipe(Path(name), options.stage), Path(name), outcome)
        for number, _ in enumerate(campaign.play(options), start=1):
            outcome.seconds = round(time.monotonic() - begun, 1)
            options.json.write_text(json.dumps(vars(outcome), indent=2) + "\n")
            print(f"{number} runs, {len(outcome.problems)} problems, {outcome.seconds} s", flush=True)
    return 1 if outcome.problems else 0

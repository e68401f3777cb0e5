"""Kill a training run again and again, and see that it ends in the bits of one that was left alone.

    python tests/torture.py --kills 300 [--seed 0] [--ranks 2] [--stage 1] [--json FILE] [key=value ...]

A round is one small run. It is started, killed by SIGKILL, and started again, until it has finished; its last
checkpoint (weights, optimizer, EMA, random generators) must equal the undisturbed run's bit for bit. Half of the kills
come at any moment of a start, half in the middle of a save; half hit one rank, half all. Rounds follow each other
until there were enough kills. Exit code 1: a difference, a run that hangs, or a start that failed for another reason.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the same sums in the same order
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import karat_scale.data.backends.images
import karat_scale.training.run
import karat_scale.training.tasks.classification.task  # noqa: F401
from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.engine.deepspeed_internals import quieten_and_skip_builds
from karat_scale.recipe.loading import dump_recipe, load_recipe
from tests.conftest import SMALL, make_image_folder, run_script
from tests.small_engines import equal
from tests.training.forked_ranks import ForkedRanks

FINISHES_WITHIN = 300.0
SURVIVORS_END_WITHIN = 3.0
POLL = 0.001
INTO_A_SAVE = 0.05


@dataclass
class Outcome:
    """What a campaign did and found; `problems` is empty when all is well."""

    seed: int
    ranks: int
    stage: str
    overrides: list[str]
    kills: int = 0
    kills_of: dict[str, int] = field(default_factory=lambda: {"one": 0, "all": 0})
    kills_while_saving: int = 0
    kills_before_a_checkpoint: int = 0
    survivors_ended: int = 0
    starts: int = 0
    rounds: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Campaign:
    """Rounds of one recipe in one directory."""

    def __init__(self, recipe: Path, directory: Path, outcome: Outcome) -> None:
        self._recipe, self._directory, self._outcome = recipe, directory, outcome
        self._random = random.Random(outcome.seed)
        begun = time.monotonic()
        ranks = self._start(directory / "whole")
        if not ranks.wait(FINISHES_WITHIN) or any(ranks.codes.values()):
            raise SystemExit(f"the undisturbed run failed; see {directory / 'whole.log'}")
        self._seconds = time.monotonic() - begun  # of an undisturbed run
        self._expected = last_tensors(directory / "whole")

    def round(self, kills: int) -> None:
        """One run, killed as often as it takes to finish but at most `kills` times."""
        run = self._directory / f"round-{self._outcome.rounds}"
        while True:
            ranks = self._start(run)
            if kills > 0 and self._kill(ranks, run):
                kills -= 1
                continue
            if not ranks.wait(FINISHES_WITHIN) or any(ranks.codes.values()):
                self._problem(f"{run}: exit codes {list(ranks.codes.values())}, expected 0; see {run.name}.log")
                return
            break
        self._outcome.rounds += 1
        if not equal(last_tensors(run), self._expected):
            self._problem(f"{run}: the last checkpoint differs from that of {self._directory / 'whole'}")
        else:
            shutil.rmtree(run)

    def _start(self, run: Path) -> ForkedRanks:
        self._outcome.starts += 1
        arguments = ["train", str(self._recipe), f"run.dir={run}"]
        return ForkedRanks(arguments, self._outcome.ranks, self._directory / f"{run.name}.log")

    def _kill(self, ranks: ForkedRanks, run: Path) -> bool:
        """Kill at a random moment; False when the run finished before."""
        begun, checkpoints = time.time(), run / "checkpoints"
        moment = begun + self._random.random() * self._seconds / 2
        while time.time() < moment and ranks.all_run():
            time.sleep(POLL)
        if self._random.random() < 0.5:
            while ranks.all_run() and not saving(checkpoints, begun):
                time.sleep(POLL)
            time.sleep(self._random.random() * INTO_A_SAVE)
        if not ranks.all_run():
            return False
        whom = self._random.choice(("one", "all")) if self._outcome.ranks > 1 else "all"
        ranks.kill([self._random.choice(ranks.ranks)] if whom == "one" else ranks.ranks)
        if not ranks.wait(SURVIVORS_END_WITHIN):  # one that waits for the dead to join ends by its launcher's hand
            self._outcome.survivors_ended += 1
        self._outcome.kills += 1
        self._outcome.kills_of[whom] += 1
        self._outcome.kills_while_saving += saving(checkpoints, begun)
        self._outcome.kills_before_a_checkpoint += not (checkpoints / "latest").exists()
        return True

    def _problem(self, text: str) -> None:
        self._outcome.problems.append(text)


def saving(checkpoints: Path, since: float) -> bool:
    """Whether a save that began after `since` is under way, or was cut off."""
    with contextlib.suppress(FileNotFoundError):  # it got its name meanwhile
        return any(path.stat().st_mtime > since for path in checkpoints.glob(".saving-*"))
    return False


def last_tensors(run: Path) -> dict[str, object]:
    """All that the last checkpoint's tensor files hold."""
    last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return {f"{last.name}/{path.name}": load_tensors(path) for path in sorted(last.glob("*.pt"))}


def prepare(directory: Path, stage: str, overrides: list[str]) -> Path:
    """Shards, and a recipe over them that saves after each step and uses each rank's random generator."""
    images, shards, base = directory / "images", directory / "shards", directory / "recipe.yaml"
    make_image_folder(images, {"train": 16, "val": 4})
    run_script("data_prep/make_webdataset.py", "--src", str(images), "--out", str(shards), "--shard-samples", "20")
    base.write_text(f"data: {{path: {shards}}}\nattention: {{kind: karat}}\nschedule: {{warmup_epochs: 0.5}}\n")
    own = (
        "train.epochs=4",
        f"deepspeed.config=zero{stage}",
        "model.proj_drop=0.1",
        "checkpoint.every_steps=1",
        "data.prefetch=1",
    )
    base.write_text(dump_recipe(load_recipe(base, [*SMALL, *own, *overrides])))
    return base


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill a run again and again; it must end in the same bits.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as checkpoint.every_steps=3")
    parser.add_argument("--kills", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--stage", default="1", help="a file of ds_configs, such as 3_offload (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    options = parser.parse_args()
    outcome = Outcome(options.seed, options.ranks, options.stage, options.overrides)
    directory = Path(tempfile.mkdtemp(prefix="karat-torture-"))
    begun = time.monotonic()
    quieten_and_skip_builds()  # once, not in each rank
    campaign = Campaign(prepare(directory, options.stage, options.overrides), directory, outcome)
    columns = TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()
    # No thread of its own: this process forks.
    with Progress(*columns, auto_refresh=False, disable=not Console().is_terminal) as progress:
        task = progress.add_task("", total=options.kills)
        while outcome.kills < options.kills and not outcome.problems:
            campaign.round(options.kills - outcome.kills)
            outcome.seconds = round(time.monotonic() - begun, 1)
            progress.update(task, completed=outcome.kills, refresh=True)
            if progress.disable:
                print(
                    f"{outcome.kills}/{options.kills} kills, {outcome.rounds} runs equal, {outcome.seconds} s",
                    flush=True,
                )
            if options.json:
                options.json.write_text(json.dumps(asdict(outcome), indent=2) + "\n")
    for problem in outcome.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if not outcome.problems:
        shutil.rmtree(directory)
    print(json.dumps(asdict(outcome)))
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())

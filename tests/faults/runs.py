"""A training run of milliseconds a step that saves after each of them, and all that it leaves to compare.

`imported()` first: the runs are forks of a process that has imported everything.
"""

import json
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the same sums in the same order

from safetensors.torch import load_file

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.recipe.loading import dump_recipe, load_recipe
from tests.conftest import SMALL, events
from tests.small_engines import equal

TINY = (
    "model.embed_dim=16",
    "model.depth=1",
    "model.proj_drop=0.1",  # so that the ranks' random generators count
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
    """Import and prepare once what each start of a run would."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    import karat_scale.data.backends.images
    import karat_scale.data.backends.synthetic
    import karat_scale.training.run
    import karat_scale.training.tasks.classification.task  # noqa: F401
    from karat_scale.engine.deepspeed_internals import quieten_and_skip_builds

    quieten_and_skip_builds()


def tiny_recipe(directory: Path, stage: str, *overrides: str) -> Path:
    """The recipe of a run of `STEPS` steps on images that need no files."""
    path = directory / "tiny.yaml"
    path.write_text("data: {backend: synthetic, synthetic_samples: 16}\nattention: {kind: karat}\n")
    path.write_text(dump_recipe(load_recipe(path, [*SMALL, *TINY, f"deepspeed.config=zero{stage}", *overrides])))
    return path


def left_by(run: Path) -> dict[str, object]:
    """What a finished run leaves that no fault may change: all bits of its checkpoint, losses, scores, snapshots."""
    store = CheckpointStore(run / "checkpoints")
    last, best = store.pointed("latest"), store.pointed("best")
    assert last is not None, f"{run} has no last checkpoint"
    summary = json.loads((run / "summary.json").read_text())
    return {
        "pointers": (last, best),
        "tensors": {path.name: load_tensors(path) for path in sorted((store.root / last).glob("*.pt"))},
        "losses": {event["step"]: event["loss"] for event in events(run, "train")},
        "scores": {event["step"]: event["top1"] for event in events(run, "eval")},
        "summary": {key: summary.get(key) for key in _SCORES},
        "snapshots": {path.name: load_file(path) for path in sorted((run / "snapshots").glob("step-*"))},
    }


def differing(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """The parts of `left_by` that differ."""
    return [key for key in expected if not equal(found[key], expected[key])]


def torn(run: Path) -> list[str]:
    """What a reader would find wrong now: a checkpoint that `latest` or `best` names and that is not whole."""
    store = CheckpointStore(run / "checkpoints")
    named = {pointer: store.pointed(pointer) for pointer in ("latest", "best")} if store.root.is_dir() else {}
    damage = {pointer: store.damage(name) for pointer, name in named.items() if name is not None}
    return [f"{pointer} names {named[pointer]}: {what}" for pointer, what in damage.items() if what is not None]


def left_over(run: Path) -> list[str]:
    """Files of an interrupted write that the next start should have removed."""
    return [str(path.relative_to(run)) for path in sorted(run.rglob(".*")) if path.name != ".lock"]

"""A run's directory: who may use it, what lies where, and how the run in it is opened for reading.

recipe.yaml      the resolved recipe; its presence means the run has begun
classes.json     the names of the classes, in the order of the labels
metrics.jsonl    one event a line
summary.json     the outcome
run_id           names the run at `checkpoint.url`
local_start      names the last start with `checkpoint.local`
copy.json        how far it is copied there
histograms.jsonl distributions for the trackers
predictions.npz  for each validation image, of the weights that were analysed last
evaluations/     results on other test sets, see commands/evaluate/predictions.py
tensorboard/     event files
trackers/        how far each tracker has got
profile/         see engine/reporting/interval.py
survey.*         see tasks/classification/conversion.py
incidents/       see outcome.py
checkpoints/     see checkpoint/store.py
snapshots/       see checkpoint/weights.py
"""

import json
import os
import secrets
import socket
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Generic

from torch import nn
from typing_extensions import Self, TypeVar

from karat_scale.checkpoint.restore import falsehood
from karat_scale.checkpoint.store import CheckpointStore, NearStore, checkpoint_name
from karat_scale.checkpoint.weights import load_weights, wants_ema
from karat_scale.data.batch import class_order_digest
from karat_scale.engine.distributed import World, device_name, write_flight_record
from karat_scale.engine.heartbeat import WRITE_SECONDS, Heartbeat, Sign, heartbeat_file, is_restart, read_signs
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import PeerError, RunDirectoryError, UserError, not_written
from karat_scale.foundation.files import (
    lock,
    open_regular,
    parse_json,
    read_object,
    read_text,
    remove_leftovers,
    replace_file,
    run_around,
)
from karat_scale.foundation.machine import this_node
from karat_scale.foundation.tables import require_trust
from karat_scale.models.init_from import KEYS_OF_OPERATORS
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.base import NEVER_ALLOWED, Effect, setting_text
from karat_scale.recipe.files import COMMANDS, read_run_recipe, recipe_of_run
from karat_scale.recipe.loading import (
    differing_keys,
    dump_recipe,
    effects,
    flatten,
    load_run_recipe,
    rounding_keys,
)

_RECIPE = "recipe.yaml"
# The keys in which two models with tensors of the same shapes may differ.
_UNSEEN = (
    *("model.num_heads", "attention.kind", "attention.basis", "attention.form", "attention.softmax_heads"),
    "attention.blocks",
)
_UNSEEN_IN_BRANCHES = tuple(dict.fromkeys((*_UNSEEN, *(f"attention.{key}" for key in KEYS_OF_OPERATORS))))
# How long a file server may keep the lock of a node that is gone: NFS 4 does for 90 seconds.
_LOCK_SECONDS = 120.0
# Of the keys that change the shapes of tensors, those for which init_from makes weights fit.
FITTED = ("model.image_size", "model.num_classes", "model.patch_size")
# The files that a run needs elsewhere besides its checkpoints; the rest can be made again. A file of the suffix FIXED
# says at its head what made it.
COPIED = (
    *("recipe.yaml", "classes.json", "metrics.jsonl", "summary.json", "*.safetensors", "trackers/*.json"),
    *("incidents/*.json", "snapshots/*.safetensors"),
)
FIXED = ".safetensors"
R = TypeVar("R", bound=RunRecipe, default=Recipe)


class RunDirectory:
    """Paths of one run, and the rules for starting or resuming in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.recipe_file = self.path / _RECIPE
        self.classes_file = self.path / "classes.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.copy_file = self.path / "copy.json"
        self.local_start_file = self.path / "local_start"
        self.profile = self.path / "profile"
        self.snapshots = self.path / "snapshots"
        self.store = CheckpointStore(self.path / "checkpoints", falsehood)
        self.near: NearStore | None = None
        """The store in which each node also keeps the newest checkpoints."""
        self._lock: IO[str] | None = None
        self.last_sign: float | None = None
        """When an earlier start was last seen, in seconds since the epoch; known once the directory is claimed."""

    def open(self, recipe: RunRecipe, check: Callable[[], object] = lambda: None) -> str:
        """Claim the directory for `recipe`, creating it if need be.

        Args:
            check: a function to call while waiting for a lock; an exception of it ends the wait.

        Returns:
            What the recipe changes on purpose in the run that is here, as text; mostly nothing.

        Raises:
            RunDirectoryError: it holds another recipe's run, is in use, cannot be written, or has
                checkpoints that `resume.mode=never` must not overwrite.
        """
        self.claim(check)
        return self.admit(recipe)

    def claim(self, check: Callable[[], object] = lambda: None) -> None:
        """Create the directory if need be, and keep other processes out.

        Raises:
            RunDirectoryError: it is in use, or cannot be written.
            PeerError: this start comes after a failed one, whose rank 0 shows no life and still has the lock.
        """
        is_new = not self.recipe_file.is_file() and not self.store.names()
        if is_new and (around := run_around(self.path)):
            raise RunDirectoryError(f"run.dir = {self.path} lies in {around}, another run; choose another run.dir")
        try:
            self.store.root.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            file = os.fdopen(open_regular(self.path / ".lock", flags), "a+", encoding="utf-8")
            if not self._lock_alone(file, check):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RunDirectoryError(
                    f"run.dir = {self.path} is in use by {holder}; wait for it or choose another run.dir"
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            self._lock = file  # held until the process ends
            # Data workers outlive a killed trainer by a second; with the lock, they would refuse its next start.
            mine = weakref.ref(file)
            os.register_at_fork(after_in_child=lambda: _close(mine()))
            self.last_sign = max((sign.written for sign in read_signs(self.path)), default=None)
            self.store.put_back()
        except OSError as error:
            raise RunDirectoryError(f"run.dir = {self.path}: {error.strerror}; choose another run.dir") from None

    def _lock_alone(self, file: IO[str], check: Callable[[], object]) -> bool:
        """Lock the directory by its file or, if the file system has no locks, if nobody else trains here.

        A file server keeps the lock of a lost node for a while. So wait for a lock whose holder, which is always rank
        0, shows no life. Some file systems lock on each node alone (BeeGFS, Lustre with `localflock`). So see whether
        rank 0 of a start on another node shows life.

        A node that SLURM took for lost may train on until its rank 0 misses the others. So a restart waits for a
        holder that shows life, too.
        """
        try:
            is_locked, has_locks = lock(file, wait=False, without=None), True
        except OSError:
            is_locked = has_locks = False
        before = self._signs_of_holder()
        if is_locked:
            since = time.time() - _LOCK_SECONDS
            before = [sign for sign in before if sign.host != this_node() and sign.written > since]
        if not before:
            return is_locked or not has_locks
        must_wait, two_beats = has_locks and not is_locked, 2 * WRITE_SECONDS
        begun = silent_since = time.monotonic()
        life, is_told = "shows no life", False
        while time.monotonic() - begun < _LOCK_SECONDS:
            time.sleep(0.2)
            check()
            if (now := self._signs_of_holder()) and now != before:
                if not is_restart():
                    return False
                before, silent_since, life = now, time.monotonic(), "still shows life"
            if must_wait and lock(file, wait=False):
                return True
            if not must_wait and time.monotonic() - silent_since >= two_beats:
                return True
            if time.monotonic() - begun > two_beats and not is_told:
                is_told = True
                what = f"waiting, as its holder {life}; at most {_LOCK_SECONDS:.0f} s"
                print(f"{self.path / '.lock'}: {what}", flush=True)
        if is_restart():
            raise PeerError(f"{self.path / '.lock'}: held since the last start by a process that {life}")
        return False

    def local_start(self) -> str:
        """Return the name of the last start, if it had `checkpoint.local`; else an empty text. Raises OSError."""
        try:
            return read_text(self.local_start_file, 256).strip()
        except FileNotFoundError:
            return ""

    def renew_local_start(self) -> str:
        """Record a new name for this start, and return it. Raises RunDirectoryError."""
        name = secrets.token_hex(8)
        _write(self.local_start_file, f"{name}\n")
        return name

    def _signs_of_holder(self) -> list[Sign]:
        return [sign for sign in read_signs(self.path) if sign.rank == 0]

    def admit(self, recipe: RunRecipe) -> str:
        """Let `recipe` train in the directory, which is claimed; returns and raises as `open` does."""
        if recipe.resume.mode == "never" and self.store.names():
            raise RunDirectoryError(
                f"run.dir = {self.path} has checkpoints and resume.mode = never; "
                "choose another run.dir or use resume.mode=auto"
            )
        if not self.recipe_file.is_file():
            if self.store.names():
                raise RunDirectoryError(
                    f"run.dir = {self.path} has checkpoints, but no {_RECIPE}, which says what they are of; put it "
                    f"back, or choose another run.dir and set resume.from={self.path}"
                )
            return ""
        if recipe.resume.mode == "never":
            return ""
        if (command := self.command) != COMMANDS[type(recipe).shipped]:
            raise RunDirectoryError(f"run.dir = {self.path} has a run of karat {command}; choose another run.dir")
        old = self.recipe(type(recipe))
        if self.store.names():
            self._refuse_another_recipe(old, recipe)
        return describe_keys(old, recipe, [*differing_keys(old, recipe), *rounding_keys(old, recipe)])

    def begins_anew(self, recipe: RunRecipe) -> bool:
        """Return whether nothing of an earlier start here counts for `recipe`; call it before `begin`.

        True if there is no checkpoint, and `resume.mode=never` is set, no recipe is there, or it is another recipe.
        """
        return not self.store.names() and (
            recipe.resume.mode == "never"
            or not self.recipe_file.is_file()
            or bool(differing_keys(self.recipe(type(recipe)), recipe))
        )

    def clear(self, ranks: int) -> list[str]:
        """Remove what killed starts, and starts with more ranks, left behind; the directory is claimed.

        Returns:
            A line for each file that stays.
        """
        problems = self.store.discard_unfinished()
        for directory in (self.path, self.snapshots, self.profile):
            problems += remove_leftovers(directory)
        now = {heartbeat_file(self.path, rank).stem for rank in range(ranks)}  # also *.tmp, which may become one now
        for path in (self.path / "heartbeats").glob("rank-*"):
            if path.stem not in now:
                with suppress(OSError):
                    path.unlink()
        return problems

    def start_heartbeat(self, world: World) -> Heartbeat:
        """Start this rank's heartbeat. Raises UserError if KARAT_STALL_SECONDS cannot be read."""
        try:
            heartbeat = Heartbeat(self.path, world.rank, device_name(world.device), write_flight_record)
        except ValueError as error:
            raise UserError(f"KARAT_STALL_SECONDS (in a SLURM job STALL_SECONDS): {error}") from None
        return heartbeat.start()

    def begin(self, recipe: RunRecipe, classes: Sequence[str] = ()) -> None:
        """Record the names of the classes and the recipe: from here on the directory is this run's.

        Raises RunDirectoryError when the disk does not take them.
        """
        _write(self.classes_file, json.dumps(list(classes)) + "\n")
        _write(self.recipe_file, dump_recipe(recipe))

    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes; none for a run that began before they were recorded.

        Raises:
            RunDirectoryError: the file is damaged.
        """
        try:
            names = parse_json(read_text(self.classes_file))  # pydantic refuses a folder's name that is not UTF-8
        except FileNotFoundError:
            return ()
        except PermissionError as error:
            raise RunDirectoryError(f"{self.classes_file}: {error.strerror}; make it readable") from None
        except (OSError, ValueError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise RunDirectoryError(
                f"{self.classes_file}: not a JSON list of names; write those of the classes, in the order of the labels"
            )
        return tuple(names)

    @property
    def command(self) -> str:
        """The command that trains the run, `train` or `detect`. Raises RunDirectoryError: not a run directory."""
        return "detect" if "detector" in read_run_recipe(recipe_of_run(self.path)) else "train"

    def recipe(self, schema: type[R] = Recipe, overrides: Sequence[str] = ()) -> R:  # type: ignore[assignment]
        """Return the recipe of an existing run, of the kind `schema`, with the user's overrides.

        Raises:
            RunDirectoryError: this is not a run directory, or another kind of run's.
            RecipeError: the recipe is damaged, or an override does not fit it.
        """
        command, wanted = self.command, COMMANDS[schema.shipped]
        if command != wanted:
            reader = {"detect": "karat detect --eval", "train": "karat eval"}[command]
            raise RunDirectoryError(f"{self.path}: a run of karat {command}, not of karat {wanted}; {reader} reads it")
        return load_run_recipe(self.recipe_file, overrides, schema)

    def summary(self) -> dict[str, Any] | None:
        """Return `summary.json`, if the run has written a whole one."""
        return read_object(self.summary_file) or None

    @property
    def is_summary_damaged(self) -> bool:
        """Return whether there is a `summary.json` that cannot be read."""
        return self.summary_file.is_file() and self.summary() is None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace `summary.json`. Raises RunDirectoryError when the disk does not take it."""
        _write(self.summary_file, json.dumps(summary, indent=2) + "\n")

    def _refuse_another_recipe(self, old: RunRecipe, recipe: RunRecipe) -> None:
        """Raise RunDirectoryError, with what can be done, if the run here cannot go on with this recipe."""
        keys = differing_keys(old, recipe, recipe.resume.allow)
        before, after = flatten(old), flatten(recipe)
        fixed = [key for key in NEVER_ALLOWED if before.get(key) != after.get(key)] + _unseen(before, after)
        summary = self.summary() or {}
        ended = summary.get("exit") == 0 and before["train.max_steps"] is None
        is_finished = ended and self.store.pointed("latest") == checkpoint_name(summary.get("steps", -1))
        is_longer = keys == ["train.epochs"] and after["train.epochs"] > before["train.epochs"]
        if is_longer and not fixed and is_finished:
            return  # asking for more of a finished run cannot be a mistake
        keys += [key for key in fixed if key not in keys]
        if keys:
            raise RunDirectoryError(
                f"run.dir = {self.path} belongs to another recipe: {describe_keys(old, recipe, keys)}; "
                f"{_advice(self.path, keys, fixed, before, recipe)}"
            )

    def keep_data(
        self,
        state: RunState,
        images: int,
        identity: str,
        classes: Sequence[str],
        tested: int,
        recipe: RunRecipe,
        is_branch: bool,
    ) -> str:
        """Record in `state` which data it is of: its cursor counts their images, its labels number their classes.

        Args:
            images: the number of training images.
            identity: the identity of these images, see `Task.train_identity`.
            classes: the class names, in the order of the labels.
            tested: the number of validation images; another number is reported, not refused.
            is_branch: whether the state is of another run, which may have had other data.

        Returns:
            How the data differ from those the state had, if they may; else an empty text.

        Raises:
            RunDirectoryError: they differ and `resume.allow` does not list data.path.
        """
        order = class_order_digest(classes)
        differences = []
        if state.train_images not in (0, images):
            differences.append(f"{images:,} training images where it had {state.train_images:,}")
        elif state.train_identity.partition(":")[0] == identity.partition(":")[0] and state.train_identity != identity:
            differences.append("other training images, as many as before")
        if state.class_order_sha256 not in ("", order):
            differences.append("other classes")
        said = " and ".join(differences)
        if said and not is_branch and not {"data", "data.path"} & set(recipe.resume.allow):
            raise RunDirectoryError(
                f"run.dir = {self.path}: its run began with other data: data.path has {said}; correct "
                f"data.path, {leave_for(recipe, 'data.path')}, or choose another run.dir"
            )
        if state.val_images not in (0, tested):
            differences.append(
                f"{tested:,} validation images where it had {state.val_images:,}, so its scores are of other images "
                "than before"
            )
        state.train_images, state.train_identity, state.class_order_sha256 = images, identity, order
        state.val_images = tested
        return " and ".join(differences)


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise not_written(path, error) from error


def _close(file: IO[str] | None) -> None:
    if file is not None:
        file.close()


def refuse_another_model(source: Path, recipe: RunRecipe, by_shapes: bool = False) -> None:
    """Raise RunDirectoryError if a run, or the run of a checkpoint, is of another command or model than a recipe.

    Models are compared in what the shapes of tensors do not show: the number of heads and the kind of functions. If the
    shapes are known to differ, `by_shapes`, they are compared in the keys that may be why.
    """
    file = next((path for path in (source / _RECIPE, source.parent.parent / _RECIPE) if path.is_file()), None)
    if file is None:
        return
    command, wanted = RunDirectory(file.parent).command, COMMANDS[type(recipe).shipped]
    if command != wanted:
        what = f"is of a run of karat {command}, not of karat {wanted}"
        raise RunDirectoryError(f"resume.from = {source} {what}; name a run of karat {wanted}")
    theirs = load_run_recipe(file, (), type(recipe))
    allowed = {*recipe.resume.allow}.difference(_UNSEEN)
    unseen = _unseen(flatten(theirs), flatten(recipe), _UNSEEN_IN_BRANCHES)
    if keys := shaping_keys(theirs, recipe) if by_shapes else [key for key in unseen if key not in allowed]:
        raise RunDirectoryError(
            f"resume.from = {source} is of another model: {describe_keys(theirs, recipe, keys)}; "
            "set the keys as it has them"
        )


def shaping_keys(old: RunRecipe, new: RunRecipe) -> list[str]:
    """Return the keys that differ and may change shapes; none of `attention` if `old` learns no attention."""
    known = effects(type(new))
    keys = [key for key in differing_keys(old, new) if known[key] is Effect.SHAPES]
    return [key for key in keys if old.attention.learns or not key.startswith("attention.")]


def _unseen(before: dict[str, Any], after: dict[str, Any], among: Sequence[str] = _UNSEEN) -> list[str]:
    """Return the keys that differ. A null stands for the model's own number, which is not known here."""
    is_softmax = all(one["attention.kind"] == "softmax" and not one["attention.blocks"] for one in (before, after))
    keys = [key for key in among if None not in (before.get(key), after.get(key)) and before[key] != after[key]]
    return [key for key in keys if not is_softmax or key.startswith("model.")]


def leave_for(recipe: RunRecipe, *keys: str) -> str:
    """Return how to let keys differ, besides those that the recipe lets differ already."""
    return f"add 'resume.allow=[{','.join((*recipe.resume.allow, *keys))}]'"


def _advice(path: Path, keys: list[str], fixed: list[str], before: dict[str, Any], recipe: RunRecipe) -> str:
    """Return what to do about keys that differ in `recipe`, of which `fixed` may never differ."""
    known = effects(type(recipe))
    if shaping := [key for key in keys if known[key] is Effect.SHAPES and key not in NEVER_ALLOWED]:
        fits = all(key in FITTED for key in shaping)
        weights = f", with init_from={path} to start from its weights" if fits else ""
        return f"another model cannot resume from its checkpoints: choose another run.dir{weights}"
    advice = [f"use {key}={before[key]}" for key in fixed]
    if others := [key for key in keys if key not in fixed]:
        advice.append(leave_for(recipe, *others))
    return f"{' and '.join(advice)}, or choose another run.dir"


def describe_keys(old: RunRecipe, new: RunRecipe, keys: list[str]) -> str:
    """Differing keys with both values, as text."""
    before, after = flatten(old), flatten(new)
    listed = ", ".join(f"{key} ({setting_text(before.get(key))} -> {setting_text(after[key])})" for key in keys[:6])
    return listed + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")


@dataclass
class OpenRun(Generic[R]):
    """One run to read. `at` opens it by its directory.

    Args:
        path: the run's directory.
        recipe: the run's recipe, with the user's overrides.
        weights: "raw", "ema", or "auto", which is what the recipe evaluates.
        checkpoint: best, latest, or a name. Without a best one, "best" means "latest".

    Raises:
        UntrustedError: its recipe names a class.
    """

    path: Path
    recipe: R
    weights: str = "auto"
    checkpoint: str = "best"

    def __post_init__(self) -> None:
        self.directory = RunDirectory(self.path)
        self.store = self.directory.store
        require_trust(self.recipe.attention.classes, self.directory.recipe_file)

    @classmethod
    def at(
        cls,
        path: str | Path,
        schema: type[R],
        overrides: Sequence[str] = (),
        weights: str = "auto",
        checkpoint: str = "best",
    ) -> Self:
        """Open the run of a directory, of the kind `schema`.

        Raises:
            RunDirectoryError: this is not a run directory, or another kind of run's.
            RecipeError: its recipe cannot be read, or an override does not fit it.
            UntrustedError: its recipe names a class.
        """
        directory = RunDirectory(path)
        return cls(directory.path, directory.recipe(schema, overrides), weights, checkpoint)

    @cached_property
    def trained(self) -> R:
        """The recipe that the run was trained with."""
        return self.directory.recipe(type(self.recipe))

    @cached_property
    def chosen(self) -> str:
        """The checkpoint's name; it is intact. Raises RunDirectoryError if there is none."""
        return self.store.find_intact(self.checkpoint)

    def choose(self, world: World) -> str:
        """Return `chosen`, which only rank 0 looks for. Collective; raises the same on all ranks."""
        self.chosen = world.on_main(lambda: self.chosen)
        return self.chosen

    @property
    def saved(self) -> dict[str, Any]:
        """The checkpoint's `state.json`."""
        return self.store.state(self.chosen)

    @property
    def weights_kind(self) -> str:
        """Return which weights of the checkpoint are meant, "raw" or "ema"."""
        return "ema" if wants_ema(self.weights, self.recipe, self.saved) else "raw"

    def load(self, model: nn.Module, name: str | None = None, weights: str | None = None) -> None:
        """Copy a checkpoint's weights into a model like the run's.

        Args:
            name: the name of an intact checkpoint, instead of the chosen one.
            weights: the kind of weights, instead of the run's choice.

        Raises:
            RunDirectoryError: it is of another model, or without averages.
        """
        name = name or self.chosen
        saved = self.store.state(name)
        load_weights(model, self.store.root / name, saved, wants_ema(weights or self.weights, self.recipe, saved))

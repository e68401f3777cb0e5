import errno
import multiprocessing
import os
import shutil
import threading
import time
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from karat_scale.engine import heartbeat
from karat_scale.engine.heartbeat import Heartbeat
from karat_scale.foundation.errors import PeerError, RecipeError, RunDirectoryError
from karat_scale.recipe.loading import dump_recipe
from karat_scale.training import run_directory
from karat_scale.training.run_directory import RunDirectory, refuse_another_model
from karat_scale.training.tasks.classification.task import TrainState
from tests.conftest import karat_here


def test_a_new_directory_is_claimed_by_one_and_begun(small_recipe, tmp_path, monkeypatch) -> None:
    recipe = small_recipe()
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = RunDirectory("~/new/run")
    assert directory.path == tmp_path / "new" / "run"
    directory.open(recipe)
    with pytest.raises(RunDirectoryError, match="in use by process"):
        RunDirectory(directory.path).open(recipe)
    assert directory.summary() is None
    assert directory.classes() == ()
    directory.begin(recipe, ("cat", "dog"))
    assert dump_recipe(directory.recipe()) == dump_recipe(recipe)
    assert directory.classes() == ("cat", "dog")
    directory.begin(recipe, ("caf\udce9", "dog"))  # of a folder whose name is Latin-1
    assert directory.classes() == ("caf\udce9", "dog")
    directory.write_summary({"exit": 0})
    assert directory.summary() == {"exit": 0}
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"run.dir = .*choose another run.dir"):
        RunDirectory(tmp_path / "file" / "run").open(recipe)


def _outlive(begun: Event) -> None:
    begun.set()
    time.sleep(60)


def test_a_process_that_outlives_the_run_does_not_hold_its_directory(small_recipe, tmp_path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.open(small_recipe())
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    worker = context.Process(target=_outlive, args=(begun,))
    worker.start()
    assert begun.wait(30)  # a fork is not yet at its first line when start() returns
    del directory  # as a kill does
    RunDirectory(tmp_path / "run").open(small_recipe())
    assert worker.is_alive()
    worker.kill()
    worker.join()


@pytest.fixture
def begun(small_recipe, tmp_path) -> RunDirectory:
    """Return the directory of a run that has begun, with a checkpoint."""
    directory = RunDirectory(tmp_path / "run")
    (directory.store.root / "step-00000008").mkdir(parents=True)
    directory.begin(small_recipe())
    return directory


def test_keys_that_do_not_matter_or_are_allowed_may_change(begun, small_recipe) -> None:
    same = ("data.workers=0", "log.every_steps=3", "train.micro_batch=2", "data.on_bad_sample=skip")
    assert begun.open(small_recipe(*same)) == "train.micro_batch (null -> 2)"
    assert begun.admit(small_recipe("optim.lr=1", "resume.allow=optim.lr")) == "optim.lr (0.0005 -> 1.0)"


AUGMENT = [f"augment.{key}=0" for key in ("hflip", "mixup", "cutmix", "mix_prob", "label_smoothing")]
FIXED = {"model.num_heads": 4, "attention.basis": "morlet", "distill.from": "runs/other", "optim.name": "muon"}
REFUSED = [
    (["resume.mode=never"], r"has checkpoints and resume.mode = never; choose another run.dir or use"),
    (["optim.lr=1"], r"optim.lr \(0.0005 -> 1.0\); add 'resume.allow=\[optim.lr\]'"),
    (["train.global_batch=16", "resume.allow=train.global_batch"], r"\(8 -> 16\); use train.global_batch=8, or choose"),
    (["train.global_batch=16", "optim.lr=1"], r"; use train.global_batch=8 and add 'resume.allow=\[optim.lr\]', or"),
    (["init_from=runs/a"], r"init_from \('' -> runs/a\)"),
    (["optim.lr=1", "schedule.min_lr=1e-6", "resume.allow=optim.lr"], r"resume.allow=\[optim.lr,schedule.min_lr\]'"),
    ([*AUGMENT, "augment.color_jitter=0.1", "optim.lr=1"], "and 1 more"),
    # resume.allow is not advised for another model, and does not help.
    *(
        ([change, "optim.lr=1"], r"another model cannot .*: choose another run.dir$")
        for change in ("attention.rank=3", "model.depth=3", "attention.basis=bspline")
    ),
    (["model.num_classes=5"], r"choose another run.dir, with init_from=.*/run to start"),
    *(
        ([f"{key}={value}", f"resume.allow={key}", *longer], key)
        for key, value in FIXED.items()
        for longer in ([], ["train.epochs=200"])
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED)
def test_another_recipe_is_refused_with_the_fix(begun, small_recipe, overrides, line) -> None:
    with pytest.raises(RunDirectoryError, match=line):
        begun.open(small_recipe(*overrides))


def test_a_run_of_another_command_is_refused_with_what_to_do(begun, small_recipe) -> None:
    begun.recipe_file.write_text("detector: {}\n")
    with pytest.raises(RunDirectoryError, match=r"has a run of karat detect; choose another run\.dir$"):
        begun.open(small_recipe())


def test_checkpoints_without_a_recipe_resume_nothing(begun, small_recipe) -> None:
    """Before the fix, any recipe of a model with the same shapes resumed them."""
    begun.recipe_file.unlink()
    said = f"has checkpoints, but no recipe.yaml, .* set resume.from={begun.path}$"
    with pytest.raises(RunDirectoryError, match=said):
        begun.open(small_recipe())


def test_no_run_begins_within_another(begun, small_recipe) -> None:
    with pytest.raises(RunDirectoryError, match=f"lies in {begun.path}, another run; choose another run.dir"):
        RunDirectory(begun.path / "checkpoints" / "new").open(small_recipe())
    RunDirectory(begun.path / ".." / "beside").open(small_recipe())
    inside = shutil.copytree(begun.path, begun.path / "moved here")
    RunDirectory(inside).open(small_recipe())  # a run that was moved into another


def test_a_branch_is_of_the_same_model(small_recipe, tmp_path) -> None:
    trunk = RunDirectory(tmp_path / "trunk")
    trunk.path.mkdir()
    trunk.begin(small_recipe("attention.basis=mexican_hat"))
    checkpoint = trunk.path / "checkpoints" / "step-00000003"
    for source in (trunk.path, checkpoint):
        same = ("attention.basis=mexican_hat", "optim.lr=1", "model.image_size=8", "model.num_heads=null")
        refuse_another_model(source, small_recipe(*same))
        with pytest.raises(RunDirectoryError, match=r"attention.basis \(mexican_hat -> morlet\)"):
            refuse_another_model(source, small_recipe("attention.basis=morlet"))
        for key, value in {"base": "silu", "simplex": "true", "range": "1"}.items():
            with pytest.raises(RunDirectoryError, match=rf"attention.{key} \("):
                refuse_another_model(source, small_recipe(*same, f"attention.{key}={value}"))
        refuse_another_model(source, small_recipe(*same, "attention.base=silu", "resume.allow=attention.base"))
    (trunk.path / "recipe.yaml").write_text("detector: {}\n")
    with pytest.raises(RunDirectoryError, match="is of a run of karat detect, not of karat train"):
        refuse_another_model(checkpoint, small_recipe())


def hold(path: Path, held: Event, ended: Event, beats: bool) -> None:
    """Claim a directory until `ended` is set; without `beats`, its heartbeats stop at once."""
    directory = RunDirectory(path)
    directory.claim()
    heartbeat = Heartbeat(path, 0).start()
    if not beats:
        heartbeat.stop()
    held.set()
    ended.wait(60)
    heartbeat.stop()


@pytest.mark.parametrize("has_locks", [True, False])
@pytest.mark.parametrize("beats", [True, False])
def test_a_lock_whose_holder_shows_no_life_is_waited_for(tmp_path, monkeypatch, capsys, beats, has_locks) -> None:
    context = multiprocessing.get_context("fork")
    held, ended = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "run", held, ended, beats))
    holder.start()
    assert held.wait(30)
    if not has_locks:

        def no_locks(*_: object, without: bool | None = True, **__: object) -> bool:
            if without is None:
                raise OSError(errno.ENOSYS, "Function not implemented")
            return without

        monkeypatch.setattr(run_directory, "lock", no_locks)
    elif not beats:

        def tell(*texts: object, **options: bool) -> None:
            print(*texts, **options)
            Heartbeat(tmp_path / "run", 1).start().stop()  # of another rank, which says nothing about rank 0
            ended.set()

        monkeypatch.setattr(run_directory, "print", tell, raising=False)
    if beats:
        monkeypatch.setattr(run_directory, "WRITE_SECONDS", 60.0)  # the holder may have to wait for a processor
    try:
        if beats:
            with pytest.raises(RunDirectoryError, match=rf"is in use by process {holder.pid} on "):
                RunDirectory(tmp_path / "run").claim()
            monkeypatch.setenv("SLURMD_NODENAME", "elsewhere")
            monkeypatch.setattr(run_directory, "lock", lambda *_, **__: True)  # of a file system with locks for a node
            with pytest.raises(RunDirectoryError, match=rf"is in use by process {holder.pid} on "):
                RunDirectory(tmp_path / "run").claim()
        else:
            RunDirectory(tmp_path / "run").claim()
            assert ("waiting, as its holder shows no life" in capsys.readouterr().out) == has_locks
    finally:
        ended.set()
        holder.join()


@pytest.mark.parametrize("variables", [{"SLURM_RESTART_COUNT": "1"}, {"KARAT_START": "7-0.1"}], ids=str)
def test_a_restart_that_finds_the_lock_of_a_lost_rank_is_tried_again(tmp_path, monkeypatch, variables) -> None:
    context = multiprocessing.get_context("fork")
    held, ended = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "run", held, ended, False))
    holder.start()
    monkeypatch.setattr(run_directory, "_LOCK_SECONDS", 0.5)
    try:
        assert held.wait(30)
        with pytest.raises(RunDirectoryError, match=f"in use by process {holder.pid} on "):
            RunDirectory(tmp_path / "run").claim()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(PeerError, match="held since the last start by a process that shows no life"):
            RunDirectory(tmp_path / "run").claim()
    finally:
        ended.set()
        holder.join()


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_restart_waits_for_a_rank_of_a_node_that_was_taken_for_lost(tmp_path, monkeypatch, has_locks) -> None:
    """Before the fix, it ended with exit code 2, after which no job starts again."""
    context = multiprocessing.get_context("fork")
    held, ended = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "run", held, ended, True))
    for module in (run_directory, heartbeat):
        monkeypatch.setattr(module, "WRITE_SECONDS", 0.5)
    holder.start()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    if not has_locks:
        monkeypatch.setenv("SLURMD_NODENAME", "elsewhere")
        monkeypatch.setattr(run_directory, "lock", lambda *_, **__: True)  # of a file system with locks for a node
    try:
        assert held.wait(30)
        monkeypatch.setattr(run_directory, "_LOCK_SECONDS", 2.0)
        with pytest.raises(PeerError, match="by a process that still shows life"):
            RunDirectory(tmp_path / "run").claim()
        monkeypatch.setattr(run_directory, "_LOCK_SECONDS", 60.0)
        threading.Timer(1, ended.set).start()
        RunDirectory(tmp_path / "run").claim()
    finally:
        ended.set()
        holder.join()


def test_a_start_that_left_no_checkpoint_does_not_hold_the_directory(small_recipe, tmp_path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    assert directory.begins_anew(small_recipe())
    directory.begin(small_recipe())
    assert not directory.begins_anew(small_recipe("log.every_steps=3"))
    assert directory.admit(small_recipe("optim.lr=1", "resume.mode=never")) == ""
    other = small_recipe("attention.grid=5", "train.global_batch=16")
    assert directory.open(other) == "attention.grid (2 -> 5), train.global_batch (8 -> 16)"
    assert directory.begins_anew(other)
    (directory.store.root / "step-00000001").mkdir(parents=True)
    assert not directory.begins_anew(other)
    assert not directory.begins_anew(small_recipe("resume.mode=never"))  # as at the next image size of a run
    with pytest.raises(RunDirectoryError, match=r"attention.grid \(2 -> 5\)"):
        RunDirectory(directory.path).admit(other)


def test_only_a_finished_run_is_extended_without_leave(begun, small_recipe) -> None:
    directory = begun
    directory.store.point("latest", "step-00000008")
    longer = small_recipe("train.epochs=3")
    for summary in ({"exit": 75, "steps": 8}, {"exit": 0, "steps": 7}):
        directory.write_summary(summary)
        with pytest.raises(RunDirectoryError, match=r"train.epochs \(2 -> 3\)"):
            RunDirectory(directory.path).open(longer)
    directory.write_summary({"exit": 0, "steps": 8})
    with pytest.raises(RunDirectoryError, match=r"train.epochs \(2 -> 1\)"):
        RunDirectory(directory.path).open(small_recipe("train.epochs=1"))
    assert RunDirectory(directory.path).open(longer) == "train.epochs (2 -> 3)"


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_damaged_summary_is_none(tmp_path, text) -> None:
    directory = RunDirectory(tmp_path)
    assert not directory.is_summary_damaged
    directory.summary_file.write_text(text)
    assert directory.summary() is None
    assert directory.is_summary_damaged


@pytest.mark.parametrize("name", ["recipe.yaml", "classes.json", "metrics.jsonl", ".lock"])
def test_a_pipe_in_a_run_keeps_nobody_waiting(name, recipe_file, tmp_path, capsys) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / name)
    is_replaced = name in ("recipe.yaml", "classes.json")
    assert karat_here("train", str(recipe_file), "train.max_steps=1", "data.workers=0") == (0 if is_replaced else 2)
    assert ("not a regular file" in capsys.readouterr().err) != is_replaced
    assert (tmp_path / "run" / name).is_file() == is_replaced


def test_the_recipe_of_a_run_extends_nothing(recipe_file, tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"extends: {recipe_file}\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml: extends: a run's recipe must be complete"):
        RunDirectory(tmp_path).recipe()
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"recipe.yaml: empty; .* or remove the file and run the same karat train"):
        RunDirectory(tmp_path).recipe()


def test_a_state_resumes_only_with_its_own_data(small_recipe) -> None:
    recipe, state = small_recipe(), TrainState()
    keep_data = partial(RunDirectory(recipe.run.dir).keep_data, tested=10, recipe=recipe, is_branch=False)
    cats, dogs = ("IMAGES:1", ("cat", "dog")), ("IMAGES:1", ("dog", "cat"))
    assert keep_data(state, 64, *cats) == ""
    state = TrainState.from_json(state.to_json())
    assert keep_data(state, 64, *cats) == ""
    with pytest.raises(RunDirectoryError, match=r"data.path has 40 training images where it had 64; correct"):
        keep_data(state, 40, *cats)
    with pytest.raises(RunDirectoryError, match=r"has other classes; correct data\.path"):
        keep_data(state, 64, *dogs)  # the labels mean something else
    with pytest.raises(RunDirectoryError, match=r"has other training images, as many as before; correct data\.path"):
        keep_data(state, 64, "IMAGES:2", cats[1])
    changed = "40 training images where it had 64 and other classes"
    assert keep_data(replace(state), 40, *dogs, is_branch=True) == changed
    allowed = small_recipe("resume.allow=data.path")
    assert keep_data(state, 40, *dogs, recipe=allowed) == changed
    assert keep_data(state, 40, *dogs) == ""
    assert keep_data(state, 40, "SHARDS:3", dogs[1]) == ""  # a folder and its shards cannot be compared
    assert keep_data(TrainState(train_images=40), 40, *dogs) == ""  # saved by a version that did not note it
    other = "9 validation images where it had 10, so its scores are of other images than before"
    assert keep_data(state, 40, *dogs, tested=9) == other
    assert keep_data(state, 40, *dogs, tested=9) == ""


def test_an_image_in_place_of_another_is_other_data(recipe_file, image_folder, tmp_path, capsys) -> None:
    """As many images of the same classes may be other data, because a renamed image changes the order.

    A resumed epoch would then see some images twice, and others never.
    """
    shutil.copytree(image_folder, tmp_path / "images")
    folder = ("data.backend=folder", f"data.path={tmp_path / 'images'}", "data.workers=0")
    train = partial(karat_here, "train", str(recipe_file), *folder)
    assert train("train.max_steps=1") == 0
    shutil.move(tmp_path / "images", tmp_path / "moved")
    moved = f"data.path={tmp_path / 'moved'}"
    (tmp_path / "moved/train/class1/000.jpg").rename(tmp_path / "moved/train/class1/new.jpg")
    assert train("train.max_steps=2", moved) == 2
    assert "other training images, as many as before; correct data.path, add" in capsys.readouterr().err
    (tmp_path / "moved/train/class1/new.jpg").rename(tmp_path / "moved/train/class1/000.jpg")
    assert train("train.max_steps=2", moved) == 0

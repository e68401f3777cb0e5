"""`checkpoint.local`: the newest state on a disk of each node, and how a start uses it."""

import errno
import json
import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.checkpoint.store import NearStore
from karat_scale.engine.reporting.progress import PlainDisplay, Reporter
from karat_scale.foundation.files import Fingerprint
from karat_scale.training.run import open_near
from tests.checkpoint.near import KILLED, SHARED
from tests.conftest import ROOT, karat_environment, karat_refuses
from tests.small_engines import make_trainer
from tests.warm import run_program


def outcomes(scratch: Path, *cases: str) -> dict[str, dict[str, Any]]:
    """Return how runs of two nodes resumed after a kill, by case.

    Assert that each run ended in the same bits as an undisturbed one, and left no files on the nodes.
    """
    environment = [karat_environment()]
    done = run_program("tests.checkpoint.near", [str(scratch), *cases], environment, timeout=300, directory=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(json.loads((scratch / "outcomes.json").read_text()))
    for one in found.values():
        assert (one["codes"], one["differs"], one["left"]) == ([0, 0], [], []), one["said"]
    return found


@pytest.mark.multiprocess
def test_a_run_goes_on_from_the_newest_state_that_the_nodes_have(tmp_path) -> None:
    assert outcomes(tmp_path, "back")["back"]["resumed"] == [KILLED]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_a_node_has_lost_and_what_is_damaged_or_of_another_run_is_left_alone(tmp_path) -> None:
    found = outcomes(tmp_path, "without_a_node", "damaged", "damaged_later", "anew")
    assert found["without_a_node"]["resumed"] == [SHARED]
    assert found["damaged"]["resumed"] == [KILLED - 1]
    assert "has changed since it was written; trying the one before" in found["damaged"]["said"]
    assert found["damaged_later"]["resumed"] == [KILLED]
    assert found["anew"]["resumed"] == []


def test_a_place_that_cannot_be_written_or_belongs_to_another_is_one_line(recipe_file, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    line = karat_refuses("train", str(recipe_file), f"checkpoint.local={tmp_path / 'file'}")
    assert line.startswith(f"error: checkpoint.local = {tmp_path / 'file'}: ")
    assert "choose another directory" in line
    near = NearStore(tmp_path, tmp_path / "run", "id")
    near.root.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="belongs to another user"):
        near.open()
    assert "should be a directory of each node" in karat_refuses("train", str(recipe_file), "checkpoint.local=s3://b/x")


def test_a_node_needs_room_for_its_own_files_alone(tmp_path: Path) -> None:
    near = NearStore(tmp_path, tmp_path / "run", "id")
    unfinished = near.begin(1)
    (unfinished / "rank-00000.pt").write_bytes(bytes(1000))
    files = {f"rank-{rank:05d}.pt": Fingerprint(1000, sha256(bytes(1000)).hexdigest()) for rank in range(8)}
    near.commit(unfinished, {"step": 1}, files)
    assert 1000 < near.newest_bytes() < 1100  # with the small file of the state


@pytest.mark.parametrize("step", [1, 2])
def test_a_save_that_fails_leaves_the_one_before_until_the_runs_directory_has_a_newer(
    small_recipe, world, tmp_path, monkeypatch, step
) -> None:
    recipe = small_recipe(f"run.dir={tmp_path / 'run'}", "data.workers=0", "checkpoint.asynchronous=false")
    near = NearStore(tmp_path, tmp_path / "run", "id")
    near.open()
    with make_trainer(recipe, world) as trainer:
        checkpoints = trainer.checkpoints
        checkpoints.near = near
        if step == 2:
            assert checkpoints.save_near(replace(trainer.state, step=1))
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "_lack", lambda self, store: "no room")
            assert not checkpoints.save_near(replace(trainer.state, step=step))
        assert near.names() == [f"step-{kept:08d}" for kept in range(1, step)]
        assert not checkpoints.saves_near(replace(trainer.state, step=3))
        assert checkpoints.save(replace(trainer.state, step=4))
    assert not near.root.exists()


def test_a_start_does_without_a_disk_that_is_broken(small_recipe, world, tmp_path, monkeypatch, capsys) -> None:
    recipe = small_recipe(f"run.dir={tmp_path / 'run'}", "data.workers=0", f"checkpoint.local={tmp_path / 'near'}")
    reporter = Reporter(PlainDisplay(), None)
    with make_trainer(recipe, world, reporter) as trainer:
        directory = trainer.directory
        directory.renew_local_start()

        def broken(store: NearStore) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(store.root))

        monkeypatch.setattr(NearStore, "open", broken)
        open_near(recipe, directory, world, reporter)
        assert directory.near is None
        assert directory.local_start() == ""  # what other nodes have is not to come back at a later start
    said = capsys.readouterr()
    assert "Input/output error; this start saves no local checkpoints" in said.out + said.err


@pytest.mark.parametrize("comes_between", ["nothing", "a start elsewhere", "a start without checkpoint.local"])
def test_what_a_node_has_of_an_earlier_start_than_the_last_does_not_count(
    small_recipe, world, tmp_path, comes_between
) -> None:
    recipe = small_recipe(f"run.dir={tmp_path / 'run'}", "data.workers=0", f"checkpoint.local={tmp_path / 'near'}")
    reporter = Reporter(PlainDisplay(), None)
    with make_trainer(recipe, world, reporter) as trainer:
        directory = trainer.directory
        directory.begin(recipe)
        open_near(recipe, directory, world, reporter)
        trainer.checkpoints.near = near = directory.near
        assert near is not None
        state = replace(trainer.state, step=9, samples=9 * recipe.train.global_batch)
        assert trainer.checkpoints.save_near(state)
        assert trainer.checkpoints.finish()
    if comes_between == "a start elsewhere":
        directory.renew_local_start()
    elif comes_between == "a start without checkpoint.local":
        directory.local_start_file.unlink()
    open_near(recipe, directory, world, reporter)
    assert directory.store.names() == (["step-00000009"] if comes_between == "nothing" else [])
    assert near.names() == []


def test_another_run_in_the_same_directory_finds_nothing(tmp_path: Path) -> None:
    for name in ("one", "one", "another"):
        near = NearStore(tmp_path, tmp_path / "run", name)
        near.open()
        (near.root / f"step-{len(near.names()):08d}").mkdir()
    assert len(near.names()) == 1

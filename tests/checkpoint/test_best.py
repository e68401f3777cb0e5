"""`best` names the checkpoint that the state says is the best, also after a kill between two pointers."""

import shutil

import pytest

from karat_scale.training.tasks.classification.task import TrainState
from tests.training.harm import POINTERS, point


class Killed(BaseException):
    """In place of a kill."""


def state(step: int, top1: float, best_step: int, best_top1: float) -> TrainState:
    scores = {"last_top1": top1, "last_top5": top1, "best_top1": best_top1, "best_top5": best_top1}
    return TrainState(step=step, samples=8 * step, evaluated_step=step, best_step=best_step, **scores)


@pytest.mark.parametrize("killed_at", ["best", "latest"])
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_kill_before_a_pointer_moves_loses_no_best(
    small_recipe, make_checkpoints, tmp_path, monkeypatch, killed_at, earlier
) -> None:
    first, second = (make_checkpoints(small_recipe(), tmp_path / "c") for _ in range(2))
    if earlier:
        first.save(state(1, 40.0, 1, 40.0), is_best=True)
    point = first.store.point

    def killed(pointer: str, name: str) -> None:
        if pointer == killed_at:
            raise Killed
        point(pointer, name)

    monkeypatch.setattr(first.store, "point", killed)
    with pytest.raises(Killed):
        first.save(state(2, 50.0, 2, 50.0), is_best=True)
    resumed = second.load()
    assert resumed.step == (1 if earlier else 2)  # where `latest` is, or the newest one where nothing is
    best = second.store.pointed("best")
    assert best == ("step-00000001" if earlier and killed_at == "best" else "step-00000002")
    assert second.store.find_intact("best") == best


def test_a_reader_finds_the_best_of_a_run_that_was_killed_before_the_pointer(
    small_recipe, make_checkpoints, tmp_path
) -> None:
    checkpoints = make_checkpoints(small_recipe(), tmp_path / "c")
    checkpoints.save(state(1, 50.0, 1, 50.0))
    checkpoints.save(state(2, 40.0, 1, 50.0))
    assert checkpoints.store.pointed("best") is None
    assert checkpoints.store.find_intact("best") == "step-00000001"


@pytest.mark.parametrize("is_one_kept", [True, False])
def test_a_best_that_is_gone_is_said_and_another_takes_its_place(
    small_recipe, make_checkpoints, tmp_path, capsys, is_one_kept
) -> None:
    first, second = (make_checkpoints(small_recipe(), tmp_path / "c") for _ in range(2))
    first.save(state(1, 40.0, 1, 40.0), is_best=is_one_kept)
    first.save(state(2, 50.0, 2, 50.0))
    first.save(state(3, 45.0, 2, 50.0))
    shutil.rmtree(tmp_path / "c" / "step-00000002")
    resumed = second.load()
    assert resumed.step == 3
    assert "the best checkpoint, step-00000002, is gone; the " in capsys.readouterr().out
    kept = (1, 40.0, 40.0) if is_one_kept else (None, None, None)
    assert (resumed.best_step, resumed.best_top1, resumed.best_top5) == kept
    assert resumed.last_top1 == 45.0


@pytest.mark.parametrize("harm", [*POINTERS, "link", "directory"])
def test_a_latest_that_names_nothing_is_repaired_by_the_next_start(
    small_recipe, make_checkpoints, tmp_path, capsys, harm
) -> None:
    first, second = (make_checkpoints(small_recipe(), tmp_path / "c") for _ in range(2))
    first.save(state(1, 40.0, 1, 40.0), is_best=True)
    latest = tmp_path / "c" / "latest"
    if harm in POINTERS:
        point(latest, POINTERS[harm])
    else:
        latest.unlink()
        latest.symlink_to("gone") if harm == "link" else latest.mkdir()
    assert second.load().step == 1
    said = capsys.readouterr().out
    if harm == "directory":
        assert f"warning: {latest} cannot be repaired: Is a directory" in said
    else:
        assert "warning: latest names step-00000001 again" in said
        assert second.store.find_intact("latest") == "step-00000001"


def test_of_equal_scores_the_first_is_the_best() -> None:
    run = TrainState(step=1)
    assert run.record({"top1": 50.0, "top5": 60.0})
    run.step = 2
    assert not run.record({"top1": 50.0, "top5": 70.0})
    assert (run.best_step, run.best_top5) == (1, 60.0)

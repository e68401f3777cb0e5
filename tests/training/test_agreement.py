"""Tests that all ranks decide alike when one of them fails, meets a step that is not finite, or gets a signal."""

import json
from typing import Any

import pytest

from tests.conftest import ROOT, rank_environments
from tests.training.agreement import CONFIGS, LOOKS
from tests.training.harm import POINTERS
from tests.warm import run_program

pytestmark = pytest.mark.slow(together=True)  # one launch of two ranks serves all


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Any]:
    """Return the outcomes of all looks by name, from one launch of two ranks."""
    scratch = tmp_path_factory.mktemp("agreement")
    done = run_program("tests.training.agreement", [str(scratch)], rank_environments(2), timeout=600, directory=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((scratch / "outcomes.json").read_text())
    assert found.keys() == LOOKS.keys()
    return found


@pytest.mark.multiprocess
def test_damage_is_named_and_both_ranks_take_the_checkpoint_before(outcomes) -> None:
    damage = dict(outcomes["damage"])
    code = damage.pop("code")
    assert "rank-00001.pt: holds more than tensors and plain data; it is not read" in code["said"]
    assert code["steps"] == [2, 2]
    pointers = {name: damage.pop(name)["steps"] for name in [f"latest {what}" for what in POINTERS]}
    assert pointers == {name: [2, 2] for name in pointers}
    assert len(damage) == 7  # files
    for name, outcome in damage.items():
        assert outcome["steps"] == [1, 1], name
        assert f"step-00000002 cannot be used: {name.split()[0]}" in outcome["said"]


@pytest.mark.multiprocess
def test_a_save_that_one_rank_cannot_write_is_void_on_all(outcomes) -> None:
    assert len(outcomes["failing_rank"]) == 2 * 4  # stages, ways of saving and the save after them
    for name, outcome in outcomes["failing_rank"].items():
        assert outcome["good"], name
        if not name.endswith("after"):
            assert outcome["voided"] == [True, True], name
            assert outcome["names"] == ["step-00000001"]
            said = f"step-{outcome['step']:08d} not saved: File too large; the last good one is step-00000001"
            assert said in outcome["said"]


@pytest.mark.multiprocess
def test_a_step_that_is_not_finite_on_one_rank_changes_no_rank(outcomes) -> None:
    found = outcomes["nonfinite_rank"]
    assert len(found) == 7 * 2 * 4
    assert {name: ranks for name, ranks in found.items() if ranks != [[True, True, True]] * 2} == {}


@pytest.mark.multiprocess
def test_snapshots_of_every_stage_are_the_weights_of_the_checkpoint(outcomes) -> None:
    assert outcomes["snapshots"] == dict.fromkeys(CONFIGS, True)


@pytest.mark.multiprocess
def test_ranks_ask_each_other_once_a_second_and_stop_at_the_same_step(outcomes) -> None:
    found = outcomes["stops"]
    for first, second in found.values():
        assert first == second
        assert first["saves"][:2] == [70, 140]
    fast, middle, slow, slower = (found[name][0] for name in ("0.01", "0.3", "5", "slower"))
    assert 150 <= fast["step"] <= 150 + 100
    assert fast["asked"] <= 2.5 + 8  # 2.5 s of steps, and one for each doubling of the distance
    assert 150 <= middle["step"] <= 150 + 3
    assert middle["asked"] <= 150 / 3 + 3
    assert slow["step"] == slow["asked"] == 150
    # The distance that was agreed at the fast pace holds until the next agreement; then each step has one.
    assert slower["step"] == 150
    assert slower["asked"] <= 50

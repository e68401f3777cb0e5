"""The queue of the experiment: a process waits for trials that others run, and takes those of the next stage."""

import fcntl
from pathlib import Path

import pytest

from benchmarks import attention_experiment, attention_trials
from benchmarks.attention_trials import Trial


def test_a_process_waits_for_the_trials_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_trials, "RECORDS", tmp_path)
    theirs, ours = Trial("rate", "softmax", "5e-4", 99), Trial("compare", "softmax", "5e-4", 0)
    finished, looks = [], 0

    def next_trials() -> list[Trial] | None:
        return next(([trial] for trial in (theirs, ours) if not trial.record.exists()), None)

    def finish(trial: Trial, data: Path, directory: Path) -> None:
        finished.append(trial)
        trial.record.write_text("{}")

    def other_process_ends(seconds: float) -> None:
        nonlocal looks
        looks += 1
        theirs.record.write_text("{}")

    monkeypatch.setattr(attention_experiment, "next_trials", next_trials)
    monkeypatch.setattr(attention_experiment, "finish", finish)
    monkeypatch.setattr("os.nice", lambda _: 19)
    monkeypatch.setattr("time.sleep", other_process_ends)
    with (tmp_path / f"{theirs.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        attention_experiment.run(tmp_path, tmp_path)
    assert (finished, looks) == ([ours], 1)

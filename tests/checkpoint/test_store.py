import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from karat_scale.checkpoint.restore import choose_checkpoint
from karat_scale.checkpoint.store import MANIFEST, STATE, CheckpointStore, alone, checkpoint_name, holding
from karat_scale.data.plan import TrainPlan
from karat_scale.engine.heartbeat import Heartbeat, read_signs
from karat_scale.engine.reporting.progress import PlainDisplay, Reporter
from karat_scale.foundation.errors import RunDirectoryError, of_the_machine
from karat_scale.foundation.files import Fingerprint, read_text
from karat_scale.training.outcome import Incidents
from karat_scale.training.run_directory import RunDirectory
from tests.conftest import ROOT, forked
from tests.training.harm import HARMS


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def save(store: CheckpointStore, step: int) -> str:
    directory = store.begin(step)
    weights = bytes(range(256)) * 10
    (directory / "weights.pt").write_bytes(weights)
    written = Fingerprint(len(weights), hashlib.sha256(weights).hexdigest())
    return store.commit(directory, {"step": step}, {"weights.pt": written})


def test_a_checkpoint_that_is_not_the_newest_is_told_as_such(store) -> None:
    first, second, newest = (save(store, step) for step in (2, 4, 6))
    store.point("best", first)
    said = [store.beside(name) for name in (first, second, newest)]
    assert said == [f", the best one (the newest is {newest})", f", an earlier one (the newest is {newest})", ""]


def test_a_checkpoint_is_chosen_by_its_name_and_not_by_a_path(store) -> None:
    name = save(store, 1)
    assert store.find_intact(name) == name
    for path in (f"{name}/", f"../checkpoints/{name}", str(store.root.absolute() / name)):
        with pytest.raises(RunDirectoryError, match=f"--checkpoint {path}: .*; name one of best, latest, {name}$"):
            store.find_intact(path)


def test_a_committed_checkpoint_is_complete_and_latest(store) -> None:
    name = save(store, 1200)
    assert name == checkpoint_name(1200) == "step-00001200"
    assert store.names() == [name]
    assert store.pointed("latest") == name
    seen: list[tuple[int, int]] = []
    assert store.damage(name, lambda done, total: seen.append((done, total))) is None
    assert seen[-1][0] == seen[-1][1] == store.newest_bytes()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert store.state(name) == {"step": 1200}
    files = json.loads((store.root / name / MANIFEST).read_text())["files"]
    assert set(files) == {"weights.pt", STATE}


def test_a_rank_gets_on_while_it_verifies(store, tmp_path) -> None:
    name, heartbeat = save(store, 3), Heartbeat(tmp_path, 0)
    found = choose_checkpoint(store, "", Reporter(PlainDisplay(), None, 0, heartbeat))
    heartbeat.start().stop()
    assert found == (store.root, name)
    assert [(sign.beats, sign.moves) for sign in read_signs(tmp_path)] == [(1, 4)]  # each file, its end, and the start


def test_a_newest_state_that_is_damaged_names_no_best(store) -> None:
    assert store.best_by_state() is None
    file = store.root / save(store, 2) / STATE
    for text, best in (
        ('{"best_step": 1}', "step-00000001"),
        *((text, None) for text in ("", "[]", "{}", '{"best_step": null}', '{"best_step": "1"}')),
    ):
        file.write_text(text)
        assert store.best_by_state() == best
    file.unlink()
    assert store.best_by_state() is None


def test_an_unfinished_save_is_no_checkpoint_and_goes_with_the_next(store) -> None:
    save(store, 1)
    torn = store.begin(2)
    (torn / "weights.pt").write_bytes(b"half")
    assert store.names() == ["step-00000001"]
    assert store.pointed("latest") == "step-00000001"
    save(store, 3)
    assert not torn.exists()


def test_a_checkpoint_about_to_be_replaced_is_put_back_after_a_kill(store, monkeypatch) -> None:
    name = save(store, 1)
    rename = Path.rename

    def cut(path: Path, target: Path) -> Path:
        if target == store.root / name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        save(store, 1)
    monkeypatch.undo()
    assert store.names() == []
    store.put_back()
    assert store.names() == [name]
    assert store.pointed("latest") == name
    assert store.damage(name) is None
    (store.root / name / "weights.pt").write_bytes(b"damaged")
    save(store, 1)
    assert store.damage(name) is None
    assert [path.name for path in store.root.iterdir() if path.is_dir()] == [name]


@pytest.mark.parametrize("victim", ["weights.pt", STATE, MANIFEST])
def test_every_kind_of_damage_is_named(store, victim) -> None:
    for harm in HARMS.values():
        name = save(store, 1)
        harm(store.root / name / victim)
        damage = store.damage(name) or ""
        assert victim in damage or (victim == MANIFEST and damage), harm  # a bit flipped in a hash blames another file
    if victim != "weights.pt":
        (store.root / name / victim).unlink(missing_ok=True)
        (store.root / name / victim).symlink_to("/dev/zero")  # a file without end
        assert store.damage(name) is not None


def test_no_bit_of_a_checkpoint_flips_unnoticed(store) -> None:
    name = save(store, 1)
    for path in (store.root / name).iterdir():
        whole = path.read_bytes()
        every = range(0, 8 * len(whole), 7)  # one bit in each byte, each of the eight in turn
        for bit in every if path.name != "weights.pt" else (0, 5 * len(whole), 8 * len(whole) - 1):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            assert store.damage(name) is not None, (path.name, bit)
        path.write_bytes(whole)
    assert store.damage(name) is None


def test_a_file_that_is_not_as_its_writer_says_is_not_committed(store) -> None:
    directory = store.begin(1)
    (directory / "weights.pt").write_bytes(b"short")
    with pytest.raises(OSError, match=r"weights\.pt has 5 bytes, but 6 were written"):
        store.commit(directory, {}, {"weights.pt": Fingerprint(6, "")})
    assert store.names() == []


@pytest.mark.parametrize(("number", "is_damage"), [(errno.ESTALE, False), (errno.EACCES, False), (errno.EIO, True)])
@pytest.mark.parametrize("what", ["file_sha256", "read_text"])
def test_what_cannot_be_read_now_is_no_damage(store, monkeypatch, number, is_damage, what) -> None:
    name = save(store, 1)

    def fail(path: Path, *_: object) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(f"karat_scale.checkpoint.store.{what}", fail)
    if is_damage:
        assert "cannot be read: Input/output error" in (store.damage(name) or "")
        return
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        store.damage(name)
    assert of_the_machine(caught.value)[1] == (1 if number == errno.ESTALE else 2)  # a job may try again


def test_a_missing_or_broken_manifest_is_damage(store) -> None:
    name = save(store, 1)
    manifest = store.root / name / MANIFEST
    sizes = ('"2"', "null", "[1]", "true")
    of_another_type = [re.sub(r'"bytes": \d+', f'"bytes": {n}', manifest.read_text(), count=1) for n in sizes]
    for content in ("", "{", "[]", '{"files": 3}', *of_another_type):
        manifest.write_text(content)
        assert store.damage(name) == f"{MANIFEST} is not readable", content
    manifest.unlink()
    assert store.damage(name) == f"{MANIFEST} is missing"


def test_retention_keeps_the_newest_and_the_best_and_a_users_copy(store) -> None:
    for step in range(1, 6):
        save(store, step)
        if step == 2:
            store.point("best", checkpoint_name(2))
    copy = store.root / f"{checkpoint_name(9)}.bak"
    copy.mkdir()
    assert store.newest_step() == 5
    store.retain(keep_last=2)
    assert store.names() == [checkpoint_name(step) for step in (5, 4, 2)]
    assert copy.is_dir()


def test_what_was_just_read_whole_is_not_read_again(store, monkeypatch) -> None:
    for step in (1, 2, 3):
        save(store, step)
    (store.root / checkpoint_name(3) / "weights.pt").write_bytes(b"")
    assert store.newest_intact() == store.verified == checkpoint_name(2)
    asked = []
    monkeypatch.setattr(store, "damage", lambda name, *_: asked.append(name) or "damaged")
    assert store.newest_intact() == checkpoint_name(2)
    assert asked == [checkpoint_name(3)]


def test_retention_counts_none_that_a_resume_passed_over(store) -> None:
    for step in range(1, 6):
        save(store, step)
    store.passed_over = {checkpoint_name(5), checkpoint_name(3)}
    store.point("latest", checkpoint_name(4))
    store.retain(keep_last=2)
    assert store.names() == [checkpoint_name(step) for step in (5, 4, 3, 2)]
    save(store, 5)  # in its place
    store.retain(keep_last=2)
    assert store.names() == [checkpoint_name(step) for step in (5, 4)]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_line_and_stays(store, tmp_path) -> None:
    for step in range(1, 4):
        save(store, step)
    elsewhere = tmp_path / "another disk"
    (store.root / checkpoint_name(1)).rename(elsewhere)
    (store.root / checkpoint_name(1)).symlink_to(elsewhere, target_is_directory=True)
    (problem,) = store.retain(keep_last=1)
    assert problem.startswith(f"old checkpoint {checkpoint_name(1)} cannot be removed: ")
    assert store.names() == [checkpoint_name(3), checkpoint_name(1)]
    assert store.retain(keep_last=1) == [problem]


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EIO])
@pytest.mark.parametrize("file", ["best", "pinned"])
def test_nothing_is_removed_while_it_is_not_known_what_to_keep(store, monkeypatch, file, number) -> None:
    names = [save(store, step) for step in range(1, 5)]
    store.point("best", names[0])
    store.pin(names[1])
    read = read_text

    def fail(path: Path, *most: int) -> str:
        if path.name == file:
            raise OSError(number, os.strerror(number))
        return read(path, *most)

    with monkeypatch.context() as patch:
        patch.setattr("karat_scale.checkpoint.store.read_text", fail)
        (problem,) = store.retain(keep_last=1)
        assert problem.startswith(f"no old checkpoint is removed: {store.root / file} cannot be read: ")
        assert store.names() == names[::-1]
        if file == "pinned":
            with pytest.raises(OSError, match=os.strerror(number)):
                store.pin(names[2])
    assert store.retain(keep_last=1) == []
    assert store.names() == [names[3], names[1], names[0]]


def test_a_listing_that_fails_is_not_taken_for_an_empty_directory(tmp_path, unlisted) -> None:
    assert CheckpointStore(tmp_path / "none").names() == []
    directory = RunDirectory(tmp_path / "run")
    store = directory.store
    name = save(store, 1)
    with unlisted(store.root), pytest.raises(PermissionError) as caught:
        directory.claim()
    assert of_the_machine(caught.value) == (f"{store.root}: Permission denied", 2)
    with unlisted(store.root):
        (problem,) = store.retain(keep_last=1)
        assert problem.startswith(f"no old checkpoint is removed: {store.root} cannot be read: Permission denied; ")
        assert store.beside("step-00000000") == ""
        incidents = Incidents(tmp_path / "incidents", store, TrainPlan(0, 64, 8, 8, 0, 1), replays=True)
        assert incidents.note(2, "not finite") == f"{store.root} cannot be read: Permission denied"
    assert store.names() == [name]


def test_what_was_held_goes_although_a_process_was_forked_meanwhile(store) -> None:
    old, new = save(store, 1), save(store, 2)
    ends, end = os.pipe()
    with holding(store.root / old) as is_there:
        assert is_there
        store.retain(keep_last=1)
        assert store.names() == [new, old]
        child = forked(lambda: (os.close(end), os.read(ends, 1)))  # as a data worker
    store.retain(keep_last=1)
    assert store.names() == [new]
    os.close(end)
    os.waitpid(child, 0)
    with holding(store.root / old) as is_there:
        assert not is_there


def test_retention_leaves_what_somebody_reads(store) -> None:
    first = save(store, 1)
    reader = CheckpointStore(store.root)
    assert reader.find_intact("latest") == first
    for step in (2, 3):
        save(store, step)
    assert store.retain(keep_last=1) == []
    assert store.names() == [checkpoint_name(3), first]
    del reader
    assert store.retain(keep_last=1) == []
    assert store.names() == [checkpoint_name(3)]
    assert not list(store.root.glob(".saving-*"))


@pytest.mark.usefixtures("locks_of_nfs")
def test_on_nfs_too_retention_leaves_what_somebody_reads(store) -> None:
    test_retention_leaves_what_somebody_reads(store)


READER = """
import sys
from pathlib import Path
from karat_scale.checkpoint.store import CheckpointStore
root, count = Path(sys.argv[1]), 0
while not (root / "stop").exists():
    store = CheckpointStore(root)
    name = store.find_intact("latest")
    assert len((root / name / "weights.pt").read_bytes()) == 2560
    assert store.state(name)["step"] == int(name.removeprefix("step-"))
    count += 1
    if count == 1:
        print("ready", flush=True)
print(count)
"""


def test_a_reader_never_loses_its_checkpoint_to_a_run_that_saves(store) -> None:
    save(store, 0)
    command = [sys.executable, "-c", READER, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for step in range(1, 60):
            save(store, step)
            store.retain(keep_last=1)
        (store.root / "stop").touch()
        out, error = reader.communicate(timeout=60)
    assert reader.returncode == 0, error
    assert int(out) > 0


def test_a_pointer_that_moves_while_it_is_read_is_read_again(store, monkeypatch) -> None:
    save(store, 1)
    names = store.names

    def names_after_a_save() -> list[str]:
        monkeypatch.undo()
        save(store, 2)
        store.retain(keep_last=1)
        return names()

    monkeypatch.setattr(store, "names", names_after_a_save)
    assert store.pointed("latest") == checkpoint_name(2)
    store.point("latest", checkpoint_name(7))
    assert store.pointed("latest") is None


def test_a_pipe_in_place_of_a_manifest_is_damage_and_keeps_nobody_waiting(tmp_path) -> None:
    store = CheckpointStore(tmp_path)
    checkpoint = tmp_path / "step-00000002"
    checkpoint.mkdir()
    os.mkfifo(checkpoint / "manifest.json")
    with holding(checkpoint) as is_there:
        assert not is_there
    with pytest.raises(RunDirectoryError):
        store.find_intact("step-00000002")
    with pytest.raises(OSError, match="not a regular file"), alone(checkpoint):
        pass

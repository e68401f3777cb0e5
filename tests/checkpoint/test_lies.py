"""A checkpoint with wrong content but matching hashes counts as damaged: one line names it, and it is not used."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from karat_scale.checkpoint.records import StateRecord, validated
from karat_scale.checkpoint.restore import falsehood
from karat_scale.checkpoint.store import MANIFEST, STATE, CheckpointStore
from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.training.tasks.classification.task import TrainState
from tests.checkpoint.lies import LOST, rehash, tell
from tests.small_engines import train_steps

NAME = "step-00000002"
MODEL, RANK, PART = "mp_rank_00_model_states.pt", "rank-00000.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
_made: dict[str, Path] = {}


@pytest.fixture
def checkpoint(request, small_recipe, make_checkpoints, tmp_path_factory, tmp_path) -> Path:
    """Return a copy of a real checkpoint of the stage that the test names."""
    config = getattr(request, "param", "zero1")
    if config not in _made:
        _made[config] = tmp_path_factory.mktemp(config)
        saved = make_checkpoints(small_recipe(f"deepspeed.config={config}"), _made[config])
        train_steps(saved, 1, 2)
        assert saved.save(TrainState(step=2, samples=16))
        assert CheckpointStore(_made[config], falsehood).damage(NAME) is None
    shutil.copytree(_made[config] / NAME, tmp_path / "c" / NAME)
    return tmp_path / "c" / NAME


def test_what_is_wrong_in_a_state_is_said_in_our_words() -> None:
    with pytest.raises(ValueError, match=r"^step: should be a whole number, such as 12$"):
        TrainState.from_json({"step": "two"})
    with pytest.raises(RunDirectoryError, match=r"^state.json: format: is missing$"):
        validated(STATE, lambda: StateRecord.model_validate_json("{}"))


@pytest.mark.parametrize("config", ["zero1", "zero2"])
def test_the_padding_of_a_part_is_not_taken_for_damage(small_recipe, make_checkpoints, tmp_path, config) -> None:
    """Padding is no damage: for an odd number of biases, DeepSpeed pads the optimizer's states, but not the weights."""
    saved = make_checkpoints(small_recipe(f"deepspeed.config={config}", "model.num_classes=5"), tmp_path)
    train_steps(saved, 1, 2)
    assert saved.save(TrainState(step=2, samples=16))
    part = load_tensors(next((tmp_path / NAME).glob(f"*{PART}")))["optimizer_state_dict"]
    weights, states = part["single_partition_of_fp32_groups"], part["base_optimizer_state"]["state"]
    assert any(len(states[number]["exp_avg"]) > len(weight) for number, weight in enumerate(weights))
    assert falsehood(tmp_path / NAME) is None
    assert saved.load() == TrainState(step=2, samples=16, restarts=1)


LIES: list[tuple[str, str, Any]] = [
    *[(STATE, key, LOST) for key in ("format", "step", "samples", "world_size", "zero_stage", "has_ema")],
    *[(STATE, key, value) for key in ("step", "samples") for value in ("two", None, -1, 2.5, True, [2], 10**40)],
    (STATE, "step", 3),
    (STATE, "samples", 15),
    (STATE, "format", 3),
    (STATE, "format", "2"),
    *[(STATE, "world_size", value) for value in (0, -1, 2, 10**18, "1", None)],
    *[(STATE, "zero_stage", value) for value in (0, 2, 3, 4, -1, "1", None)],
    *[(STATE, "has_ema", value) for value in (False, "yes", 1)],
    *[(STATE, "teacher", value) for value in (3, ["x"])],
    *[(STATE, "kind", value) for value in (3, None)],
    *[(RANK, key, LOST) for key in ("rng", "shapes", "layout")],
    *[(RANK, "rng", value) for value in (None, 3, torch.zeros(5056), torch.zeros(16, dtype=torch.uint8))],
    (RANK, "rng", torch.full((5056,), 255, dtype=torch.uint8)),
    *[(RANK, "cuda_rng", value) for value in (3, torch.zeros(16), torch.zeros(3, dtype=torch.uint8))],
    *[(RANK, "shapes", value) for value in (None, 3, {}, {"a": 3}, {1: (2,)})],
    *[(RANK, "shapes.cls_token", value) for value in (LOST, (1, 1, 31), (-1, 1, -32), ("1", 1, 32), None)],
    *[(RANK, "layout", value) for value in (None, 3, [], [[]], [[], []], [[("cls_token", 0, 0)], []])],
    *[
        (RANK, "layout.0.0", ("patch_embed.proj.weight", *place))
        for place in ((0, 0, 1535), (1, 0, 1536), (0, 1, 1536))
    ],
    *[(RANK, "layout.0.0", ("patch_embed.proj.weight", *place)) for place in ((-1, 0, 1536), (0, 2**62, 1536))],
    (RANK, "layout.0.0", ("nothing", 0, 0, 1536)),
    (RANK, "layout.0", lambda fragments: fragments[:-1]),
    (RANK, "layout.0", lambda fragments: [*fragments, fragments[0]]),
    *[(RANK, "ema", value) for value in (None, [], 3, [3, 4], [torch.zeros(3), torch.zeros(2868)])],
    (RANK, "ema.0", lambda average: average.int()),
    (RANK, "ema.0", lambda average: average.to_sparse()),
    (RANK, "frozen", {"cls_token": 3}),
    *[(MODEL, key, LOST) for key in ("module", "global_steps", "global_samples", "skipped_steps")],
    *[(MODEL, "module", value) for value in (None, {}, {"a": 3}, {1: torch.zeros(1)})],
    (MODEL, "module.cls_token", torch.zeros(1, 1, 31)),
    (MODEL, "module.cls_token", torch.zeros(1, 1, 32, device="meta")),
    *[(MODEL, "global_steps", value) for value in (-1, "2", None, 2.5)],
    (PART, "optimizer_state_dict", LOST),
    (PART, "optimizer_state_dict", 3),
    *[
        (PART, f"optimizer_state_dict.{key}", LOST)
        for key in ("base_optimizer_state", "single_partition_of_fp32_groups")
    ],
    (PART, "optimizer_state_dict.zero_stage", 2),
    (PART, "optimizer_state_dict.single_partition_of_fp32_groups.0", lambda group: group[:-1]),
    (PART, "optimizer_state_dict.single_partition_of_fp32_groups.0", lambda group: group.long()),
    (PART, "optimizer_state_dict.single_partition_of_fp32_groups", lambda groups: groups[:1]),
    *[(PART, "optimizer_state_dict.base_optimizer_state.state", value) for value in (LOST, 3, {"a": {}}, {0: 3})],
    (PART, "optimizer_state_dict.base_optimizer_state.state.0.exp_avg", torch.zeros(3)),
    (PART, "optimizer_state_dict.base_optimizer_state.state.0.exp_avg", "zeros"),
    *[
        (PART, "optimizer_state_dict.base_optimizer_state.state.0.step", value)
        for value in ("2", None, float("nan"), -1.0, torch.zeros(2), torch.tensor(float("inf")))
    ],
]


def _id(lie: tuple[str, str, Any]) -> str:
    file, place, value = lie
    text = "lost" if value is LOST else "changed" if callable(value) else str(value).replace("\n", "")[:24]
    return f"{file}:{place}={text}"


@pytest.mark.parametrize(("file", "place", "value"), LIES, ids=[f"{n}-{_id(lie)}" for n, lie in enumerate(LIES)])
def test_a_lie_is_found_and_told_in_one_line(checkpoint, file, place, value) -> None:
    tell(checkpoint, file, place, value)
    assert CheckpointStore(checkpoint.parent).damage(NAME) is None  # by its hashes
    found = CheckpointStore(checkpoint.parent, falsehood).damage(NAME)
    assert found
    assert "\n" not in found
    assert len(found) < 600


@pytest.mark.parametrize(
    ("checkpoint", "file", "place", "value"),
    [
        ("zero0", MODEL, "optimizer", None),
        ("zero0", MODEL, "optimizer.state", LOST),
        ("zero0", MODEL, "optimizer.state.0.exp_avg", torch.zeros(3)),
        ("zero0", MODEL, "module.cls_token", LOST),
        ("zero0", RANK, "layout.0", []),
        ("zero0", RANK, "layout.0.0", ("nothing", 0, 0, 1536)),
        ("zero0", STATE, "zero_stage", 1),
        ("zero3", f"zero_pp_rank_0_{MODEL}", "param_shapes", None),
        ("zero3", RANK, "shapes.cls_token", (32, 1, 1)),
        ("zero3", PART, "optimizer_state_dict.fp32_flat_groups", LOST),
        ("zero3", PART, "optimizer_state_dict.optimizer_state_dict", LOST),
        ("zero3", STATE, "zero_stage", 2),
    ],
    indirect=["checkpoint"],
)
def test_a_lie_is_found_at_other_stages(checkpoint, file, place, value) -> None:
    tell(checkpoint, file, place, value)
    assert falsehood(checkpoint)


class _Tripwire:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("tripped"),))


def _beyond_its_storage(path: Path) -> None:
    """Write a file of torch in which a tensor has more elements than its storage."""
    torch.save({"rng": torch.arange(7.0)}, path)
    archive = path.read_bytes()
    assert archive.count(b"K\x07\x85") == 1  # the pickled shape (7,)
    path.write_bytes(archive.replace(b"K\x07\x85", b"K\x70\x85"))


FILES: dict[str, Callable[[Path], Any]] = {
    "a legacy pickle": lambda path: torch.save(load_tensors(path), path, _use_new_zipfile_serialization=False),
    "a plain pickle": lambda path: path.write_bytes(pickle.dumps({"rng": 3})),
    "a TorchScript program": lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(str(path)),
    "another archive": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "code": lambda path: torch.save({"rng": _Tripwire()}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor beyond its storage": _beyond_its_storage,
    "a text": lambda path: path.write_text("rng"),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("file", [RANK, MODEL, PART])
@pytest.mark.parametrize("what", FILES)
def test_a_file_of_another_kind_is_found(checkpoint, what, file, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    FILES[what](checkpoint / file)
    rehash(checkpoint)
    found = CheckpointStore(checkpoint.parent, falsehood).damage(NAME)
    assert found
    assert file in found
    assert "\n" not in found
    assert not (tmp_path / "tripped").exists()


def test_a_state_that_is_no_state_and_a_manifest_that_names_a_file_elsewhere_are_found(checkpoint) -> None:
    whole = (checkpoint / STATE).read_text()
    for text in ("[" * 100_000, '{"format": ' * 50_000, "", "null", "[]", '"x"', "{", "\x00", '{"format": 2'):
        (checkpoint / STATE).write_text(text)
        rehash(checkpoint)
        assert STATE in (CheckpointStore(checkpoint.parent, falsehood).damage(NAME) or ""), text[:20]
    (checkpoint / STATE).write_text(whole)
    rehash(checkpoint)
    assert falsehood(checkpoint) is None
    (checkpoint.parent / "outside").touch()
    manifest = checkpoint / MANIFEST
    manifest.write_text(manifest.read_text().replace(RANK, "../outside"))
    assert MANIFEST in (CheckpointStore(checkpoint.parent, falsehood).damage(NAME) or "")


OF_THE_RUN = [
    (STATE, "samples", 32),  # of another global batch
    (STATE, "kind", "detection"),
    (STATE, "best_top1", "high"),
    (STATE, "best_top1", float("nan")),
    (STATE, "data_digest", None),
    (STATE, "begun_with", {"name": 3}),
    *[(STATE, "stream", value) for value in (3, {"shards": 1}, {"shards": 0, "lanes": [[0, 0]]})],
    *[(STATE, "stream", {"shards": 1, "lanes": value}) for value in ([], [[0]], [[0, -1]], [[2**41, 0]])],
    (RANK, "rng", torch.zeros(3)),
]


def test_a_run_goes_on_from_the_one_before(small_recipe, make_checkpoints, tmp_path, capsys) -> None:
    recipe = small_recipe("deepspeed.config=zero1")
    first, second = (make_checkpoints(recipe, tmp_path / "c") for _ in range(2))
    for step in (1, 2):
        first.save(TrainState(step=step, samples=8 * step))
    shutil.copytree(tmp_path / "c" / NAME, tmp_path / "whole")
    for lie in OF_THE_RUN:
        shutil.rmtree(tmp_path / "c" / NAME, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "c" / NAME)
        tell(tmp_path / "c" / NAME, *lie)
        second.store.point("latest", NAME)  # a load that passes it over repairs the pointer
        assert second.load().step == 1, lie
        assert f"checkpoint {NAME} cannot be used: " in "".join(capsys.readouterr()), lie
    tell(tmp_path / "c" / "step-00000001", STATE, "step", "one")
    with pytest.raises(RunDirectoryError, match="has no checkpoint that can be used"):
        second.load()


def test_a_reader_takes_the_newest_that_does_not_lie(small_recipe, make_checkpoints, tmp_path, capsys) -> None:
    checkpoints = make_checkpoints(small_recipe("deepspeed.config=zero1"), tmp_path / "c")
    for step in (1, 2):
        checkpoints.save(TrainState(step=step, samples=8 * step), is_best=step == 2)
    tell(tmp_path / "c" / NAME, RANK, "layout", None)
    store = CheckpointStore(tmp_path / "c", falsehood)
    for wanted in ("best", "latest"):
        assert store.find_intact(wanted) == "step-00000001"
        note = capsys.readouterr().err
        assert note.startswith("note: ")
        assert "step-00000001 is taken instead" in note
        assert note.count("\n") == 1
    with pytest.raises(RunDirectoryError, match=f"{NAME} cannot be used: .*choose another"):
        store.find_intact(NAME)
    tell(tmp_path / "c" / "step-00000001", STATE, "step", "one")
    with pytest.raises(RunDirectoryError, match=f"{NAME} cannot be used: .*choose another"):
        store.find_intact("best")

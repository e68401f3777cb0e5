import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from karat_scale.commands.analyze import trained_run
from karat_scale.commands.analyze.history import described
from karat_scale.commands.analyze.predictions import analyze_accuracy
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun, ValidationImages, open_run
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.batch import Batch
from karat_scale.data.plan import BatchSlice
from karat_scale.foundation.errors import DataError, RunDirectoryError
from karat_scale.recipe import Recipe


def test_checkpoints_and_snapshots_come_in_order_with_their_steps(any_run: TrainedRun) -> None:
    """A step that has both is read from its checkpoint, not from its snapshot."""
    assert [any_run.step(name) for name in any_run.in_order] == [0, 4, 8, 12, 16]
    assert [name.endswith(".safetensors") for name in any_run.in_order] == [True, False, False, False, False]
    assert any_run.chosen in any_run.in_order


def test_raw_and_averaged_weights_differ_and_auto_takes_the_averages(karat_run: TrainedRun) -> None:
    kinds = ("raw", "ema", "auto")
    raw, ema, auto = (karat_run.model(weights=kind).state_dict()["head.weight"] for kind in kinds)
    assert torch.equal(ema, auto)
    assert not torch.equal(ema, raw)
    raw, ema, auto = (TrainedRun(karat_run.path, karat_run.recipe, kind).fingerprint for kind in kinds)
    assert auto == ema != raw


def test_the_model_scores_what_the_run_recorded(any_run: TrainedRun) -> None:
    """The loss over the whole split is that of the run's own last evaluation."""
    name = any_run.in_order[-1]
    images = any_run.images(10**6)
    model = any_run.model(name, weights="ema")
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(x), y, reduction="none")
            for x, y in images.batches(images.raw(5), any_run.device)
        ]
    events = [json.loads(line) for line in (any_run.path / "metrics.jsonl").read_text().splitlines()]
    recorded = [event["loss"] for event in events if event["event"] == "eval"][-1]
    assert torch.cat(losses).mean().item() == pytest.approx(recorded, rel=1e-4)


def test_chosen_images_are_the_same_in_any_batch_size(karat_run: TrainedRun) -> None:
    images = karat_run.images(7)
    assert len(set(images.ids)) == 7
    together = torch.cat([batch.images for batch in images.raw(7)])
    apart = torch.cat([batch.images for batch in images.raw(3)])
    assert torch.equal(together, apart)


class OnAGpu(torch.Tensor):
    """A tensor that stands for one on a GPU. A non-blocking copy to the host could be read too early."""

    def to(self, device: str, non_blocking: bool = False) -> torch.Tensor:  # type: ignore[override]
        assert (device, non_blocking) == ("cpu", False)
        return self.as_subclass(torch.Tensor)


def test_images_that_a_gpu_has_decoded_come_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 3}
    images = ValidationImages(Recipe.model_validate({"data": {"backend": "synthetic"}, "model": sizes}), 3)
    (expected,) = images.raw(3)

    def decoding_on_a_gpu(spec: ImageSpec) -> Backend:
        backend = open_backend(spec)
        batches = backend.eval_batches

        def on_a_gpu(slices: Iterable[BatchSlice]) -> Iterator[Batch]:
            return (replace(batch, images=batch.images.as_subclass(OnAGpu)) for batch in batches(slices))

        monkeypatch.setattr(backend, "eval_batches", on_a_gpu)
        return backend

    monkeypatch.setattr(trained_run, "open_backend", decoding_on_a_gpu)
    (found,) = images.raw(3)
    assert type(found.images) is torch.Tensor
    assert torch.equal(found.images, expected.images)


def test_images_outside_the_split_and_data_of_other_classes_are_refused(own_run: TrainedRun) -> None:
    with pytest.raises(DataError, match="image 1000: the validation split has images 0 to 27"):
        own_run.images(1, (3, 1000))
    file = own_run.path / "classes.json"
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    with pytest.raises(DataError, match="has other classes than the run"):
        own_run.images(3)


def test_analyses_need_no_training_images(own_run: TrainedRun, shards: Path, tmp_path: Path) -> None:
    record = json.loads((shards / "dataset.json").read_text())
    del record["splits"]["train"]
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "dataset.json").write_text(json.dumps(record))
    for file in shards.glob("val-*"):
        (tmp_path / "val" / file.name).symlink_to(file)
    run = open_run(own_run.path, data=str(tmp_path / "val"))
    assert run.images(3).ids == own_run.images(3).ids
    settings = Settings(directory=tmp_path / "out")
    assert analyze_accuracy(run, settings).findings


def test_what_was_frozen_is_frozen(karat_run: TrainedRun) -> None:
    frozen = TrainedRun(karat_run.path, karat_run.recipe.changed(train__freeze=("*.operator.*",)))
    learns = {name: parameter.requires_grad for name, parameter in frozen.new_model().named_parameters()}
    assert not any(learns[name] for name in learns if ".operator." in name)
    assert any(learns.values())


def test_no_run_no_checkpoint_and_a_damaged_one(own_run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        open_run(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"--checkpoint step-9: .*; name one of best, latest, step-00000016"):
        open_run(own_run.path, checkpoint="step-9")
    (own_run.store.root / own_run.in_order[1] / "state.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"cannot be used: state\.json"):
        own_run.model(own_run.in_order[1])


def test_a_snapshot_is_the_raw_weights_of_its_step(own_run: TrainedRun) -> None:
    first, *_, last = own_run.in_order
    snapshot, whole = (own_run.model(name, "raw").state_dict() for name in (f"{last}.safetensors", last))
    assert all(torch.equal(snapshot[key], whole[key]) for key in whole)
    assert own_run.model(first).state_dict()["head.weight"].std() == pytest.approx(0.02, rel=0.5)
    (own_run.directory.snapshots / first).write_bytes(b"torn")
    with pytest.raises(RunDirectoryError, match=f"{first}: not a whole file of karat export"):
        own_run.model(first)


def test_the_matrices_are_named_by_what_made_them(tmp_path: Path) -> None:
    for attention, name, said in (
        ({}, "softmax", "softmax attention"),
        ({"transfer_from": "runs/g3b"}, "S", "attention transferred from runs/g3b"),
        ({"kind": "static", "softmax_heads": 1}, "S", "a learned constant matrix as attention (blockwise, 1 softmax"),
    ):
        run = TrainedRun(tmp_path, Recipe.model_validate({"data": {"backend": "synthetic"}, "attention": attention}))
        assert run.matrix_name == name
        assert described(run)["attention"].startswith(said)

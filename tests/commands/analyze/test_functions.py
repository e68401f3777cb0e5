import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from karat_scale.commands.analyze.functions import analyze_functions
from karat_scale.commands.analyze.result import NothingToShowError, Settings
from karat_scale.commands.analyze.trained_run import TrainedRun


def test_of_a_real_run_whatever_the_batch(karat_run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    once = analyze_functions(karat_run, Settings(images=6, batch=6))
    monkeypatch.setattr("karat_scale.commands.analyze.functions.FIT_BYTES", 1)  # one head a pass
    again = analyze_functions(karat_run, Settings(images=6, batch=4))
    assert set(once.figures) == {"functions_block_0", "functions_block_1", "energy", "distance"}
    assert once.arrays["score_counts"].sum() == 2 * 2 * 6 * 17 * 17
    for left, right in zip(once.numbers["softmax"], again.numbers["softmax"], strict=True):
        assert left == pytest.approx(right, rel=1e-3)
        assert 0 <= left["to_fit"] <= 1


def test_a_softmax_run_has_no_functions(softmax_run: TrainedRun) -> None:
    with pytest.raises(NothingToShowError, match="softmax has no learned functions"):
        analyze_functions(softmax_run, Settings())


def test_weights_are_those_of_the_chosen_checkpoint(karat_run: TrainedRun) -> None:
    first = dataclasses.replace(karat_run, checkpoint=karat_run.in_order[1])
    energies = [analyze_functions(run, Settings(images=1)).arrays["energy_share"] for run in (first, karat_run)]
    assert (energies[0] != energies[1]).any()


def test_images_that_cannot_be_read_are_counted(karat_run: TrainedRun, tmp_path: Path) -> None:
    """The run's images as a folder, one of them damaged."""
    for split in ("train", "val"):
        for label in range(4):
            directory = tmp_path / split / f"class{label}"
            directory.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (20, 20), (40 * label, number, 0)).save(directory / f"{number}.png")
    (tmp_path / "val" / "class1" / "0.png").write_bytes(b"damaged")
    data = karat_run.recipe.data.model_copy(
        update={"backend": "folder", "path": str(tmp_path), "on_bad_sample": "skip"}
    )
    run = dataclasses.replace(karat_run, recipe=karat_run.recipe.model_copy(update={"data": data}))
    result = analyze_functions(run, Settings(images=8, batch=3))
    assert result.notes == ["1 of the chosen images cannot be read and are left out"]
    assert result.arrays["score_counts"].sum() == 2 * 2 * 7 * 17 * 17

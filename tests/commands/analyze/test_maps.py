import numpy as np
import pytest
import torch

from karat_scale.commands.analyze.maps import analyze_maps, dominant_head, region, rollout_step
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.foundation.errors import RunDirectoryError


def test_the_region_is_the_fewest_patches_with_the_share() -> None:
    weights = torch.tensor([0.1, -5.0, 0.5, 0.4])
    assert region(weights, 0.45).tolist() == [False, False, True, False]
    assert region(weights, 0.6).tolist() == [False, False, True, True]
    assert not region(-weights.abs()).any()


def test_the_dominant_head_is_that_of_the_scores() -> None:
    assert dominant_head(torch.tensor([[1.0, 2.0, -9.0], [4.0, -4.0, 0.0]])) == 1


def test_rollout_rows_sum_to_one_even_with_no_positive_weight() -> None:
    rows = rollout_step(-torch.ones(1, 2, 5, 5)).sum(-1)
    torch.testing.assert_close(rows, torch.ones(1, 5) * rows[0, 0])
    assert rows[0, 0].item() == pytest.approx(1)


def test_two_runs_on_the_same_images(karat_run: TrainedRun, softmax_run: TrainedRun) -> None:
    results = [analyze_maps(run, Settings(image_ids=(0, 9), batch=1)) for run in (karat_run, softmax_run)]
    for result in results:
        assert result.arrays["sample_ids"].tolist() == [0, 9]
        assert set(result.figures) == {"image_0", "image_9"}
        assert result.arrays["learned"].shape == (2, 2, 16)
    assert (results[1].arrays["learned"] >= 0).all()
    assert not np.allclose(results[0].arrays["learned"], results[1].arrays["learned"])


def test_a_block_that_is_not_there(karat_run: TrainedRun) -> None:
    with pytest.raises(RunDirectoryError, match="--block 5: it has blocks 0 to 1"):
        analyze_maps(karat_run, Settings(block=5))

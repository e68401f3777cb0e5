import json
from pathlib import Path

import pytest

from karat_scale.errors import RecipeError
from karat_scale.train.ds_config import config_directory, load_ds_config, zero_stage


@pytest.mark.parametrize(("name", "stage"), [("zero0", 0), ("zero1", 1)])
def test_auto_fields_come_from_the_recipe(small_recipe, name: str, stage: int) -> None:
    config = load_ds_config(small_recipe(f"deepspeed.config={name}"), world_size=2, micro_batch=2)
    assert zero_stage(config) == stage
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == (1.0 if stage else 0.0)
    assert config["bf16"]["enabled"] is False
    assert '"auto"' not in json.dumps(config)


def test_a_users_own_file_works(small_recipe, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"train_batch_size": "auto", "zero_optimization": {"stage": 1, "overlap_comm": true}}')
    config = load_ds_config(small_recipe(f"deepspeed.config={own}"), 1, 8)
    assert config == {"train_batch_size": 8, "zero_optimization": {"stage": 1, "overlap_comm": True}}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "should be a JSON object"),
        ('{"zero_optimization": {"stage": 3}}', "stage 3 is not supported; use 0, 1"),
        ('{"optimizer": {"type": "auto"}}', 'optimizer.type = "auto" has no source'),
    ],
)
def test_what_deepspeed_could_not_use_is_one_line(small_recipe, tmp_path: Path, content: str, part: str) -> None:
    own = tmp_path / "own.json"
    own.write_text(content)
    with pytest.raises(RecipeError, match=r"deepspeed\.config") as caught:
        load_ds_config(small_recipe(f"deepspeed.config={own}"), 1, 8)
    assert part in str(caught.value)


def test_bf16_at_stage_0_is_refused_in_a_users_file_too(small_recipe, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(RecipeError, match="zero1"):
        load_ds_config(small_recipe(f"deepspeed.config={own}", "train.precision=bf16"), 1, 8)


def test_the_shipped_files_are_found() -> None:
    assert {path.stem for path in config_directory().glob("*.json")} == {"zero0", "zero1"}

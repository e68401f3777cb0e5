import json

import pytest
import torch

from karat_scale.engine.deepspeed_config import (
    check_ds_config,
    config_directory,
    load_ds_config,
    offloads_optimizer,
    zero_stage,
)
from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig, ModelConfig
from tests.small_engines import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_auto_fields_come_from_the_recipe(small_recipe, name) -> None:
    for precision in ("fp32", "bf16", *(("bf16_weights",) if name != "zero0" else ())):
        recipe = small_recipe(f"deepspeed.config={name}", f"train.precision={precision}")
        config = load_ds_config(recipe, world_size=2, micro_batch=2)
        stage = zero_stage(config)
        assert stage == int(name.removeprefix("zero")[0])
        assert offloads_optimizer(config) == ("offload" in name)
        assert config["train_batch_size"] == 8
        assert config["train_micro_batch_size_per_gpu"] == 2
        assert config["gradient_accumulation_steps"] == 2
        assert config["gradient_clipping"] == (1.0 if stage else 0.0)
        assert config["bf16"]["enabled"] == (precision == "bf16_weights")
        assert config["timers"]["throughput"]["enabled"] is False
        assert config["data_types"]["grad_accum_dtype"] == "fp32"
        assert '"auto"' not in json.dumps(config)


def test_a_users_own_file_works_and_what_only_deepspeed_knows_is_passed_on(small_recipe, tmp_path):
    own = tmp_path / "own.json"
    own.write_text('{"train_batch_size": "auto", "zero_optimization": {"stage": 1, "overlap_comm": true}}')
    config = load_ds_config(small_recipe(f"deepspeed.config={own}"), 1, 8)
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert config["train_micro_batch_size_per_gpu"] == 8  # what the file leaves out is filled in too
    assert config["gradient_clipping"] == 1.0
    own = tmp_path / "own.json"
    zero = {"stage": 3, "overlap_comm": True, "stage3_max_live_parameters": 10, "offload_param": {"device": "cpu"}}
    content = {"zero_optimization": zero, "wall_clock_breakdown": True, "comms_logger": {"enabled": False}}
    own.write_text(json.dumps(content))
    config = load_ds_config(small_recipe(f"deepspeed.config={own}"), 1, 8)
    assert content.items() <= config.items()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{\n", "own.json: not valid JSON at line 2, column 1; correct it, or name a JSON file"),
        ("zero: {stage: 1}", "not valid JSON at line 1, column 1; correct it"),
        ("\x89PNG\udcff", "not a text file; name a JSON file"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON: a number has thousands of digits; shorten it"),
        ("[]", "should be a JSON object"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage is given twice; remove one of them"),
        ('{"bf16": 3}', "bf16 = 3: should be an object"),
        ('{"optimizer": {"type": "auto"}}', 'optimizer.type = "auto" has no source'),
        # What DeepSpeed cannot read.
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage = 4: should be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"reduce_bucket": 5}}', "zero_optimization.reduce_bucket = 5: unknown key; remove"),
        ('{"fp16": {"loss_scale": -1}}', "loss_scale = -1: fp16.loss_scale must be >= 0"),
        ('{"communication_data_type": "int3"}', "DeepSpeed cannot read it: ValueError: Invalid communication"),
        # What contradicts the recipe.
        ('{"gradient_cliping": 1.0}', "gradient_cliping: unknown key; did you mean gradient_clipping?"),
        ('{"train_batch_size": 16}', "train_batch_size = 16, but the recipe makes it 8"),
        ('{"gradient_clipping": 5.0}', 'gradient_clipping = 5.0, but the recipe makes it 1.0; set it to "auto"'),
        ('{"bf16": {"enabled": true}}', "bf16.enabled = true, but the recipe makes it false"),
        ('{"data_types": {"grad_accum_dtype": "bf16"}}', "grad_accum_dtype = 'bf16', but the recipe makes it 'fp32'"),
        (
            '{"tensor_parallel": {"autotp_size": 2}}',
            "tensor_parallel: each rank has a whole model here, or ZeRO's part",
        ),
        ('{"sequence_parallel_size": 2}', "sequence_parallel_size: each rank has whole images here; remove it"),
        ('{"optimizer": {"type": "AdamW"}}', "optimizer: the recipe's optim section makes the optimizer; remove it"),
        ('{"bf16": {"check_grad_overflow": false}}', "bf16.check_grad_overflow = false: it would step on NaN"),
        (
            '{"zero_optimization": {"stage": 1, "round_robin_gradients": true}}',
            "round_robin_gradients = true: DeepSpeed would save parts under the names of others; remove it",
        ),
        ('{"zero_optimization": {"stage": 1, "elastic_checkpoint": true}}', "checkpoints would have another layout"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            "zero_optimization.offload_param.device = 'nvme': checkpoints hold what is in memory",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_for_any_ranks(small_recipe, tmp_path, content, part):
    own = tmp_path / "own.json"
    own.write_text(content, errors="surrogateescape")
    recipe = small_recipe(f"deepspeed.config={own}")
    for check in (check_ds_config, lambda recipe: load_ds_config(recipe, 1, 8)):
        with pytest.raises(RecipeError, match=r"^deepspeed\.config = .*own\.json: ") as caught:
            check(recipe)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_for_one_number_of_ranks_is_not_refused_before_that_is_known(small_recipe, tmp_path) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto"}')
    check_ds_config(small_recipe(f"deepspeed.config={own}"))
    check_ds_config(small_recipe("deepspeed.config=zero2"))
    with pytest.raises(RecipeError, match=r"deepspeed\.config=zero1"):
        check_ds_config(small_recipe("train.precision=fp16", "deepspeed.config=zero0"))
    with pytest.raises(RecipeError, match=r"bf16_weights needs ZeRO stage 1 or higher; use deepspeed\.config=zero1"):
        check_ds_config(small_recipe("train.precision=bf16_weights", "deepspeed.config=zero0"))
    for precision, fits in {"bf16": "zero0", "bf16_weights": "zero1"}.items():
        graphs = ("train.compile=max-autotune", f"train.precision={precision}", "deepspeed.config=zero3")
        with pytest.raises(RecipeError, match=rf"records CUDA graphs, .*; use deepspeed\.config={fits}$"):
            check_ds_config(small_recipe(*graphs))


def test_the_shipped_files_are_found() -> None:
    assert {path.stem for path in config_directory().glob("*.json")} == {*CONFIGS, "zero3_large"}


@pytest.mark.parametrize(("name", "patch"), [("vit_large_patch16_224", 16), ("vit_giant_patch14_clip_224", 14)])
def test_zero3_large_partitions_matrices_and_keeps_what_karat_learns_whole(small_recipe, name, patch) -> None:
    config = load_ds_config(small_recipe("deepspeed.config=zero3_large"), 2, 2)
    threshold = config["zero_optimization"]["stage3_param_persistence_threshold"]
    with torch.device("meta"):
        model = create_model(
            ModelConfig(name=name, patch_size=patch, image_size=224), AttentionConfig(kind="karat", grid=3)
        )
    for parameter_name, parameter in model.blocks.named_parameters():
        is_matrix = parameter.ndim == 2
        assert (parameter.numel() > threshold) == is_matrix, parameter_name

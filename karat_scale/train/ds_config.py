"""DeepSpeed's configuration file, with its "auto" fields filled from the recipe."""

import json
from pathlib import Path
from typing import Any

from karat_scale.errors import RecipeError
from karat_scale.recipe import Recipe

SUPPORTED_STAGES = (0, 1)


def config_directory() -> Path:
    """Where the shipped files lie: inside an installed wheel, or at the top of a clone."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"


def load_ds_config(recipe: Recipe, world_size: int, micro_batch: int) -> dict[str, Any]:
    """The configuration DeepSpeed gets: the file the recipe names, every "auto" replaced.

    Raises:
        RecipeError: no such file, not JSON, an "auto" we cannot fill, or a ZeRO stage we do not train.
    """
    path = _find(recipe.deepspeed.config)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"deepspeed.config = {path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"deepspeed.config = {path}: should be a JSON object")
    _fill_auto(config, _auto_values(recipe, world_size, micro_batch), str(path))
    stage = zero_stage(config)
    if stage not in SUPPORTED_STAGES:
        supported = ", ".join(map(str, SUPPORTED_STAGES))
        raise RecipeError(f"deepspeed.config = {path}: ZeRO stage {stage} is not supported; use {supported}")
    if stage == 0 and recipe.train.precision == "bf16":
        raise RecipeError(
            f"deepspeed.config = {path}: ZeRO stage 0 in bf16 steps wrongly in DeepSpeed; "
            "use deepspeed.config=zero1 or train.precision=fp32"
        )
    if stage == 0:
        # DeepSpeed clips at stage 0 without telling the norm and steps on NaN; the engine does both.
        config["gradient_clipping"] = 0.0
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage a configuration asks for; DeepSpeed's default is 0."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _find(name: str) -> Path:
    directory = config_directory()
    for candidate in (directory / f"{name}.json", Path(name)):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(path.stem for path in directory.glob("*.json")))
    raise RecipeError(f"deepspeed.config = {name!r}: neither a file nor a shipped configuration ({shipped})")


def _auto_values(recipe: Recipe, world_size: int, micro_batch: int) -> dict[str, Any]:
    return {
        "train_batch_size": recipe.train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": recipe.train.global_batch // (world_size * micro_batch),
        "gradient_clipping": recipe.optim.clip_grad,
        "bf16.enabled": recipe.train.precision == "bf16",
    }


def _fill_auto(node: dict[str, Any], values: dict[str, Any], source: str, prefix: str = "") -> None:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _fill_auto(value, values, source, f"{name}.")
        elif value == "auto":
            if name not in values:
                known = ", ".join(values)
                raise RecipeError(f'deepspeed.config = {source}: {name} = "auto" has no source; only {known}')
            node[key] = values[name]

"""DeepSpeed's configuration file, with its "auto" fields filled from the recipe.

Keys that contradict the recipe or would silently go wrong are refused here. DeepSpeed itself reads the rest of the file
and reports what is wrong.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from karat_scale.foundation.errors import RecipeError, did_you_mean
from karat_scale.foundation.files import read_text, shipped_directory
from karat_scale.foundation.tables import importing, refuse_untrusted
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.base import as_written, wanted_by
from karat_scale.recipe.train import DeepSpeedConfig

# Sections that would repeat or contradict the recipe.
_REFUSED = {
    "optimizer": "the recipe's optim section makes the optimizer",
    "scheduler": "the recipe's schedule section sets the learning rate",
    "torch_autocast": "train.precision sets the precision",
    "bfloat16": 'the section is now called "bf16"',
    "tensor_parallel": "each rank has a whole model here, or ZeRO's part of it",
    "sequence_parallel_size": "each rank has whole images here",
}
# (section, key, values that are accepted, why not the others)
_ACCEPTED = (
    ("bf16", "check_grad_overflow", (True,), "it would step on NaN gradients"),
    ("bf16", "bf16_master_weights_and_grads", (False,), "master weights are fp32 here"),
    ("bf16", "bf16_optimizer_states", (False,), "optimizer states are fp32 here"),
    ("fp16", "fp16_master_weights_and_grads", (False,), "master weights are fp32 here"),
    ("fp16", "auto_cast", (False,), "inputs are cast here"),
    ("compile", "deepcompile", (False,), "train.compile = true is torch.compile"),
    ("zero_optimization", "compute_grad_norm", (True,), "gradients are clipped by this norm, and it is reported"),
    ("zero_optimization", "round_robin_gradients", (False,), "DeepSpeed would save parts under the names of others"),
    ("zero_optimization", "zenflow", (None,), "checkpoints would lack what it keeps"),
    ("zero_optimization", "elastic_checkpoint", (False,), "checkpoints would have another layout"),
    ("zero_optimization.offload_optimizer", "super_offload", (False,), "checkpoints would lack what it keeps"),
    ("zero_optimization.offload_optimizer", "ratio", (1, 1.0), "checkpoints would lack the other part"),
    ("zero_optimization.offload_optimizer", "device", ("none", "cpu"), "checkpoints hold what is in memory"),
    ("zero_optimization.offload_param", "device", ("none", "cpu"), "checkpoints hold what is in memory"),
)
# Sections that are read here, so that DeepSpeed never sees a wrong one.
_SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types", "timers")


def _check(config: Mapping[str, Any], values: Mapping[str, Any], source: str) -> None:
    """Refuse what contradicts the recipe, and what DeepSpeed cannot read.

    Args:
        config: a DeepSpeed configuration without "auto".
        values: the recipe's values by key.
        source: the beginning of the error.
    """
    known = {*_SECTIONS, *(name.partition(".")[0] for name in values)}
    for key in config:
        if key in _REFUSED:
            raise RecipeError(f"{source}: {key}: {_REFUSED[key]}; remove it")
        # DeepSpeed would ignore it.
        if key not in known and (hint := did_you_mean(key, known, likeness=0.85)):
            raise RecipeError(f"{source}: {key}: unknown key; {hint}")
    for key in _SECTIONS:
        if not isinstance(config.get(key, {}), Mapping):
            raise RecipeError(f"{source}: {key} = {as_written(config[key])}: should be an object")
    _check_by_deepspeed(config, source)
    for path, key, accepted, why in _ACCEPTED:
        section: Mapping[str, Any] = config
        for name in path.split("."):
            section = section.get(name) or {}
        if section.get(key, accepted[0]) not in accepted:
            raise RecipeError(f"{source}: {path}.{key} = {as_written(section[key])}: {why}; remove it")


def _check_by_deepspeed(config: Mapping[str, Any], source: str) -> None:
    with importing():
        from deepspeed.runtime.config import DeepSpeedConfig as Parsed

    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    plain = {key: value for key, value in config.items() if key not in batches}
    try:
        # A batch that fits any world size: this process may plan for another one.
        Parsed({**plain, "train_micro_batch_size_per_gpu": 1})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        given = "" if isinstance(first["input"], Mapping) else f" = {as_written(first['input'])}"
        section = "zero_optimization." if error.title == "DeepSpeedZeroConfig" else ""
        wanted = "should be 0, 1, 2 or 3" if f"{section}{key}" == "zero_optimization.stage" else wanted_by(first)
        raise RecipeError(f"{source}: {section}{key}{given}: {wanted}") from None
    except Exception as error:  # it raises nearly anything
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RecipeError(f"{source}: DeepSpeed cannot read it: {message}") from None


def config_directory() -> Path:
    """Return the directory of the shipped files: inside an installed wheel, or at the top of a clone."""
    return shipped_directory("ds_configs")


def load_ds_config(recipe: RunRecipe, world_size: int, micro_batch: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the file the recipe names, with every "auto" and missing number filled.

    Raises:
        RecipeError: the file does not exist, is not JSON, has an "auto" we cannot fill or a key twice, cannot be read
            by DeepSpeed or contradicts the recipe, or CUDA graphs would accumulate gradients.
    """
    values = {**_recipe_values(recipe), **_batch_values(recipe, world_size, micro_batch)}
    config, source = _read(recipe, values, with_keys=True)
    _settle(config, values, source)
    if recipe.train.records_graphs and (parts := config["gradient_accumulation_steps"]) > 1:
        # The gradients of one micro batch are in a graph's memory, which the next one uses again (pytorch #169545).
        raise RecipeError(
            f"train.compile = {recipe.train.compile} records CUDA graphs, which cannot add up the gradients of {parts} "
            "micro batches; use train.compile=default or a larger train.micro_batch"
        )
    if zero_stage(config) == 0:
        config["gradient_clipping"] = 0.0  # DeepSpeed would not return the norm and would step on NaN; the engine clips
    return config


def check_ds_config(recipe: RunRecipe) -> None:
    """Refuse a file that no world size can train with. Raises RecipeError like `load_ds_config`.

    The keys of a shipped file are not checked: that would import DeepSpeed, which takes seconds.
    """
    values = _recipe_values(recipe)
    any_batch = _batch_values(recipe, world_size=1, micro_batch=1)
    own = config_directory() != find_ds_config(recipe.deepspeed).parent
    logging.disable(logging.WARNING)  # DeepSpeed prints to standard output when it is imported
    try:
        config, source = _read(recipe, {**values, **any_batch}, with_keys=own)
    finally:
        logging.disable(logging.NOTSET)
    _settle(config, values, source)


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage a configuration asks for; DeepSpeed's default is 0."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def stage_refusal(recipe: RunRecipe, stage: int) -> str | None:
    """Return what the recipe asks for and this ZeRO stage cannot do, or None."""
    if recipe.train.holds_16_bits and stage == 0:
        return f"train.precision = {recipe.train.precision} needs ZeRO stage 1 or higher"
    if recipe.train.records_graphs and stage == 3:
        return f"train.compile = {recipe.train.compile} records CUDA graphs, and ZeRO stage 3 moves the weights"
    if recipe.optim.row.whole_matrices and stage > 0:
        return f"optim.name = {recipe.optim.name} needs whole matrices, which ZeRO stage {stage} cuts up"
    return None


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Return whether the optimizer's states and steps are on the CPU."""
    zero = config.get("zero_optimization", {})
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    return zero_stage(config) > 0 and bool(device != "none" or zero.get("cpu_offload"))


def find_ds_config(section: DeepSpeedConfig) -> Path:
    """Return the file that `deepspeed.config` names. Raises RecipeError."""
    name, directory = section.config, config_directory()
    for candidate in (directory / f"{name}.json", Path(name).expanduser()):
        if candidate.is_file():
            if section.found_in and candidate.resolve().parent != directory.resolve():
                refuse_untrusted(f"{section.found_in}: deepspeed.config = {name} is a file of this machine")
            return candidate
    shipped = ", ".join(sorted(path.stem for path in directory.glob("*.json")))
    what = "is a directory" if Path(name).expanduser().is_dir() else "no such file"
    raise RecipeError(f"deepspeed.config = {name!r}: {what}; use one of {shipped}, or the path of a JSON file")


def _read(recipe: RunRecipe, values: dict[str, Any], with_keys: bool) -> tuple[dict[str, Any], str]:
    """Return the file's content with every "auto" filled from `values`, and the beginning of its errors."""
    path = find_ds_config(recipe.deepspeed)
    source = f"deepspeed.config = {path}"

    def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # `dict` would keep the last
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise RecipeError(f"{source}: {key} is given twice; remove one of them")
        return dict(pairs)

    try:
        config = json.loads(read_text(path), object_pairs_hook=once_each)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise RecipeError(f"{source}: not valid JSON at {place}; correct it, or name a JSON file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{source}: not a text file; name a JSON file") from None
    except ValueError:
        raise RecipeError(f"{source}: not valid JSON: a number has thousands of digits; shorten it") from None
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise RecipeError(f"{source}: nested too deeply") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{source}: should be a JSON object")
    _fill_auto(config, values, source)
    if with_keys:
        _check(config, values, source)
    stage = zero_stage(config)
    if refusal := stage_refusal(recipe, stage):
        fits = next(name for number, name in enumerate(("zero0", "zero1")) if stage_refusal(recipe, number) is None)
        raise RecipeError(f"{source}: {refusal}; use deepspeed.config={fits}")
    return config, source


def _recipe_values(recipe: RunRecipe) -> dict[str, Any]:
    """Return the values that depend only on the recipe."""
    return {
        "train_batch_size": recipe.train.global_batch,
        "gradient_clipping": recipe.optim.clip_grad,
        # For DeepSpeed, a precision is the dtype of the weights; it need not know of our autocast.
        "bf16.enabled": recipe.train.precision == "bf16_weights",
        "fp16.enabled": recipe.train.precision == "fp16",
        "data_types.grad_accum_dtype": "fp32",
    }


def _batch_values(recipe: RunRecipe, world_size: int, micro_batch: int) -> dict[str, Any]:
    """Return the values that depend on the number of ranks."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": recipe.train.global_batch // (world_size * micro_batch),
    }


def _fill_auto(node: dict[str, Any], values: dict[str, Any], source: str, prefix: str = "") -> None:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _fill_auto(value, values, source, f"{name}.")
        elif value == "auto":
            if name not in values:
                known = ", ".join(values)
                raise RecipeError(f'{source}: {name} = "auto" has no source; only {known}')
            node[key] = values[name]


def _settle(config: dict[str, Any], values: dict[str, Any], source: str) -> None:
    """Fill in what the file omits; refuse values that differ from the recipe's."""
    for name, value in values.items():
        node = config
        *parents, leaf = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        if node.setdefault(leaf, value) != value:
            fix = 'set it to "auto"' if name != "bf16.enabled" else 'set it to "auto", or train.precision=bf16_weights'
            given, right = as_written(node[leaf]), as_written(value)
            raise RecipeError(f"{source}: {name} = {given}, but the recipe makes it {right}; {fix}")
    config.setdefault("steps_per_print", 10**9)
    # It would stop the host at each micro batch until the device is done.
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)

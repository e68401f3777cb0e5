"""DeepSpeed's configuration file, with its "auto" fields filled from the recipe.

DeepSpeed passes over an unknown top-level key in silence, so the keys of a file are checked here.
"""

import difflib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError
from pydantic_core import ErrorDetails

from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.files import read_text, shipped_directory
from karat_scale.foundation.trust import refuse_untrusted
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.train import DeepSpeedConfig

# Known to DeepSpeed, and either the recipe's own business or nothing that this trainer does.
REFUSED = {
    "optimizer": "the recipe's optim section makes the optimizer",
    "scheduler": "the recipe's schedule section sets the learning rate",
    "checkpoint": "the recipe's checkpoint section says when to save",
    "torch_autocast": "train.precision sets the precision",
    "bfloat16": 'the section is now called "bf16"',
    "managed_gradient_accumulation": "the loop accumulates by train.micro_batch",
    "gradient_allreduce_op": "losses are means over the global batch",
    "dataloader_drop_last": "the recipe's data section loads the data",
    "data_efficiency": "the recipe's data section orders the data",
    "curriculum_learning": "the recipe's data section orders the data",
    "autotuning": "train.micro_batch sets the micro batch",
    "weight_quantization": "weights are not quantised here",
    "aio": "nothing is offloaded to NVMe here",
    "hybrid_engine": "it is for text generation",
    "pipeline": "there is no pipeline parallelism here",
    "tensor_parallel": "there is no tensor parallelism here",
    "expert_parallel": "there is no expert parallelism here",
    "use_data_before_expert_parallelism": "there is no expert parallelism here",
    "sequence_parallel_size": "there is no sequence parallelism here",
    "seq_parallel_communication_data_type": "there is no sequence parallelism here",
    "datastates_ckpt": "the recipe's checkpoint section says when to save",
    "vocabulary_size": "images have none",
}


class PlainKeys(BaseModel):
    """The keys beside the sections. DeepSpeed reads them without a look at their types: "false" would be true."""

    model_config = ConfigDict(strict=True)
    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    gradient_clipping: NonNegativeFloat | None = None
    steps_per_print: PositiveInt | None = None
    dump_state: bool = False
    disable_python_gc: bool = False
    disable_allgather: bool = False
    communication_data_type: str | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: PositiveFloat = 1.0
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: bool = True
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    log_level: str | None = None


# (section, key, value that is refused or None for any, why)
_REFUSED_VALUES = (
    ("bf16", "check_grad_overflow", False, "steps on NaN gradients"),
    ("bf16", "bf16_master_weights_and_grads", True, "master weights are fp32 here"),
    ("bf16", "bf16_optimizer_states", True, "optimizer states are fp32 here"),
    ("compile", "deepcompile", True, "train.compile = true is torch.compile"),
    ("fp16", "auto_cast", True, "inputs are cast here"),
    ("fp16", "fp16_master_weights_and_grads", True, "master weights are fp32 here"),
    ("zero_optimization", "elastic_checkpoint", True, "checkpoints resume at any world size without it"),
    ("zero_optimization", "legacy_stage1", True, "DeepSpeed has dropped it"),
    ("zero_optimization", "compute_grad_norm", False, "the norm is clipped by and reported"),
    ("zero_optimization", "zenflow", None, "it is not supported"),
    ("zero_optimization", "leaf_module", None, "it is not supported"),
    ("zero_optimization", "stage3_module_granularity_threshold", None, "gradients would have wrong shapes"),
    ("zero_optimization", "zero_quantized_weights", True, "it is not supported"),
    ("zero_optimization", "zero_quantized_nontrainable_weights", True, "it is not supported"),
    ("zero_optimization", "zero_quantized_gradients", True, "it is not supported"),
    ("zero_optimization.offload_optimizer", "super_offload", True, "it is not supported"),
    ("zero_optimization.offload_optimizer", "device", "nvme", 'it is not supported; use "cpu"'),
    ("zero_optimization.offload_param", "device", "nvme", 'it is not supported; use "cpu"'),
)


def accepted_keys() -> frozenset[str]:
    """Return the top-level keys that a file may have."""
    return frozenset({*_models(), *_plain_sections(), *PlainKeys.model_fields, "timers"})


def check_keys(config: Mapping[str, Any], source: str) -> None:
    """Refuse what DeepSpeed would ignore, reject late or do wrongly.

    Args:
        config: a DeepSpeed configuration without "auto".
        source: begins the error.

    Raises:
        RecipeError: an unknown key, a value of the wrong type, or something this trainer cannot go along with.
    """
    accepted = accepted_keys()
    for key in config:
        if key in REFUSED:
            raise RecipeError(f"{source}: {key}: {REFUSED[key]}; remove it")
        if key not in accepted:
            raise RecipeError(f"{source}: {key}: unknown key{_near(key, accepted)}")
    _check_section((), config, PlainKeys, source)
    for name, model in _models().items():
        if name in config:
            _check_section((name,), _object(name, config[name], source), model, source)
    for name, keys in _plain_sections().items():
        for key in _object(name, config.get(name, {}), source):
            if key not in keys:
                raise RecipeError(f"{source}: {name}.{key}: unknown key{_near(key, keys)}")
    _check_data_types(config.get("data_types", {}), source)
    _check_values(config, source)
    _check_parsed(config, source)


def _check_section(place: tuple[str, ...], section: Mapping[str, Any], model: type[BaseModel], source: str) -> None:
    try:
        model.model_validate(dict(section))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (*place, *first["loc"]))
        if first["type"] == "extra_forbidden":
            hint = _near(str(first["loc"][-1]), _field_names(model))
            raise RecipeError(f"{source}: {key}: unknown key{hint}") from None
        given = "" if isinstance(first["input"], Mapping) else f" = {first['input']!r}"
        raise RecipeError(f"{source}: {key}{given}: {_what_it_should_be(first)}") from None


def _what_it_should_be(error: ErrorDetails) -> str:
    if error["type"] == "enum":  # its aliases are in the list too
        choices = dict.fromkeys(re.split(", | or ", error["ctx"]["expected"]))
        return f"should be one of {', '.join(choices)}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message.removeprefix("Input ")


def _check_values(config: Mapping[str, Any], source: str) -> None:
    for path, key, refused, why in _REFUSED_VALUES:
        section = _section(config, path)
        if key in section and (section[key] == refused or (refused is None and section[key] is not None)):
            raise RecipeError(f"{source}: {path}.{key} = {section[key]!r}: {why}; remove it")
    if _section(config, "zero_optimization.offload_optimizer").get("ratio", 1.0) != 1.0:
        raise RecipeError(f"{source}: zero_optimization.offload_optimizer.ratio: only 1.0 is supported; remove it")
    stage = int(_section(config, "zero_optimization").get("stage", 0))
    for path, least in (("zero_optimization.offload_optimizer", 1), ("zero_optimization.offload_param", 3)):
        if _section(config, path).get("device", "none") != "none" and stage < least:
            raise RecipeError(f"{source}: {path} needs ZeRO stage {least} or higher")


def _section(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    for name in path.split("."):
        config = config.get(name) or {}
    return config


def _check_data_types(section: Mapping[str, Any], source: str) -> None:
    from deepspeed.runtime.config import DtypeEnum

    for key in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        value = section.get(key)
        try:
            DtypeEnum(value or "fp32")
        except ValueError:
            raise RecipeError(f'{source}: data_types.{key} = {value!r}: should be "fp32", "bf16" or "fp16"') from None


def _check_parsed(config: Mapping[str, Any], source: str) -> None:
    """Refuse what DeepSpeed's own parsing stumbles over, and name the key without which it would not."""
    message = _failure_of_parsing(config)
    if message is None:
        return
    key = next((key for key in config if _failure_of_parsing({k: config[k] for k in config if k != key}) is None), None)
    place = "" if key is None else f"{key} = {config[key]!r}: "
    raise RecipeError(f"{source}: {place}DeepSpeed cannot read it: {message}")


def _failure_of_parsing(config: Mapping[str, Any]) -> str | None:
    from deepspeed.runtime.config import DeepSpeedConfig

    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    plain = {key: value for key, value in config.items() if key not in batches}
    try:
        # Batches that go with any world size: this process may plan for another one.
        DeepSpeedConfig({**plain, batches[1]: 1})
    except Exception as error:  # it raises nearly anything
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def _object(name: str, section: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(section, Mapping):
        raise RecipeError(f"{source}: {name} = {section!r}: should be an object")
    return section


def _models() -> dict[str, type[BaseModel]]:
    """DeepSpeed's own schemas of sections, where it has one."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
    }


def _plain_sections() -> dict[str, frozenset[str]]:
    """Sections that DeepSpeed reads key by key, so that it never sees a wrong one."""
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT

    data_types = ("GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES")
    profiler = (
        value
        for name, value in vars(profiling).items()
        if name.startswith("FLOPS_PROFILER_") and not name.endswith(("_DEFAULT", "_FORMAT"))
    )
    return {
        "activation_checkpointing": frozenset(ACT_CHKPT_DEFAULT),
        "data_types": frozenset(getattr(constants, name) for name in data_types),
        "flops_profiler": frozenset(profiler),
    }


def _field_names(model: type[BaseModel]) -> set[str]:
    """Every key of a schema and of the schemas inside it."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        names.add(field.alias or name)
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                names |= _field_names(inner)
    return names


def _near(key: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; DeepSpeed has no such key"


_NEVER = 10**9


def config_directory() -> Path:
    """Where the shipped files lie: inside an installed wheel, or at the top of a clone."""
    return shipped_directory("ds_configs")


def load_ds_config(recipe: RunRecipe, world_size: int, micro_batch: int) -> dict[str, Any]:
    """The configuration DeepSpeed gets: the file the recipe names, every "auto" and missing number filled.

    Raises:
        RecipeError: no such file, not JSON, an "auto" we cannot fill, a wrong or unknown key, a key given twice,
            a number that contradicts the recipe, or CUDA graphs with accumulated gradients.
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
        config["gradient_clipping"] = 0.0  # DeepSpeed would not tell the norm and would step on NaN; the engine clips
    return config


def check_ds_config(recipe: RunRecipe) -> None:
    """Refuse a file that no world can train with. Raises RecipeError as `load_ds_config`.

    The keys of a shipped file are not looked at: for those DeepSpeed would be imported, which takes seconds.
    """
    values = _recipe_values(recipe)
    any_batch = _batch_values(recipe, world_size=1, micro_batch=1)
    own = config_directory() != _find(recipe.deepspeed).parent
    logging.disable(logging.WARNING)  # DeepSpeed talks on standard output when it is imported
    try:
        config, source = _read(recipe, {**values, **any_batch}, with_keys=own)
    finally:
        logging.disable(logging.NOTSET)
    _settle(config, values, source)


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage a configuration asks for; DeepSpeed's default is 0."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def stage_refusal(recipe: RunRecipe, stage: int) -> str | None:
    """What the recipe asks for and this ZeRO stage cannot do."""
    if recipe.train.holds_16_bits and stage == 0:
        return f"train.precision = {recipe.train.precision} needs ZeRO stage 1 or higher"
    if recipe.train.records_graphs and stage == 3:
        return f"train.compile = {recipe.train.compile} records CUDA graphs, and ZeRO stage 3 moves the weights"
    if recipe.optim.row.whole_matrices and stage > 0:
        return f"optim.name = {recipe.optim.name} needs whole matrices, which ZeRO stage {stage} cuts up"
    return None


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer's states and steps are on the CPU."""
    zero = config.get("zero_optimization", {})
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    return bool(device != "none" or zero.get("cpu_offload"))


def _find(section: DeepSpeedConfig) -> Path:
    name, directory = section.config, config_directory()
    for candidate in (directory / f"{name}.json", Path(name).expanduser()):
        if candidate.is_file():
            if section.found_in and candidate.resolve().parent != directory.resolve():
                refuse_untrusted(f"{section.found_in}: deepspeed.config = {name} is a file of this machine")
            return candidate
    shipped = ", ".join(sorted(path.stem for path in directory.glob("*.json")))
    raise RecipeError(f"deepspeed.config = {name!r}: neither a file nor a shipped configuration ({shipped})")


def _read(recipe: RunRecipe, values: dict[str, Any], with_keys: bool) -> tuple[dict[str, Any], str]:
    """The file's content with every "auto" filled from `values`, and what an error of it begins with."""
    path = _find(recipe.deepspeed)
    source = f"deepspeed.config = {path}"
    try:
        config = json.loads(read_text(path), object_pairs_hook=_once_each)
    except ValueError as error:  # of JSON, of its text, or of a number with thousands of digits
        raise RecipeError(f"{source}: not valid JSON: {str(error).partition('; ')[0]}") from None
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise RecipeError(f"{source}: nested too deeply") from None
    except _TwiceError as error:
        raise RecipeError(f"{source}: {error} is given twice; remove one of them") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{source}: should be a JSON object")
    _fill_auto(config, values, source)
    if with_keys:
        check_keys(config, source)
    stage = zero_stage(config)
    if refusal := stage_refusal(recipe, stage):
        raise RecipeError(f"{source}: {refusal}; use deepspeed.config={'zero1' if stage == 0 else 'zero0'}")
    return config, source


class _TwiceError(Exception):
    """A key that is given twice in one object."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As `dict`, which would keep the last of several values in silence."""
    counts = Counter(key for key, _ in pairs)
    for key, count in counts.items():
        if count > 1:
            raise _TwiceError(key)
    return dict(pairs)


def _recipe_values(recipe: RunRecipe) -> dict[str, Any]:
    """What the recipe alone says."""
    return {
        "train_batch_size": recipe.train.global_batch,
        "gradient_clipping": recipe.optim.clip_grad,
        # To DeepSpeed a precision is what it holds weights in; of our autocast it need not know.
        "bf16.enabled": recipe.train.precision == "bf16_weights",
        "fp16.enabled": recipe.train.precision == "fp16",
        "data_types.grad_accum_dtype": "fp32",
    }


def _batch_values(recipe: RunRecipe, world_size: int, micro_batch: int) -> dict[str, Any]:
    """What hangs on the number of ranks."""
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
    """Fill what the file leaves out; refuse what it sets to something else than the recipe."""
    for name, value in values.items():
        node = config
        *parents, leaf = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        if node.setdefault(leaf, value) != value:
            fix = 'set it to "auto"' if name != "bf16.enabled" else 'set it to "auto", or train.precision=bf16_weights'
            raise RecipeError(f"{source}: {name} = {node[leaf]!r}, but the recipe makes it {value!r}; {fix}")
    config.setdefault("steps_per_print", _NEVER)
    # It would stop the host at each micro batch until the device is done.
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)

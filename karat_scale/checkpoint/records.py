"""The content that each file of a checkpoint must have.

A file whose hash is right may still be wrong: something else wrote it, or wrote it wrongly. So each one is validated
when it is read, before its content is used. The states of torch's random generators of one rank are among them.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from karat_scale.checkpoint.store import STATE
from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.files import read_text
from karat_scale.recipe.base import wanted_by

FORMAT = 2
_LONGEST = 200
R = TypeVar("R", bound="Record")


def _plain(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError("should be a dense tensor")
    return value


def _floats(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise ValueError("should be a tensor of floats")
    return value


def _generator(value: Tensor) -> Tensor:
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        raise ValueError("should be the state of a random generator") from None
    return value


def _cuda_generator(value: Tensor) -> Tensor:
    if value.dtype != torch.uint8 or value.shape != (16,):
        raise ValueError("should be the state of a GPU's random generator")
    return value


def _states(values: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's states of one tensor: tensors, and numbers such as `step`, which may be in a tensor."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Tensor) and key != "step":
            found[key] = _floats(_plain(value))
            continue
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
            raise ValueError(f"{key} should be a number of at least 0")
        found[key] = float(number)
    return found


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple, and anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def _scaler(value: Any) -> Any:
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    if getattr(value, "dynamic", False) and not all(isinstance(getattr(value, n, None), int | float) for n in names):
        raise ValueError("should be a loss scaler")
    return value


Count = Annotated[int, Field(ge=0, lt=2**63)]
AnyTensor = Annotated[Any, AfterValidator(_plain)]
Floats = Annotated[Any, AfterValidator(_plain), AfterValidator(_floats)]
Shape = Annotated[tuple[Count, ...], BeforeValidator(as_tuple)]
Place = Annotated[tuple[str, Count, Count, Count], BeforeValidator(as_tuple)]


class Record(BaseModel):
    """The keys that are read. There may be others. No value is converted into another kind."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StateRecord(Record):
    """The part of `state.json` that describes its checkpoint; `RunState` is the state of training."""

    format: int
    kind: str = "classification"
    step: Count
    samples: Count
    world_size: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    has_ema: bool
    teacher: str | None = None


class _Version(Record):
    format: int


class Sidecar(Record):
    """A rank's own file. At stage 0, the files of ranks other than 0 have only the generators."""

    rng: Annotated[AnyTensor, AfterValidator(_generator)]
    cuda_rng: Annotated[AnyTensor, AfterValidator(_cuda_generator)] | None = None
    shapes: dict[str, Shape] | None = None
    layout: list[list[Place]] | None = None
    ema: list[Floats] | None = None
    frozen: dict[str, Floats] | None = None


class OptimizerStates(Record):
    """The optimizer's states by the number of the master tensor."""

    state: dict[Count, Annotated[dict[str, Any], AfterValidator(_states)]]


class ModelFile(Record):
    """DeepSpeed's file of the module. At stage 0 the optimizer is in it."""

    module: dict[str, AnyTensor]
    param_shapes: list[dict[str, Shape]] | None = None
    optimizer: OptimizerStates | None = None
    global_steps: Count
    global_samples: Count
    skipped_steps: Count


class Partition(Record):
    """A rank's part of the optimizer, from stage 1 on: its fp32 tensors, and the optimizer's states of each."""

    masters: list[Floats] = Field(validation_alias=AliasChoices("single_partition_of_fp32_groups", "fp32_flat_groups"))
    states: OptimizerStates = Field(validation_alias=AliasChoices("base_optimizer_state", "optimizer_state_dict"))
    loss_scaler: Annotated[Any, AfterValidator(_scaler)] = None
    zero_stage: Any = None


class PartitionFile(Record):
    """DeepSpeed's file of a rank's part of the optimizer."""

    optimizer_state_dict: Partition


def read_record(path: Path, kind: type[R]) -> R:
    """Read a file of tensors, mapped into memory.

    Raises:
        RunDirectoryError: it does not have the content of a file of this kind.
        OSError: it cannot be read.
    """
    return validated(path.name, lambda: kind.model_validate(load_tensors(path, mmap=True)))


def read_state_record(checkpoint: Path) -> StateRecord:
    """Read the `state.json` of a checkpoint.

    Raises:
        RunDirectoryError: its content is not valid, or is that of another version.
        OSError: it cannot be read.
    """
    try:
        text = read_text(checkpoint / STATE)
    except UnicodeDecodeError:
        raise RunDirectoryError(f"{STATE}: is not UTF-8") from None
    version = validated(STATE, lambda: _Version.model_validate_json(text))
    if version.format != FORMAT:
        raise RunDirectoryError(
            f"it has format {version.format}, this version reads format {FORMAT}; use the version that wrote it"
        )
    return validated(STATE, lambda: StateRecord.model_validate_json(text))


def validated(file: str, read: Callable[[], R]) -> R:
    """Return the result of `read`. Raises RunDirectoryError, with a line that begins with `file`, if it is invalid."""
    try:
        return read()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
        wanted = wanted_by(first)[:_LONGEST]
        raise RunDirectoryError(f"{file}: {place[:_LONGEST]}{': ' if place else ''}{wanted}") from None


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the current states of the CPU's generator and, if the rank trains on a GPU, of the GPU's."""
    return {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None}


def restore_generators(states: Sidecar, device: torch.device) -> None:
    """Restore the generators' states that `generator_states` returned."""
    torch.set_rng_state(states.rng)
    if states.cuda_rng is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states.cuda_rng)


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed the generators of a rank that has none saved: they start from the step."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))

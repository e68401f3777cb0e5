"""One safetensors file of whole fp32 weights, for timm and anything else, with what is needed to build their model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from karat_scale.checkpoint.records import Count, Record, validated
from karat_scale.checkpoint.restore import check_shapes
from karat_scale.checkpoint.tensor_storage import read_metadata, save_safetensors
from karat_scale.checkpoint.weights import describe_weights
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.files import open_regular, parse_json
from karat_scale.foundation.trust import require_trust
from karat_scale.models import create_model
from karat_scale.models.init_from import spread_operator
from karat_scale.models.transfer import weights_digest
from karat_scale.recipe import AttentionConfig, ModelConfig, Recipe
from karat_scale.recipe.files import parse
from karat_scale.training.open_run import OpenRun


def _parse_recipe(text: Any) -> Any:
    try:
        return parse(text)
    except (yaml.YAMLError, AttributeError):  # the latter of what is no text
        raise ValueError("should be a recipe in YAML") from None


Json = BeforeValidator(parse_json)
Three = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]
Sizes = Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=3, max_length=3)]


class _Run(Record):
    name: str


class _Augment(Record):
    mean: Three
    std: Three


class _OfRecipe(Record):
    run: _Run
    augment: _Augment


def _has_sections(tree: dict[str, Any] | None) -> dict[str, Any]:
    try:
        _OfRecipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return tree or {}


def _parse_names(text: Any) -> Any:
    names = parse_json(text)
    return tuple(names) if isinstance(names, list) else names


class Preprocessing(Record):
    """What the images of a model look like; `input_size` is channels, height and width."""

    input_size: Sizes
    mean: Three
    std: Three


class TimmNetwork(Record):
    """Which of timm's models the weights are of."""

    name: str
    num_classes: Count


class ExportFacts(Record):
    """What `karat export` says of weights in the same file. `recipe` is the whole recipe, of any version.

    A file says what its author wants, so each value is of its type here, and what it means is checked where it is used.
    """

    karat_scale: str | None = None
    checkpoint: str | None = None
    weights: str | None = None
    weights_sha256: str | None = None
    model: Annotated[dict[str, Any] | None, Json] = None
    attention: Annotated[dict[str, Any] | None, Json] = None
    recipe: Annotated[dict[str, Any] | None, BeforeValidator(_parse_recipe), AfterValidator(_has_sections)] = None
    recipe_sha256: str | None = None
    classes: Annotated[tuple[str, ...], BeforeValidator(_parse_names)] = ()
    preprocessing: Annotated[Preprocessing | None, Json] = None
    timm: Annotated[TimmNetwork | None, Json] = None


def read_facts(path: Path) -> ExportFacts:
    """What is said of the weights in a safetensors file.

    Raises:
        RunDirectoryError: the file is missing or damaged, or says what `karat export` never does.
    """
    with _one_line(path):
        about = read_metadata(path)
    return validated(str(path), lambda: ExportFacts.model_validate(about))


def write_weights(run: OpenRun[Recipe], kind: str, path: Path) -> None:
    """Write one kind of weights, "raw" or "ema", of a run's checkpoint.

    Raises:
        UserError: the checkpoint has no EMA or holds another model, or `path` cannot be written.
    """
    model = create_model(run.recipe.model, run.recipe.attention)
    run.load(model, weights=kind)
    facts = describe_weights(run.recipe, run.saved, run.chosen, kind, run.directory.classes())
    write_model(model, path, {**facts, "weights_sha256": weights_digest(model)})


def write_model(model: nn.Module, path: Path, facts: dict[str, str]) -> None:
    """Write a model's state and what is said of it.

    Raises:
        RunDirectoryError: `path` cannot be written.
    """
    # A module shared by blocks is there once for each, as `load_state_dict` wants it.
    tensors = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(tensors, path, facts)
    except OSError as error:
        raise RunDirectoryError(f"{path}: {error.strerror or error}; choose another --out") from None


def read_exported(path: Path, implementation: str = "auto") -> nn.Module:
    """The model in a file of `karat export`, float32 on the CPU.

    Args:
        implementation: of KArAt's operator, whichever the model was trained with.

    Raises:
        RunDirectoryError: the file is missing or damaged, or holds something else.
    """
    sizes, attention = exported_sections(path)
    with _one_line(path):
        model = create_model(sizes, attention.changed(implementation=implementation))
    load_exported(model, path)
    if read_facts(path).weights_sha256 not in (None, weights_digest(model)):
        raise RunDirectoryError(f"{path}: its weights are not those that were written; put it back or export it again")
    return model


def exported_sections(path: Path) -> tuple[ModelConfig, AttentionConfig]:
    """The sections of the recipe that build the model in a file of `karat export`.

    Raises:
        RunDirectoryError: the file is missing or damaged, or holds something else.
        UntrustedError: it names a class.
    """
    facts = read_facts(path)
    with _one_line(path):
        if facts.model is None or facts.attention is None:
            raise ValueError("it does not say what its model is")
        model, attention = ModelConfig.model_validate(facts.model), AttentionConfig.model_validate(facts.attention)
    require_trust(attention.classes, path)
    return model, attention


def load_exported(model: nn.Module, path: Path) -> None:
    """Give a model the weights in a file of `karat export`, or of its folders, in place.

    Raises:
        RunDirectoryError: the file is missing or damaged, or of another model.
    """
    with _one_line(path):
        os.close(open_regular(path))
        weights = spread_operator(model, load_file(path))
    here, there = ({name: tuple(x.shape) for name, x in state.items()} for state in (model.state_dict(), weights))
    try:
        check_shapes(here, there)
    except RunDirectoryError as error:
        raise RunDirectoryError(f"{path}: {error}") from None
    model.load_state_dict(weights)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} is missing; put it back, nothing can be computed without it") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise RunDirectoryError(f"{path}: not a whole file of karat export: {reason}; put a whole copy back") from None

"""Whole fp32 weights outside of checkpoints: the file that `karat export` writes, and the sources of `init_from`.

The file is a safetensors file, for timm and other programs, with what is needed to build the model. A new run may begin
with the weights of a run, a file, a folder of `karat export`, or timm.
"""

import errno
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, NamedTuple

import timm
import yaml
from huggingface_hub.utils import LocalEntryNotFoundError
from pydantic import BeforeValidator, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import Tensor, nn

from karat_scale.checkpoint.records import Count, Record, as_tuple, validated
from karat_scale.checkpoint.restore import check_shapes
from karat_scale.checkpoint.tensor_storage import read_metadata, save_safetensors
from karat_scale.checkpoint.weights import describe_weights
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import OtherModelError, RecipeError, RunDirectoryError, UserError, nearest, one_line
from karat_scale.foundation.files import open_regular, open_to_read, parse_json, read_text
from karat_scale.foundation.tables import require_trust
from karat_scale.models import create_model
from karat_scale.models.init_from import check_heads, differences, spread_operator, take_weights
from karat_scale.models.layers import attention_layers
from karat_scale.models.transfer import weights_digest
from karat_scale.recipe import AttentionConfig, ModelConfig, Recipe, RunRecipe
from karat_scale.recipe.base import Triple
from karat_scale.recipe.files import TIMM, locate, parse
from karat_scale.recipe.loading import portable_recipe, text_digest
from karat_scale.training.run_directory import FITTED, OpenRun, RunDirectory, describe_keys, shaping_keys


def _parse_recipe(text: Any) -> Any:
    try:
        return parse(text) or {}  # an empty one has no run
    except (yaml.YAMLError, AttributeError):  # the latter of what is no text
        raise ValueError("should be a recipe in YAML") from None


Json = BeforeValidator(parse_json)
Three = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]
Sizes = Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=3, max_length=3)]


class _Run(Record, extra="allow"):
    name: str


class _Augment(Record, extra="allow"):
    mean: Three
    std: Three


class _OfRecipe(Record, extra="allow"):
    run: _Run
    augment: _Augment


class Preprocessing(Record):
    """The format of a model's images; `input_size` is channels, height and width."""

    input_size: Sizes
    mean: Three
    std: Three


class TimmNetwork(Record):
    """The timm model that the weights are of."""

    name: str
    num_classes: Count


class ExportFacts(Record):
    """The facts that `karat export` writes into a file of weights. `recipe` is the whole recipe, of any version.

    A file may say anything, so here each value is of its type, and its meaning is checked where it is used.
    """

    karat_scale: str | None = None
    checkpoint: str | None = None
    weights: str | None = None
    weights_sha256: str | None = None
    model: Annotated[dict[str, Any] | None, Json] = None
    attention: Annotated[dict[str, Any] | None, Json] = None
    recipe: Annotated[_OfRecipe | None, BeforeValidator(_parse_recipe)] = None
    recipe_sha256: str | None = None
    classes: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Json] = ()
    preprocessing: Annotated[Preprocessing | None, Json] = None
    timm: Annotated[TimmNetwork | None, Json] = None


def read_facts(path: Path) -> ExportFacts:
    """Read the facts on the weights in a safetensors file.

    Raises:
        RunDirectoryError: the file is missing or damaged, or says what `karat export` never writes.
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
    """Write a model's state and the facts on it.

    Raises:
        RunDirectoryError: `path` cannot be written.
    """
    # A module shared by blocks is there once for each, as `load_state_dict` wants it.
    tensors = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(tensors, path, facts)
    except OSError as error:
        room = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise RunDirectoryError(f"{path}: {error.strerror or error}; {room}choose another directory") from None


def read_exported(path: Path, implementation: str = "auto") -> nn.Module:
    """Return the model in a file of `karat export`, float32 on the CPU.

    Args:
        implementation: the implementation of KArAt's operator, whichever the model was trained with.

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
        raise RunDirectoryError(f"{path} is missing; restore it from a copy") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise RunDirectoryError(f"{path}: not a whole file of karat export: {reason}; put a whole copy back") from None


Take = Callable[[nn.Module, Mapping[str, Tensor], AttentionConfig], str]
_NO_STATE = "not a state dict (tensors by parameter name); write one by torch.save(model.state_dict(), FILE)"


class Origin(NamedTuple):
    """The model and attention that weights were trained with, if known."""

    model: ModelConfig
    attention: AttentionConfig


class SourceWeights(NamedTuple):
    """Whole weights by parameter name, their origin, and the mean and std by which the images were normalised.

    `heads` has the number of heads of each attention layer of a timm model.
    """

    tensors: dict[str, Tensor]
    origin: Origin | None = None
    normalised: tuple[Triple, Triple] | None = None
    heads: tuple[int, ...] = ()


def initialise(model: nn.Module, recipe: RunRecipe, world: World, take: Take | None = None) -> str:
    """Give a recipe's freshly built model the weights of its `init_from` on every rank; returns a line. Collective.

    Args:
        take: a function that copies weights, trained with an attention, into the model and returns what was not simply
            copied.

    Raises:
        UserError: the weights cannot be read, or are of another model; on all ranks alike.
    """
    source = recipe.init_from
    try:
        with world.together():
            weights, origin, normalised, heads = read_weights(source)
            if origin is not None:
                check_heads(origin.model, recipe.model)
            attention = AttentionConfig() if origin is None else origin.attention
            try:
                note = take(model, weights, attention) if take else take_weights(model, weights, attention=attention)
            except OtherModelError:
                if origin is None:
                    raise
                trained = recipe.changed(model=recipe.model.changed(**dict(origin.model)), attention=attention)
                if not (keys := [key for key in shaping_keys(trained, recipe) if key not in FITTED]):
                    raise
                differ = describe_keys(trained, recipe, keys)
                raise RecipeError(f"it is of another model: {differ}; set the keys as it has them") from None
            # The tensors fit, also where another number of heads shares their width.
            for there, own in zip(heads, heads_of_layers(model), strict=False):
                if there != own:
                    fix = f"use model.num_heads={there}"
                    raise RecipeError(f"the weights have {there} heads per layer, the model has {own}; {fix}")
            notes = [note] if note else []
            notes += [] if origin is None else differences(origin, (recipe.model, recipe.attention))
            here: Any = recipe.augment  # each kind of recipe has its own, with both keys
            for key, theirs in zip(("mean", "std"), normalised or (), strict=False):
                if tuple(theirs) != tuple(ours := getattr(here, key)):
                    both = f"{list(theirs)}, not {list(ours)}"
                    notes.append(f"the weights were trained with augment.{key} = {both}; set the same")
    except UserError as error:
        raise RecipeError(f"init_from = {source}: {str(error).removeprefix(f'{source}: ')}") from error
    return "; ".join([f"begins with the weights of {source}", *notes])


def heads_of_layers(model: nn.Module) -> tuple[int, ...]:
    """Return the number of heads of each attention layer that has one."""
    layers = (layer.attention for layer in attention_layers(model))
    return tuple(int(layer.num_heads) for layer in layers if hasattr(layer, "num_heads"))


def read_weights(source: str) -> SourceWeights:
    """Return the weights of a source; of a run, those that it evaluates, averaged or raw.

    Args:
        source: a run's directory (its best checkpoint), a checkpoint in one, a .safetensors file or a folder of `karat
            export`, a .safetensors or .pth file of timm, or `timm:NAME`.

    Raises:
        UserError: there is no such source, or it cannot be read.
    """
    if source.startswith(TIMM):
        model: Any = timm_model(source.removeprefix(TIMM))
        about = model.pretrained_cfg
        normalised = tuple(about["mean"]), tuple(about["std"])
        return SourceWeights(model.state_dict(), None, normalised, heads_of_layers(model))
    path, checkpoint = locate(source)
    if not checkpoint:
        return _weights_of_file(path)
    run = OpenRun.at(path, Recipe, checkpoint=checkpoint)
    recipe = run.recipe
    trained = create_model(recipe.model, recipe.attention)
    run.load(trained)
    normalised = recipe.augment.mean, recipe.augment.std
    return SourceWeights(trained.state_dict(), Origin(recipe.model, recipe.attention), normalised)


_DAMAGED = "it is damaged, cut short or of another kind; copy it again, or name another file"


def _weights_of_file(path: Path) -> SourceWeights:
    try:
        _check_kind(path)
        facts = export_facts(path)
        weights = load_state_dict(str(path), use_ema=True, weights_only=True)
    except UserError:
        raise
    except AttributeError:  # timm looks for a state dict's items
        raise RecipeError(_NO_STATE) from None
    except Exception as error:  # torch, timm and safetensors have many
        # Their error about a pickle advises to run what is in it.
        is_pickle = any(isinstance(e, UnpicklingError) for e in (error, error.__cause__, error.__context__))
        more = "it holds more than tensors and plain values, or is damaged; save its state dict alone"
        is_damaged = isinstance(error, SafetensorError | zipfile.BadZipFile | EOFError)
        is_damaged = is_damaged or re.search("StreamReader failed|hasRecord", str(error)) is not None
        reason = more if is_pickle else _DAMAGED if is_damaged else one_line(error)
        raise RecipeError(f"not a file of weights that is safe to read: {reason}") from error
    if not (isinstance(weights, dict) and all(isinstance(x, Tensor) for x in weights.values())):
        raise RecipeError(_NO_STATE)
    origin = None
    with suppress(ValueError):  # of another version; the weights tell what they are
        origin = Origin(ModelConfig.model_validate(facts.model), AttentionConfig.model_validate(facts.attention))
    about: Any = facts.recipe and facts.recipe.augment
    if about is None and path.name == "model.safetensors":
        with suppress(OSError, ValueError, KeyError, TypeError):  # timm writes one beside it, others may not
            about = _Augment.model_validate(parse_json(read_text(path.with_name("config.json")))["pretrained_cfg"])
    return SourceWeights(weights, origin, (tuple(about.mean), tuple(about.std)) if about else None)


def _check_kind(path: Path) -> None:
    """Raises RecipeError for a file that has no weights, by its first bytes, and for a program."""
    if path.suffix == ".safetensors":
        return
    with open_to_read(path) as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # what torch.save writes, now and in old times
        raise RecipeError("not a file of weights; expected .safetensors, or .pth as torch.save writes it")
    if start == b"PK" and any(Path(name).name == "constants.pkl" for name in zipfile.ZipFile(path).namelist()):
        raise RecipeError("a TorchScript program, not a file of weights; use the run, or --format safetensors of it")


def export_facts(path: Path) -> ExportFacts:
    """Return the facts that `karat export` wrote into a file of weights; none if another program wrote it.

    Raises:
        RunDirectoryError: it says what `karat export` never writes.
        RecipeError: it is damaged.
    """
    try:
        is_ours = path.suffix == ".safetensors" and "karat_scale" in read_metadata(path)
    except OSError as error:
        raise RecipeError(f"not a file of weights that is safe to read: {one_line(error)}") from error
    except SafetensorError as error:
        raise RecipeError(f"not a file of weights that is safe to read: {_DAMAGED}") from error
    return read_facts(path) if is_ours else ExportFacts()


def run_behind(source: str) -> dict[str, str]:
    """Return `name` and `recipe_sha256` of the run that readable weights are of; nothing if they do not say.

    Args:
        source: a source as in `read_weights`.

    Raises:
        UserError: they are no longer readable.
    """
    if not source or source.startswith(TIMM):
        return {}
    path, checkpoint = locate(source)
    if checkpoint:
        recipe = RunDirectory(path).recipe()
        return {"name": recipe.run.name, "recipe_sha256": text_digest(portable_recipe(recipe))}
    facts = export_facts(path)
    if facts.recipe is None or facts.recipe_sha256 is None:
        return {}
    return {"name": facts.recipe.run.name, "recipe_sha256": facts.recipe_sha256}


def timm_model(name: str) -> nn.Module:
    """Return timm's pretrained model of a name, float32 on the CPU.

    Raises:
        RecipeError: timm has no weights of that name, or they cannot be fetched.
    """
    if not timm.is_model_pretrained(name):
        known = dict.fromkeys(found.partition(".")[0] for found in timm.list_pretrained())
        close = nearest(name, known)
        hint = f"did you mean {TIMM}{close[0]}?" if close else "`timm.list_pretrained('vit*')` lists them"
        raise RecipeError(f"timm has no weights of that name; {hint}")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # the hub's client announces each retry; the last one's error is reported
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub and what carries it have many
        is_away = isinstance(error, LocalEntryNotFoundError)
        reason = "neither the Hugging Face hub nor its cache has them" if is_away else one_line(error)
        fix = "fetch them where there is a network (HF_HOME names the cache) or name a file"
        raise RecipeError(f"cannot be fetched: {reason}; {fix}") from error
    finally:
        logger.setLevel(level)
    return model

"""`init_from`: the weights a new run begins with, of a run, a file, a folder of `karat export`, or timm."""

import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import timm
from huggingface_hub.utils import LocalEntryNotFoundError
from timm.models import load_state_dict
from torch import Tensor, nn

from karat_scale.checkpoint.tensor_storage import read_metadata
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import RecipeError, UserError, nearest, one_line
from karat_scale.foundation.files import open_to_read
from karat_scale.models import create_model
from karat_scale.models.init_from import check_heads, differences, take_weights
from karat_scale.recipe import AttentionConfig, ModelConfig, Recipe, RunRecipe
from karat_scale.recipe.base import Triple
from karat_scale.recipe.loading import portable_recipe, text_digest
from karat_scale.training.open_run import OpenRun
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.weights_file import ExportFacts, read_facts

Take = Callable[[nn.Module, Mapping[str, Tensor]], str]
TIMM = "timm:"
_NO_STATE = "no state dict: expected tensors by parameter name"
_UNSAFE = "not a file of weights that is safe to read"


class Origin(NamedTuple):
    """What weights were trained as, where that is known."""

    model: ModelConfig
    attention: AttentionConfig


class SourceWeights(NamedTuple):
    """Whole weights by parameter name, their origin, and by what the images were normalised: mean and std."""

    tensors: dict[str, Tensor]
    origin: Origin | None = None
    normalised: tuple[Triple, Triple] | None = None


def initialise(model: nn.Module, recipe: RunRecipe, world: World, take: Take = take_weights) -> str:
    """Give a recipe's freshly built model the weights of its `init_from` on every rank; returns a line. Collective.

    Args:
        take: copies weights into the model and returns what was not simply copied.

    Raises:
        UserError: they cannot be had, or are of another model; on all ranks alike.
    """
    source = recipe.init_from
    try:
        with world.together():
            notes = _take(model, recipe, take)
    except UserError as error:
        raise RecipeError(f"init_from = {source}: {str(error).removeprefix(f'{source}: ')}") from error
    return "; ".join([f"begins with the weights of {source}", *notes])


def _take(model: nn.Module, recipe: RunRecipe, take: Take) -> list[str]:
    weights, origin, normalised = read_weights(recipe.init_from)
    if origin is not None:
        check_heads(origin.model, recipe.model)
    notes = take(model, weights)
    differing = [] if origin is None else differences(origin, (recipe.model, recipe.attention))
    return [*([notes] if notes else []), *differing, *_other_pixels(normalised, recipe)]


def _other_pixels(normalised: tuple[Triple, Triple] | None, recipe: RunRecipe) -> list[str]:
    """Return a note if the model's images are normalised in another way than those that the weights know."""
    if normalised is None:
        return []
    here: Any = recipe.augment  # each kind of recipe has its own, with both keys
    pairs = [("mean", normalised[0], here.mean), ("std", normalised[1], here.std)]
    return [
        f"the weights are of images with augment.{key} = {list(theirs)}, not {list(ours)}; best use the same"
        for key, theirs, ours in pairs
        if tuple(theirs) != tuple(ours)
    ]


def read_weights(source: str) -> SourceWeights:
    """The weights of a source, averaged ones where there are any.

    Args:
        source: a run's directory (its best checkpoint), a checkpoint in one, a .safetensors file or a folder of `karat
            export`, a .safetensors or .pth file of timm, or `timm:NAME`.

    Raises:
        UserError: there is no such thing, or it cannot be read.
    """
    if source.startswith(TIMM):
        model: Any = timm_model(source.removeprefix(TIMM))
        about = model.pretrained_cfg
        return SourceWeights(model.state_dict(), None, (tuple(about["mean"]), tuple(about["std"])))
    path, checkpoint = locate(source)
    if not checkpoint:
        return _weights_of_file(path)
    run = OpenRun.at(path, Recipe, checkpoint=checkpoint)
    recipe = run.recipe
    trained = create_model(recipe.model, recipe.attention)
    run.load(trained, weights="ema" if run.saved["has_ema"] else "raw")
    normalised = recipe.augment.mean, recipe.augment.std
    return SourceWeights(trained.state_dict(), Origin(recipe.model, recipe.attention), normalised)


def locate(source: str) -> tuple[Path, str]:
    """A run's directory and which checkpoint of it, or a file and "", of a source that is no timm:NAME.

    Raises:
        RecipeError: there is no such thing.
    """
    path = Path(source).expanduser()
    exported = path / "model.safetensors"
    if exported.exists() and (path / "config.json").exists():  # as a hub has it, perhaps with a recipe
        return exported, ""
    if (path / "recipe.yaml").exists():
        return path, "best"
    if path.parent.name == "checkpoints" and (path.is_dir() or path.name in ("best", "latest")):
        return path.parent.parent, path.name
    if path.is_file():
        return path, ""
    raise RecipeError("neither a run's directory, nor a checkpoint in one, nor a file, nor timm:NAME")


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
        # Theirs about a pickle advises to run what is in it.
        is_pickle = any(isinstance(e, UnpicklingError) for e in (error, error.__cause__, error.__context__))
        reason = "it holds more than tensors and plain values, or is damaged" if is_pickle else one_line(error)
        raise RecipeError(f"{_UNSAFE}: {reason}") from error
    if not (isinstance(weights, dict) and all(isinstance(x, Tensor) for x in weights.values())):
        raise RecipeError(_NO_STATE)
    origin = None
    with suppress(ValueError):  # of another version; the weights tell what they are
        origin = Origin(ModelConfig.model_validate(facts.model), AttentionConfig.model_validate(facts.attention))
    augment = facts.recipe and facts.recipe["augment"]
    return SourceWeights(weights, origin, (tuple(augment["mean"]), tuple(augment["std"])) if augment else None)


def _check_kind(path: Path) -> None:
    """Raises RecipeError for a file that no weights are in, by its first bytes, and for a program."""
    if path.suffix == ".safetensors":
        return
    with open_to_read(path) as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # what torch.save writes, now and in old times
        raise RecipeError("not a file of weights; expected .safetensors, or .pth as torch.save writes it")
    if start == b"PK" and any(Path(name).name == "constants.pkl" for name in zipfile.ZipFile(path).namelist()):
        raise RecipeError("a TorchScript program, not a file of weights; use the run, or --format safetensors of it")


def export_facts(path: Path) -> ExportFacts:
    """What `karat export` says of a file's weights in it; nothing where another program wrote it.

    Raises:
        RunDirectoryError: it says what `karat export` never does.
    """
    is_ours = path.suffix == ".safetensors" and "karat_scale" in read_metadata(path)
    return read_facts(path) if is_ours else ExportFacts()


def run_behind(source: str) -> dict[str, str]:
    """`name` and `recipe_sha256` of the run that readable weights are of; nothing where they do not say.

    Args:
        source: as of `read_weights`.

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
    return {"name": facts.recipe["run"]["name"], "recipe_sha256": facts.recipe_sha256}


def timm_model(name: str) -> nn.Module:
    """timm's pretrained model of a name, float32 on the CPU.

    Raises:
        RecipeError: timm has no weights of that name, or they cannot be fetched.
    """
    if not timm.is_model_pretrained(name):
        known = dict.fromkeys(found.partition(".")[0] for found in timm.list_pretrained())
        close = nearest(name, known)
        hint = f"did you mean {TIMM}{close[0]}?" if close else "`timm.list_pretrained('vit*')` lists them"
        raise RecipeError(f"timm has no weights of that name; {hint}")
    try:
        with _quiet_hub():
            model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub and what carries it have many
        is_away = isinstance(error, LocalEntryNotFoundError)
        reason = "neither the Hugging Face hub nor its cache has them" if is_away else one_line(error)
        fix = "fetch them where there is a network (HF_HOME names the cache) or name a file"
        raise RecipeError(f"cannot be fetched: {reason}; {fix}") from error
    return model


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's client announces each of its retries; the last one's error is told here."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

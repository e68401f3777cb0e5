"""`karat export`: a checkpoint's whole fp32 weights in one safetensors file, for timm and anything else."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import nn

from karat_scale.errors import RunDirectoryError
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig, ModelConfig, Recipe
from karat_scale.recipe_io import load_recipe
from karat_scale.train.restore import check_shapes
from karat_scale.train.run_directory import RunDirectory
from karat_scale.train.tensor_storage import save_safetensors
from karat_scale.train.weights import describe_weights, load_weights


def export_run(run_dir: str, checkpoint: str, weights: str, out: str | None) -> int:
    """Export and print where; returns the exit code.

    Args:
        run_dir: the run's directory.
        checkpoint: best, latest, or a name.
        weights: raw, ema, or both; a run that has no EMA gives raw alone when both are asked for.
        out: the file to write, only for one kind of weights, or a directory; the run's own when None.

    Raises:
        UserError: no such run or checkpoint, a damaged one, no EMA in it, or nowhere to write.
    """
    directory = RunDirectory(run_dir)
    directory.recipe()
    recipe = load_recipe(directory.recipe_file)
    name = directory.store.find_intact(checkpoint)
    saved = directory.store.state(name)
    kinds: Sequence[str] = [weights] if weights != "both" else ["raw", "ema"] if saved["has_ema"] else ["raw"]
    for kind in kinds:
        path = _target(out, directory.path, name, kind, alone=len(kinds) == 1)
        write_weights(directory, recipe, name, kind, path)
        print(f"{path}: {kind} weights of {name}, {path.stat().st_size / 1e6:.1f} MB")
    return 0


def write_weights(directory: RunDirectory, recipe: Recipe, name: str, kind: str, path: Path) -> None:
    """Write one kind of weights, "raw" or "ema", of a run's intact checkpoint `name`.

    Raises:
        UserError: the checkpoint has no EMA or holds another model, or `path` cannot be written.
    """
    model = create_model(recipe.model, recipe.attention)
    saved = directory.store.state(name)
    load_weights(model, directory.store.root / name, saved, ema=kind == "ema")
    _write(model, path, describe_weights(recipe, saved, name, kind))


def read_exported(path: Path, implementation: str = "auto") -> VisionTransformer:
    """The model in a file of `karat export`, float32 on the CPU.

    Args:
        implementation: of KArAt's operator, whichever the model was trained with.

    Raises:
        RunDirectoryError: the file is missing or damaged, or holds something else.
    """
    with _one_line(path):
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        attention = AttentionConfig(**{**json.loads(about["attention"]), "implementation": implementation})
        model = create_model(ModelConfig(**json.loads(about["model"])), attention)
    load_exported(model, path)
    return model


def load_exported(model: nn.Module, path: Path) -> None:
    """Give a model the weights in a file of `karat export`, in place; raises as `read_exported` does."""
    with _one_line(path):
        weights = load_file(path)
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
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise RunDirectoryError(f"{path}: not a whole file of karat export: {reason}") from None


def _target(out: str | None, run: Path, name: str, kind: str, alone: bool) -> Path:
    if out is not None and Path(out).suffix == ".safetensors":
        if not alone:
            raise RunDirectoryError(f"--out {out} is one file for two kinds of weights; add --weights raw or ema")
        return Path(out)
    return (run if out is None else Path(out)) / f"{name}-{kind}.safetensors"


def _write(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    # A module shared by blocks is there once for each, as `load_state_dict` wants it.
    tensors = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(tensors, path, metadata)
    except OSError as error:
        raise RunDirectoryError(f"{path}: {error.strerror or error}; choose another --out") from None

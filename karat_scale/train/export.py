"""`karat export`: a checkpoint's whole fp32 weights in one safetensors file, for timm and anything else."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from karat_scale import __version__
from karat_scale.errors import RunDirectoryError
from karat_scale.files import commit_file
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from karat_scale.recipe_io import load_recipe
from karat_scale.train.run_directory import RunDirectory
from karat_scale.train.weights import load_weights


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
        model = create_model(recipe.model, recipe.attention)
        load_weights(model, directory.store.root / name, saved, ema=kind == "ema")
        _write(model, path, _metadata(recipe, name, saved["step"], kind))
        print(f"{path}: {kind} weights of {name}, {path.stat().st_size / 1e6:.1f} MB")
    return 0


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
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata)
            commit_file(Path(temporary), path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunDirectoryError(f"{path}: {reason}; choose another --out") from None


def _metadata(recipe: Recipe, name: str, step: int, kind: str) -> dict[str, str]:
    """What `karat_scale.models.create_model` needs to build the model again, as strings."""
    return {
        "format": "pt",
        "karat_scale": __version__,
        "checkpoint": name,
        "step": str(step),
        "weights": kind,
        "model": json.dumps(recipe.model.model_dump(mode="json")),
        "attention": json.dumps(recipe.attention.model_dump(mode="json")),
    }

"""`karat export`: choose the weights, the format and the output path."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from karat_scale.errors import RunDirectoryError
from karat_scale.export.folders import write_hub_folder, write_timm_folder
from karat_scale.export.onnx_file import write_onnx
from karat_scale.export.source import Source
from karat_scale.export.torchscript import write_torchscript
from karat_scale.recipe.loading import load_recipe
from karat_scale.run.run_directory import RunDirectory
from karat_scale.run.weights_file import write_weights


class Format(NamedTuple):
    """The function that writes a format, and the suffix of its file; a folder has none."""

    write: Callable[[Source, Path], str]
    suffix: str


def _write_safetensors(source: Source, path: Path) -> str:
    write_weights(source.run, source.recipe, source.checkpoint, source.kind, path)
    return ""


FORMATS = {
    "safetensors": Format(_write_safetensors, ".safetensors"),
    "timm": Format(write_timm_folder, ""),
    "onnx": Format(write_onnx, ".onnx"),
    "torchscript": Format(write_torchscript, ".pt"),
    "hub-folder": Format(write_hub_folder, ""),
}


def export_run(run_dir: str, format_name: str, checkpoint: str, weights: str, out: str | None) -> int:
    """Export, and print the path; returns the exit code.

    Args:
        run_dir: the run's directory.
        format_name: one of `FORMATS`.
        checkpoint: best, latest, or a name.
        weights: raw, ema, or both. For both, a run without EMA exports only raw.
        out: for one kind of weights, the file with its format's suffix, or the folder; else a directory. A directory
            has no suffix, exists already, or ends with a slash. The default is the run's own.

    Raises:
        UserError: the run or checkpoint is missing or damaged, has no EMA, or the output cannot be written.
    """
    directory = RunDirectory(run_dir)
    directory.recipe()
    recipe = load_recipe(directory.recipe_file)
    name = directory.store.find_intact(checkpoint)
    saved = directory.store.state(name)
    kinds: Sequence[str] = [weights] if weights != "both" else ["raw", "ema"] if saved["has_ema"] else ["raw"]
    form = FORMATS[format_name]
    for kind in kinds:
        path = _target(out, directory.path, f"{name}-{kind}", form, alone=len(kinds) == 1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            note = form.write(Source(directory, recipe, name, kind), path)
        except OSError as error:
            raise RunDirectoryError(f"{path}: {error.strerror or error}; choose another --out") from None
        print(f"{path}: {kind} weights of {name}, {_size(path) / 1e6:.1f} MB{note and f', {note}'}")
    return 0


def _target(out: str | None, run: Path, name: str, form: Format, alone: bool) -> Path:
    if out is None:
        return run / f"{name}{form.suffix}"
    suffix = Path(out).suffix
    names_it = suffix == form.suffix if form.suffix else alone
    if names_it and not alone:
        raise RunDirectoryError(f"--out {out} is one file for two kinds of weights; add --weights raw or ema")
    if alone and not names_it and suffix and not out.endswith("/") and not Path(out).is_dir():
        meant = Path(out).with_suffix(form.suffix)
        raise RunDirectoryError(f"--out {out} is not a {form.suffix} file; use {meant}, or {out}/ for a directory")
    return Path(out) if names_it else Path(out) / f"{name}{form.suffix}"


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)

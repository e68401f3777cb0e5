"""`karat export`: choose the weights, the format and the output path."""

from collections.abc import Sequence
from pathlib import Path

from karat_scale.commands.export.folders import Source, check_push, push_folder
from karat_scale.foundation.console import work_display
from karat_scale.foundation.errors import RunDirectoryError, UserError
from karat_scale.foundation.files import temporary_folder
from karat_scale.foundation.tables import EXPORT_FORMATS, FormatRow, load
from karat_scale.recipe import Recipe
from karat_scale.training.open_run import OpenRun

HUB = "hub-folder"


def export_run(
    run_dir: str,
    format: str | None,
    checkpoint: str,
    weights: str,
    out: str | None,
    push: str | None = None,
    private: bool = False,
) -> int:
    """Export, and print the path; returns the exit code.

    Args:
        format: one of EXPORT_FORMATS; None is safetensors.
        checkpoint: best, latest, or a name.
        weights: raw, ema, or both. For both, a run without EMA exports only raw.
        out: for one kind of weights, the file with its format's suffix, or the folder; else a directory. A directory
            has no suffix, exists already, or ends with a slash. The default is the run's own.
        push: USER/NAME of a repository on the hub, which gets the folder for it; without `out` it stays there alone.
        private: a repository that is made for it is not public.

    Raises:
        UserError: the run or checkpoint is missing or damaged, has no EMA, or the output cannot be written.
    """
    if push is not None:
        if format not in (None, HUB):
            raise UserError(f"--format {format}: --push uploads a {HUB}; remove --format")
        check_push(push)
    run = OpenRun.at(run_dir, Recipe, checkpoint=checkpoint)
    kinds: Sequence[str] = [weights] if weights != "both" else ["raw", "ema"] if run.saved["has_ema"] else ["raw"]
    row = EXPORT_FORMATS[format or "safetensors"]
    if push is not None:
        return _push(Source(run, _only(kinds)), out, push, private)
    for kind in kinds:
        path = _target(out, run.path, f"{run.chosen}-{kind}", row, alone=len(kinds) == 1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with work_display() as show:
                show(f"{kind} weights of {run.chosen}", 0, 1)
                note = load(row.place)(Source(run, kind), path)
        except OSError as error:
            raise RunDirectoryError(f"{path}: {error.strerror or error}; choose another --out") from None
        which = f"{kind} weights of {run.chosen}{run.store.beside(run.chosen)}"
        print(f"{path}: {which}, {_size(path) / 1e6:.1f} MB{note and f', {note}'}")
    return 0


def _only(kinds: Sequence[str]) -> str:
    if len(kinds) > 1:
        raise RunDirectoryError("--push takes one kind of weights; add --weights ema or raw")
    return kinds[0]


def _push(source: Source, out: str | None, repository: str, private: bool) -> int:
    with temporary_folder(source.run.path / "hub") as scratch:
        folder = Path(out).expanduser() if out else scratch / "model"
        try:
            note = load(EXPORT_FORMATS[HUB].place)(source, folder)
        except OSError as error:
            raise RunDirectoryError(f"{folder}: {error.strerror or error}; choose another --out") from None
        size = _size(folder)
        print(f"uploading {source.kind} weights of {source.run.chosen}, {note}, {size / 1e6:.1f} MB", flush=True)
        print(push_folder(folder, repository, private))
    return 0


def _target(out: str | None, run: Path, name: str, row: FormatRow, alone: bool) -> Path:
    if out is None:
        return run / f"{name}{row.suffix}"
    suffix = Path(out).suffix
    names_it = suffix == row.suffix if row.suffix else alone
    if names_it and not alone:
        raise RunDirectoryError(f"--out {out} is one file for two kinds of weights; add --weights raw or ema")
    if alone and not names_it and suffix and not out.endswith("/") and not Path(out).expanduser().is_dir():
        meant = Path(out).with_suffix(row.suffix)
        raise RunDirectoryError(f"--out {out} is not a {row.suffix} file; use {meant}, or {out}/ for a directory")
    path = Path(out).expanduser()
    return path if names_it else path / f"{name}{row.suffix}"


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)

"""A sweep as a SLURM job array: one element for each run that has not finished."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from karat_scale.commands.submit.sbatch import agrees, fill, sbatch, slurm_home, with_environment
from karat_scale.commands.sweep.plan import PlannedRun, State, Sweep
from karat_scale.data.shards.shard_format import absolute_path
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.files import write_atomically
from karat_scale.recipe.loading import text_digest

SCRIPT = "sweep_grid.sh"


@dataclass(frozen=True)
class Submission:
    """How a job array is submitted.

    Attributes:
        options: of sbatch, by their long names.
        settings: variables at the top of the script, such as VENV.
        at_once: at most so many elements run at a time.
        is_agreed: do not ask.
    """

    options: Mapping[str, str]
    settings: Mapping[str, str]
    at_once: int | None = None
    is_agreed: bool = False


def submit_sweep(sweep: Sweep, how: Submission, only_print: bool) -> None:
    """Write OUT/sweep.sh and a folder in OUT/points, show the script, and submit it if the user agrees.

    With `only_print`, only show the script.

    Raises:
        UserError: a file cannot be written, or sbatch refuses the script.
    """
    elements = [number for number, run in enumerate(sweep.runs) if run.state in (State.NEW, State.UNFINISHED)]
    out = sweep.out.absolute()
    points = [_point(run) for run in sweep.runs]
    # A folder for each grid: elements of earlier arrays may be waiting, or come back, and read theirs.
    folder = out / "points" / text_digest("".join(points))[:12]
    filled = {
        "KARAT_HOME": str(slurm_home()),
        "TASK": sweep.command,
        "RECIPE": sweep.recipe,
        "SHARDS": _shards(sweep, how),
        "POINTS": str(folder),
        **with_environment(how.settings),
    }
    array = ranges(elements) + (f"%{how.at_once}" if how.at_once else "")
    output = {"job-name": out.name, "output": str(out / "logs" / "%A_%a.out"), "array": array}
    template = (slurm_home() / "slurm" / SCRIPT).read_text(encoding="utf-8")
    kept = [setting for setting in sweep.shared if not setting.startswith("data.path=")]
    text = fill(template, {**output, **how.options}, filled, kept)
    print(text, end="" if only_print else "\n")
    script = out / "sweep.sh"
    if only_print:
        print(
            "note: --print writes nothing, and the job reads files beside this script; to submit it yourself, leave "
            f"--print out, answer n, and run: sbatch {script}",
            file=sys.stderr,
        )
        return
    try:
        for directory in (folder, out / "logs"):
            directory.mkdir(parents=True, exist_ok=True)
        for number, point in enumerate(points):
            write_atomically(folder / str(number), point)
        write_atomically(script, text)
    except OSError as error:
        raise UserError(f"--out {sweep.out}: {error.strerror}; choose another directory") from None
    if not (how.is_agreed or agrees()):
        print(f"not submitted; when you want to: sbatch {script}")
        return
    print(f"job {sbatch(script)} is submitted: {plural(len(elements), 'run')}")


def _shards(sweep: Sweep, how: Submission) -> str:
    """Return the script's SHARDS: the data of all runs. It is empty if data.path varies, for each point has its own."""
    places = {absolute_path(run.recipe.data.path) for run in sweep.runs}  # type: ignore[attr-defined]
    if len(places) == 1:
        return places.pop()
    if "STAGE" in how.settings:
        raise UserError(f"--stage {how.settings['STAGE']} copies one data set, but data.path varies; leave --stage out")
    return ""


def _point(run: PlannedRun) -> str:
    """Return the run's own overrides, a line for each; the first is its directory."""
    url = run.recipe.checkpoint.url
    places = [f"run.dir={run.directory.absolute()}", *([f"checkpoint.url={url}"] if url else [])]
    return "\n".join([*places, *run.point.settings]) + "\n"


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as sbatch's --array takes them: "0-2,5"."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

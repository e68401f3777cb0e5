"""`karat sweep RECIPE key=a,b,c run.seed=0..4`: train every point of a grid, and print one table of all runs."""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence

from karat_scale.commands.compare.command import compare_runs
from karat_scale.commands.submit.sbatch import Job
from karat_scale.commands.sweep.grid import State, Sweep, plan_sweep
from karat_scale.commands.sweep.local import StoppedSweepError, last_step, run_sweep, submit_sweep
from karat_scale.foundation.console import plural, print_table
from karat_scale.foundation.errors import EXIT_STOPPED, UserError, on_one_line


def sweep(
    recipe: str,
    overrides: Sequence[str],
    out: str | None,
    only_print: bool,
    ranks: int,
    job: Job | None,
    at_once: int | None,
) -> int:
    """Train what has not finished, here or by SLURM, and compare what has; returns the exit code.

    Args:
        recipe: a shipped recipe's name or the path of a YAML file.
        overrides: `key=value`, or `key=value,value` for a key that varies.
        out: the directory around the runs; None is `runs/sweep_RECIPE`.
        only_print: show the runs and how far they are, and do nothing.
        ranks: of each run on this machine.
        job: how to submit a job array instead, of which at most `at_once` elements run at a time.

    Raises:
        UserError: the grid or a recipe is wrong, or SLURM refuses the jobs.
    """
    planned = plan_sweep(recipe, overrides, out)
    states = {run.point.name: run.state for run in planned.runs}
    if only_print or job:
        _show(planned, states)
    is_left = any(state in (State.NEW, State.UNFINISHED) for state in states.values())
    failures: dict[str, str] = {}
    if job and is_left:
        submit_sweep(planned, job, at_once)
        return 0
    if only_print:
        return 0
    if is_left and not job:
        try:
            failures = run_sweep(planned, ranks)
        except StoppedSweepError as stopped:
            print(stopped, file=sys.stderr)
            return EXIT_STOPPED if stopped.saved else 1
    return _conclude(planned, failures)


def _show(planned: Sweep, states: dict[str, State]) -> None:
    rows = []
    for run in planned.runs:
        state = states[run.point.name]
        at = last_step(run.directory) if state in (State.UNFINISHED, State.RUNNING) else None
        standing = f"{state.value}, step {at[0]:,} of {at[1]:,}" if at else state.value
        rows.append([run.point.name, *(setting.partition("=")[2] for setting in run.point.settings), standing])
    keys = [setting.partition("=")[0] for setting in planned.runs[0].point.settings]
    counts = ", ".join(f"{count} {state.value}" for state, count in Counter(states.values()).items())
    title = f"{plural(len(rows), 'run')} of {planned.recipe} in {planned.out}: {counts}"
    print_table(title, ["run", *keys, "state"], rows, range(len(keys) + 2))


def _conclude(planned: Sweep, failures: dict[str, str]) -> int:
    """Print the table of what has finished, and a line for each run that has not."""
    finished = [str(run.directory) for run in planned.runs if run.state is State.FINISHED]
    if finished:
        try:
            compare_runs(finished)
        except UserError as error:
            print(f"\nno table: {error}", file=sys.stderr)
    for name, reason in failures.items():
        print(on_one_line(f"{name} has failed: {reason}"), file=sys.stderr)
    left = len(planned.runs) - len(finished)
    if left:
        print(f"{left} of {plural(len(planned.runs), 'run')} have not finished", file=sys.stderr)
        return 1
    print(f"\nfor files and curves: karat compare {shlex.join(finished)} --out DIR")
    return 0

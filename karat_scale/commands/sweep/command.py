"""`karat sweep RECIPE key=a,b,c run.seed=0..4`: train every point of a grid, and print one table of all runs."""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence

from karat_scale.commands.compare.command import compare_runs
from karat_scale.commands.sweep.grid import PlannedRun, State, Sweep, plan_sweep
from karat_scale.commands.sweep.local import StoppedSweepError, Submission, last_step, run_sweep, submit_sweep
from karat_scale.foundation.console import plural, print_table
from karat_scale.foundation.errors import EXIT_STOPPED, UserError, on_one_line


def sweep(recipe: str, overrides: Sequence[str], out: str | None, only_print: bool, how: int | Submission) -> int:
    """Train what has not finished, here or by SLURM, and compare what has; returns the exit code.

    Args:
        recipe: a shipped recipe's name or the path of a YAML file.
        overrides: `key=value`, or `key=value,value` for a key that varies.
        out: the directory around the runs; None is `runs/sweep_RECIPE`.
        only_print: show the runs and how far they are, and do nothing.
        how: the ranks of each run on this machine, or how to submit a job array.

    Raises:
        UserError: the grid or a recipe is wrong, or SLURM refuses the jobs.
    """
    planned = plan_sweep(recipe, overrides, out)
    states = {run.point.name: run.state for run in planned.runs}
    if only_print or isinstance(how, Submission):
        _show(planned, states)
    is_left = any(state in (State.NEW, State.UNFINISHED) for state in states.values())
    failures: dict[str, str] = {}
    if isinstance(how, Submission):
        if is_left:
            submit_sweep(planned, how, only_print)
            return 0
    elif is_left and not only_print:
        try:
            failures = run_sweep(planned, how)
        except StoppedSweepError as stopped:
            print(stopped, file=sys.stderr)
            return EXIT_STOPPED if stopped.saved else 1
    return 0 if only_print else _conclude(planned, failures)


def _show(planned: Sweep, states: dict[str, State]) -> None:
    rows = [[run.point.name, *_values(run), _standing(run, states[run.point.name])] for run in planned.runs]
    keys = [setting.partition("=")[0] for setting in planned.runs[0].point.settings]
    counts = ", ".join(f"{count} {state.value}" for state, count in Counter(states.values()).items())
    title = f"{plural(len(rows), 'run')} of {planned.recipe} in {planned.out}: {counts}"
    print_table(title, ["run", *keys, "state"], rows, range(len(keys) + 2))


def _values(run: PlannedRun) -> list[str]:
    return [setting.partition("=")[2] for setting in run.point.settings]


def _standing(run: PlannedRun, state: State) -> str:
    at = last_step(run.directory) if state in (State.UNFINISHED, State.RUNNING) else None
    return f"{state.value}, step {at[0]:,} of {at[1]:,}" if at else state.value


def _conclude(planned: Sweep, failures: dict[str, str]) -> int:
    """Print the table of what has finished, and a line for each run that has not."""
    finished = [str(run.directory) for run in planned.runs if run.state is State.FINISHED]
    if finished:
        try:
            compare_runs(finished, None, None, None)
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

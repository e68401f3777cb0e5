"""The commands for jobs: submit, sweep, status. Each imports what it needs when it runs."""

import argparse
from typing import Any

from karat_scale.commands.launch import default_ranks
from karat_scale.foundation.arguments import add_trust, count, run_directory, time_limit, virtual_environment, whole
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.machine import known_gpu


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    submit = commands.add_parser("submit", help="write a recipe's sbatch script, show it, and submit it")
    submit.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    submit.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as data.path=DIR")
    _add_sbatch_options(submit)
    submit.add_argument("--gpu", metavar="NAME", help="plan ZeRO stage and micro batch for this GPU, such as h100-80")
    how = submit.add_mutually_exclusive_group()
    how.add_argument("--yes", dest="decision", action="store_const", const="yes", help="submit without asking")
    only = "show the script, and neither write nor submit it"
    how.add_argument("--print", dest="decision", action="store_const", const="print", default="ask", help=only)
    submit.set_defaults(run=_submit)
    add_trust(submit)

    sweep = commands.add_parser("sweep", help="train every point of a grid of settings, and compare the runs")
    sweep.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    sweep.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as optim.lr=1e-3,2e-3 run.seed=0..4"
    )
    sweep.add_argument("--out", metavar="DIR", help="around the runs' directories (default: runs/sweep_RECIPE)")
    sweep.add_argument("--print", action="store_true", help="show the runs and how far they are, and stop")
    sweep.add_argument("--ranks", type=count, help="of each run on this machine (default: one for each GPU)")
    sweep.add_argument("--slurm", action="store_true", help="submit a job array, with the options below")
    sweep.add_argument("--at-once", type=count, metavar="N", help="at most so many jobs of the array run at a time")
    sweep.add_argument("--yes", action="store_true", help="submit without asking")
    _add_sbatch_options(sweep)
    sweep.set_defaults(run=_sweep)
    add_trust(sweep)

    status = commands.add_parser("status", help="show a run's progress, from its files")
    status.add_argument("run_dir", metavar="RUN", type=run_directory, help="the run's directory")
    status.add_argument("--once", action="store_true", help="do not follow the run")
    status.set_defaults(run=_status)


def _add_sbatch_options(parser: argparse.ArgumentParser) -> None:
    for option in ("account", "partition", "qos", "constraint", "mem", "dependency", "mail-type", "mail-user"):
        parser.add_argument(f"--{option}", help=f"the option --{option} of sbatch")
    parser.add_argument("--time", type=time_limit, help="the option --time of sbatch, such as 12:00:00 or 1-12")
    for option, least in (("nodes", 1), ("gpus-per-node", 0), ("cpus-per-task", 1)):
        parser.add_argument(f"--{option}", type=whole(least), help=f"the option --{option} of sbatch")
    parser.add_argument("--venv", type=virtual_environment, metavar="DIR", help="a virtual environment for the nodes")
    for setting in ("conda-env", "modules", "container", "stage"):
        variable = setting.upper().replace("-", "_")
        parser.add_argument(f"--{setting}", help=f"{variable} of the scripts in slurm/")


def _submit(options: argparse.Namespace) -> int:
    from karat_scale.commands.submit.sbatch import submit

    if options.gpu:
        known_gpu(options.gpu)
    chosen, variables = _sbatch_choices(options)
    return submit(options.recipe, options.overrides, chosen, variables, options.decision, options.gpu)


def _sbatch_choices(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Return the options of sbatch and the variables of its script that the command line names."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    named = ("account", "partition", "qos", "constraint", "mem", "dependency", "mail_type", "mail_user")
    counted = ("nodes", "gpus_per_node", "cpus_per_task", "time")
    chosen = {name.replace("_", "-"): str(given[name]) for name in (*named, *counted) if name in given}
    if "gpus_per_node" in given:  # one task for each GPU; one on a node without GPUs
        chosen["ntasks-per-node"] = str(max(given["gpus_per_node"], 1))
    settings = ("venv", "conda_env", "modules", "container", "stage")
    variables = {name.upper(): given[name] for name in settings if name in given}
    return chosen, variables


def _sweep(options: argparse.Namespace) -> int:
    from karat_scale.commands.sweep.command import sweep
    from karat_scale.commands.sweep.local import Submission

    chosen, variables = _sbatch_choices(options)
    if not options.slurm and (chosen or variables or options.at_once or options.yes):
        raise UserError("options of SLURM have no effect without --slurm; add it, or remove them")
    if options.slurm and options.ranks:
        raise UserError(f"--ranks {options.ranks} is for this machine; with --slurm use --nodes and --gpus-per-node")
    jobs = Submission(chosen, variables, options.at_once, options.yes)
    how = jobs if options.slurm else options.ranks or default_ranks()
    return sweep(options.recipe, options.overrides, options.out, options.print, how)


def _status(options: argparse.Namespace) -> int:
    from karat_scale.commands.status.status import show_status

    return show_status(options.run_dir, options.once)

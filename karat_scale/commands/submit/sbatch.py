"""`karat submit`: fill in a recipe's sbatch script, show it, and submit it after confirmation."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from karat_scale.commands.submit.within_job import most_nodes
from karat_scale.data.plan import micro_batch_of
from karat_scale.data.shards.shard_format import absolute_path, dataset_directory
from karat_scale.engine.deepspeed_config import check_ds_config
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.files import shipped_directory, write_atomically
from karat_scale.foundation.machine import known_gpu
from karat_scale.recipe import Recipe
from karat_scale.recipe.files import shipped_recipes
from karat_scale.recipe.loading import flatten, load_recipe

SCRIPT = "imagenet_fourier_karat.sh"


def slurm_home() -> Path:
    """The directory that holds `slurm/`."""
    return shipped_directory("slurm").parent


@dataclass(frozen=True)
class Job:
    """How a job is submitted.

    options: the options of sbatch, by their long names. settings: the variables of the script, such as VENV. at_once:
    the largest number of an array's elements that run at a time.
    """

    options: Mapping[str, str]
    settings: Mapping[str, str]
    decision: Literal["ask", "yes", "print"]
    at_once: int | None = None

    def script(
        self, name: str, options: Mapping[str, str], settings: Mapping[str, str], overrides: Sequence[str]
    ) -> str:
        """Return a script that runs one of slurm/ with these settings and overrides. The job's own take precedence.

        Anything else is as in that script, or as in the environment.
        """
        directives = {**_directives(name), **options, **self.options}
        spares = {}
        if count := spare_nodes(name):
            directives["no-kill"], spares = "", {"SPARES": str(count)}  # else SLURM ends a job that loses a node
        environment = {} if {"VENV", "CONDA_ENV", "CONTAINER"} & self.settings.keys() else _this_environment()
        chosen = {**environment, **self.settings}
        if {"VENV", "CONDA_ENV"} & chosen.keys():  # the other may be set where sbatch runs
            chosen = {"VENV": "", "CONDA_ENV": "", **chosen}
        filled = {"KARAT_HOME": str(slurm_home()), **settings, **spares, **chosen}
        lines = ["#!/usr/bin/env bash", "# Written by karat. To resume after a failure, submit it again.", ""]
        for key, value in directives.items():
            quoted = f'"{value}"' if " " in value else value  # sbatch splits a line at other blanks
            lines.append(f"#SBATCH --{key}={quoted}" if value else f"#SBATCH --{key}")
        if unset := [key for key in ("account", "partition") if key not in self.options]:
            lines += ["# Many sites need an account and a partition. Remove one # from a line to set it:"]
            lines += [f"##SBATCH --{key}=" for key in unset]
        lines += ["", *(f"{key}={shlex.quote(value)}" for key, value in filled.items())]
        lines += [f"set -- {shlex.join(overrides)}".rstrip(), f'source "$KARAT_HOME/slurm/{name}"']
        return "\n".join(lines) + "\n"

    def submit(self, script: Path, text: str, files: Mapping[Path, str], refused: str) -> str | None:
        """Show the script and, unless it is only shown, write it and other files, and submit it if the user agrees.

        refused: the option that the error names if a file cannot be written, such as `--out DIR`. Returns the number of
        the job if it was submitted.
        """
        print(text, end="" if self.decision == "print" else "\n")
        if self.decision == "print":
            return None
        try:
            for path, content in {**files, script: text}.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
        except OSError as error:
            raise UserError(f"{refused}: {error.strerror}; choose another {refused.partition(' ')[0]}") from None
        is_asked = self.decision == "ask" and sys.stdin.isatty()
        if self.decision == "yes" or (is_asked and _is_agreed()):
            return sbatch(script)
        print(f"not submitted; when you want to: sbatch {script}")
        return None


def _is_agreed() -> bool:
    """Ask on the terminal; Ctrl-D is a no."""
    try:
        return input("submit this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def submit(recipe: str, overrides: Sequence[str], job: Job, gpu: str | None) -> int:
    """Write RUN/submit.sh, show it, and submit it if the user has said yes or agrees on the terminal.

    Args:
        recipe: a shipped recipe's name or the path of a YAML file.
        overrides: `key=value` of the recipe.
        gpu: the kind of GPU to plan for. Stage and micro batch are then the plan's, unless `overrides` set them.

    Raises:
        UserError: the recipe is wrong, or sbatch refuses it or is not installed here.
    """
    resolved = load_recipe(recipe, overrides)
    check_ds_config(resolved)
    run = Path(resolved.run.dir).expanduser().absolute()
    directory = dataset_directory(resolved.data.path)
    kept = [override for override in overrides if not override.startswith(("run.dir=", "data.path="))]
    filled = {
        "RECIPE": recipe if recipe in shipped_recipes() else str(Path(recipe).resolve()),
        "SHARDS": absolute_path(resolved.data.path),
        "RUN": str(run),
    }
    asked = {**_directives(SCRIPT), **job.options}
    most, on_a_node = int(asked["nodes"].rpartition("-")[2]), int(asked["ntasks-per-node"])  # the script may say 1-4
    nodes = most - spare_nodes(SCRIPT)
    if nodes < 1:
        raise UserError(f"SPARES = {most - nodes} leaves none of --nodes={most} to train on; set fewer SPARES")
    taken = most_nodes(resolved, nodes, on_a_node)  # as launch.sh chooses
    if taken < nodes:
        said = f"note: takes {taken} of {nodes} nodes; train.global_batch does not divide over the ranks of more"
        print(said, file=sys.stderr)
    with redirect_stdout(sys.stderr if job.decision == "print" else sys.stdout):
        kept += planned_overrides(resolved, overrides, taken * on_a_node, gpu)
    text = job.script(SCRIPT, {"job-name": resolved.run.name, "output": str(run / "%x-%j.out")}, filled, kept)
    if resolved.data.row.files is not None and isinstance(directory, Path) and not directory.exists():
        print(f"note: data.path = {resolved.data.path} is not on this machine; the job needs it", file=sys.stderr)
    if job.decision == "print" and not run.is_dir():
        needed = f"mkdir -p {shlex.quote(str(run))}"
        print(f"note: without this, SLURM cannot write the job's output: {needed}", file=sys.stderr)
    if number := job.submit(run / "submit.sh", text, {}, f"run.dir = {run}"):
        print(f"job {number} is submitted; see it with: karat status {run}")
    return 0


def _directives(name: str) -> dict[str, str]:
    """Return the options of sbatch that a script of slurm/ has."""
    text = (slurm_home() / "slurm" / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^#SBATCH --([^=\n]*)=?(.*)", text, re.MULTILINE))


def spare_nodes(name: str) -> int:
    """Return SPARES, which a script of slurm/ takes from the environment or has a default for. Raises UserError."""
    texts = [(slurm_home() / "slurm" / file).read_text(encoding="utf-8") for file in (name, "launch.sh")]
    (default, *_) = re.findall(r"^[^#\n]*\bSPARES:?=(?:\"?\$\{SPARES:-)?(\d+)", "\n".join(texts), re.MULTILINE)
    spares = os.environ.get("SPARES") or default
    if not spares.isdecimal():
        raise UserError(f"SPARES = {spares}: should be a whole number")
    return int(spares)


def _this_environment() -> dict[str, str]:
    """Return the setting that activates the virtual or conda environment that karat runs in; none outside of one."""
    if (Path(sys.prefix) / "bin" / "activate").is_file() and sys.prefix != sys.base_prefix:
        return {"VENV": sys.prefix}
    return {"CONDA_ENV": sys.prefix} if (Path(sys.prefix) / "conda-meta").is_dir() else {}


def sbatch(script: Path) -> str:
    """Submit a script and return the number of the job. Raises UserError with what sbatch says."""
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except OSError:
        raise UserError(f"sbatch is not installed on this machine; on the cluster, run: sbatch {script}") from None
    if done.returncode:
        lines = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if "error" in line]
        raise UserError(f"sbatch refused {script}: {'; '.join(lines) or done.stderr}")
    return done.stdout.strip().partition(";")[0]


def planned_overrides(recipe: Recipe, overrides: Sequence[str], ranks: int, gpu: str | None) -> list[str]:
    """Return overrides that make `recipe` fit `ranks` GPUs of the kind `gpu`, and print a line about them.

    Keys in `overrides` are not changed. Without the name of a GPU there are no overrides, and the line says so.

    Raises:
        UserError: the GPU is unknown, the recipe does not divide over the ranks, or its model cannot be built.
    """
    if gpu is None:
        micro_batch_of(recipe, ranks)
        print("not planned: name the GPU with --gpu, such as h100-80; karat plan --memory GB plans for any GPU\n")
        return []
    memory = known_gpu(gpu).memory_bytes
    from karat_scale.commands.plan.memory import STAGES, Machine, choose
    from karat_scale.commands.plan.report import line

    if recipe.attention.transfer_from:
        raise UserError("--gpu: a teacher's memory is not known; leave --gpu out, and set train.micro_batch")
    named = {override.partition("=")[0] for override in overrides}
    own = recipe.deepspeed.config
    configs = (own,) if "deepspeed.config" in named or own not in STAGES else STAGES
    choice = choose(recipe, Machine(ranks, memory, True), configs)
    print(f"{line(choice, recipe)}\n")
    if not choice.fits:
        return []
    chosen: Mapping[str, object] = {
        "deepspeed.config": choice.config,
        "train.micro_batch": choice.micro_batch,
        "train.recompute.policy": choice.recompute,
        "train.eval_batch": choice.eval_batch,
    }
    there = flatten(recipe)
    return [f"{key}={value}" for key, value in chosen.items() if key not in named and value != there[key]]

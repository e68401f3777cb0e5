"""`karat submit`: fill in a recipe's sbatch script, show it, and submit it after confirmation."""

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

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


def submit(
    recipe: str,
    overrides: Sequence[str],
    options: Mapping[str, str],
    settings: Mapping[str, str],
    decision: Literal["ask", "yes", "print"],
    gpu: str | None = None,
) -> int:
    """Write RUN/submit.sh, show it, and submit it if the user has said yes or agrees on the terminal.

    Args:
        recipe: a shipped recipe's name or the path of a YAML file.
        overrides: `key=value` of the recipe.
        options: of sbatch, by their long names.
        settings: variables at the top of the script, such as VENV.
        decision: ask, do not ask, or only show the script and write nothing.
        gpu: the kind of GPU to plan for. Stage and micro batch are then the plan's, unless `overrides` set them.

    Raises:
        UserError: the recipe is wrong, or sbatch refuses it or is not installed here.
    """
    resolved = load_recipe(recipe, overrides)
    check_ds_config(resolved)
    run = Path(resolved.run.dir).expanduser().absolute()
    named = recipe if recipe in shipped_recipes() else str(Path(recipe).resolve())
    own, directory = ("run.dir=", "data.path="), dataset_directory(resolved.data.path)
    kept = [override for override in overrides if not override.startswith(own)]
    filled = {
        "KARAT_HOME": str(slurm_home()),
        "RECIPE": named,
        "SHARDS": absolute_path(resolved.data.path),
        "RUN": str(run),
        **with_environment(settings),
    }
    template = (slurm_home() / "slurm" / SCRIPT).read_text(encoding="utf-8")
    with redirect_stdout(sys.stderr if decision == "print" else sys.stdout):
        kept += planned_overrides(resolved, overrides, _ranks(template, options), gpu)
    script = run / "submit.sh"
    output = {"job-name": resolved.run.name, "output": str(run / "%x-%j.out")}
    text = fill(template, {**output, **options}, filled, kept)
    print(text, end="" if decision == "print" else "\n")
    if resolved.data.row.files is not None and isinstance(directory, Path) and not directory.exists():
        print(f"note: data.path = {resolved.data.path} is not on this machine; the job needs it", file=sys.stderr)
    if decision == "print":
        if not run.is_dir():
            print(
                f"note: without this, SLURM cannot write the job's output: mkdir -p {shlex.quote(str(run))}",
                file=sys.stderr,
            )
        return 0
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(script, text)
    except OSError as error:
        raise UserError(f"run.dir = {run}: {error.strerror}; choose another run.dir") from None
    if not (decision == "yes" or agrees()):
        print(f"not submitted; when you want to: sbatch {script}")
        return 0
    print(f"job {sbatch(script)} is submitted; see it with: karat status {run}")
    return 0


def with_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return a script's settings with the environment that karat runs in, unless they name another one."""
    if {"VENV", "CONDA_ENV", "CONTAINER"} & settings.keys():
        return dict(settings)
    return {**_this_environment(), **settings}


def _this_environment() -> dict[str, str]:
    """Return the setting that activates the virtual or conda environment that karat runs in; none outside of one."""
    if (Path(sys.prefix) / "bin" / "activate").is_file() and sys.prefix != sys.base_prefix:
        return {"VENV": sys.prefix}
    return {"CONDA_ENV": sys.prefix} if (Path(sys.prefix) / "conda-meta").is_dir() else {}


def fill(template: str, options: Mapping[str, str], settings: Mapping[str, str], overrides: Sequence[str]) -> str:
    """Return a shipped script with its #SBATCH lines, settings and overrides replaced, and without advice on them."""
    shebang, *written = template.splitlines()
    lines = [shebang, "# Written by karat. To resume after a failure, submit it again."]
    left = dict(options)
    advice = [number for number, line in enumerate(written) if line.startswith("# ")]
    sites = next(number for number in advice if "Many sites need" in written[number])
    dropped = {number for number in advice if number < written.index("")}
    dropped |= {sites} if {"account", "partition"} <= options.keys() else set()
    for line in (line for number, line in enumerate(written) if number not in dropped and line != "#"):
        option = re.match(r"##?SBATCH --([a-z-]+)=", line)
        setting = re.match(r"([A-Z_]+)=\$\{\1:-.*?\}(\s+#.*)?$", line)
        if option and option[1] in left:
            lines.append(_directive(option[1], left.pop(option[1])))
        elif setting and setting[1] in settings:
            lines.append(f"{setting[1]}={shlex.quote(settings[setting[1]])}")
        elif re.match(r"KARAT_HOME=", line) and "KARAT_HOME" in settings:
            lines.append(f"KARAT_HOME={shlex.quote(settings['KARAT_HOME'])}")
        else:
            lines.append(line.replace('"$@"', " ".join(map(shlex.quote, overrides))).rstrip())
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    lines[last + 1 : last + 1] = [_directive(name, value) for name, value in left.items()]
    return "\n".join(lines) + "\n"


def _ranks(template: str, options: Mapping[str, str]) -> int:
    """Return the number of ranks of a job with these options of sbatch; the script has the defaults."""
    of_script = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\d+)$", template, flags=re.MULTILINE))
    asked = {**of_script, **options}
    return int(asked["nodes"]) * int(asked["ntasks-per-node"])


def _directive(name: str, value: str) -> str:
    """Quote an option: sbatch splits a line at blanks, except within double quotes."""
    return f'#SBATCH --{name}="{value}"' if " " in value else f"#SBATCH --{name}={value}"


def agrees() -> bool:
    """Ask on the terminal; False where there is none."""
    if not sys.stdin.isatty():
        return False
    return input("submit this? [y/N] ").strip().lower() in ("y", "yes")


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
        print("not planned: name the GPU with --gpu, such as h100-80; karat plan --memory GB plans for any GPU\n")
        return []
    memory = known_gpu(gpu).memory_bytes
    from karat_scale.commands.plan.choose import STAGES, Machine, choose
    from karat_scale.commands.plan.report import line

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

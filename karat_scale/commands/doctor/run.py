"""`karat doctor`: check the machine and, with a recipe, time the stages of its training."""

import os
from collections.abc import Sequence

from karat_scale.commands.doctor.gpus import examine_gpus
from karat_scale.commands.doctor.report import Finding, Printer, Report, examine
from karat_scale.commands.doctor.resources import examine_resources
from karat_scale.commands.doctor.runnable import examine_attention, examine_decoders
from karat_scale.commands.doctor.software import examine_extras, examine_libraries, examine_python
from karat_scale.foundation.errors import UserError


def doctor(recipe: str | None, overrides: Sequence[str], seconds: float, json_file: str | None) -> int:
    """Report on this machine, and on the recipe if one is given; returns 0, or 1 if there is a problem.

    `seconds` is about how long the stages of a recipe are timed. Under torchrun or srun, every rank takes part, and
    rank 0 reports on its own node.

    Raises:
        UserError: the recipe is wrong, or the JSON file cannot be written.
    """
    if recipe is not None and "=" in recipe:
        raise UserError(f"{recipe!r} is an override; name the recipe before it: karat doctor RECIPE {recipe}")
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    report = Report(Printer(is_main))
    try:
        if recipe is None:
            _machine(report, is_main)
        else:
            _with_recipe(recipe, overrides, seconds, report, is_main)
    except KeyboardInterrupt:
        report.printer.line("\ninterrupted")
        return 1
    report.conclude()
    if json_file and is_main:
        report.write(json_file)
    return report.exit_code


def _machine(report: Report, is_main: bool) -> None:
    if is_main:
        report.add("machine", "machine", examine_machine())


def _with_recipe(recipe: str, overrides: Sequence[str], seconds: float, report: Report, is_main: bool) -> None:
    try:  # without a recipe, none of these is needed
        from karat_scale.recipe.loading import load_recipe

        loaded = load_recipe(recipe, overrides)
        from karat_scale.commands.doctor.checkup import check_up
    except ImportError as error:
        _machine(report, is_main)
        reason = f"cannot be examined while a library is missing: {error}"
        report.add("recipe", f"recipe {recipe}", [Finding("recipe", "problem", reason)])
        return
    check_up(loaded, seconds, report, lambda: _machine(report, is_main))


def examine_machine() -> list[Finding]:
    """Yield the findings about software, GPUs and resources. Raises nothing, whatever is missing."""
    examinations = {
        "python": examine_python,
        "libraries": examine_libraries,
        "extras": examine_extras,
        "decoders": examine_decoders,
        "attention": examine_attention,
        "GPU": examine_gpus,
        "resources": examine_resources,
    }
    return [finding for name, examination in examinations.items() for finding in examine(name, examination)]

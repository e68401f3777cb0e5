"""`karat doctor`: checks the machine and, with a recipe, whether that fits, what limits its speed, and what to change.

Only the check of a recipe imports what training needs.
"""

import os
from collections.abc import Sequence

from karat_scale.commands.doctor.machine import examine_machine
from karat_scale.commands.doctor.report import Finding, Report
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
    report = Report(is_main=os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0")

    def examine_this_machine() -> None:
        if report.is_main:
            report.add("machine", "machine", examine_machine())

    try:
        if recipe is None:
            examine_this_machine()
        else:
            try:  # without a recipe, none of these is needed
                from karat_scale.recipe.loading import load_recipe

                loaded = load_recipe(recipe, overrides)  # before torch is imported
                from karat_scale.commands.doctor.recipe import check_up
            except ImportError as error:
                examine_this_machine()
                reason = f"cannot be examined while a library is missing: {error}"
                report.add("recipe", f"recipe {recipe}", [Finding("recipe", "problem", reason)])
            else:
                check_up(loaded, seconds, report, examine_this_machine)
    except KeyboardInterrupt:
        report.line("\ninterrupted")
        return 1
    return report.conclude(json_file)

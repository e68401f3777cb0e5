"""`karat doctor`: examine the machine, then with a recipe time what its training is made of."""

from collections.abc import Sequence
from pathlib import Path

from karat_scale.doctor.machine import examine_machine
from karat_scale.doctor.report import Report, choose_voice
from karat_scale.errors import UserError


def doctor(recipe: str | None, overrides: Sequence[str], seconds: float, json_file: str | None) -> int:
    """Report on this machine, and on the recipe if one is named; returns 0 or, where there is a problem, 1.

    Raises:
        UserError: the recipe is wrong, or the JSON file cannot be written.
    """
    if json_file and not Path(json_file).absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: no such directory; name a file in a directory that is there")
    if recipe is not None and "=" in recipe:
        raise UserError(f"{recipe!r} is an override; name the recipe before it: karat doctor RECIPE {recipe}")
    if recipe is not None:
        from karat_scale.recipe_io import load_recipe  # a machine alone is examined without pydantic

        load_recipe(recipe, overrides)
    report = Report(choose_voice())
    report.add("machine", "machine", examine_machine())
    report.conclude()
    if json_file:
        report.write(Path(json_file))
    return report.exit_code

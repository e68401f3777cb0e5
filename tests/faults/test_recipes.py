"""Any file given as a recipe is shown, or refused by a line for each mistake, in seconds and without a traceback."""

import io
import random
import re
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import MOST_MISTAKES
from karat_scale.training.tasks.detection.recipe import DetectionRecipe
from tests.conftest import karat_here
from tests.faults.conftest import TooLongError, no_longer_than
from tests.faults.grammar import Grammar

SECONDS = 60.0  # most take milliseconds; a large one on a busy machine takes more
COMMANDS = {"train": Recipe, "detect": DetectionRecipe}
# Characters that a terminal acts on.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def tried(command: str, recipe: Path, overrides: list[str]) -> tuple[int, str]:
    """Run `karat COMMAND RECIPE OVERRIDES --print`; return its exit code, and what is wrong with how it ended."""
    # As Python opens them: printing to stderr never fails, and printing to stdout may fail.
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    try:
        with no_longer_than(SECONDS), redirect_stdout(out), redirect_stderr(err):
            code = karat_here(command, str(recipe), "--print", *overrides)
            out.flush()
    except TooLongError as error:
        return -1, str(error)
    except BaseException:
        return -1, traceback.format_exc(limit=-3)
    err.flush()
    lines = err.buffer.getvalue().decode().split("\n")[:-1]
    errors = [line for line in lines if not line.startswith("note: ")]
    if code not in (0, 2):
        return code, f"exit code {code}"
    if code == 2 and not (
        0 < len(errors) <= MOST_MISTAKES + 1 and all(line.partition("error: ")[2] for line in errors)
    ):
        return code, f"{len(errors)} lines: {errors[:3]}"
    if code == 0 and errors:
        return code, f"it says {errors[0]}"
    found = CONTROL.search("\n".join(lines))
    return code, f"control character {found[0]!r} in {lines}" if found else ""


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_random_recipe_is_one_line_or_valid(command, share, record, tmp_path):
    codes, problems = {0: 0, 2: 0, -1: 0}, {}
    count, file = share.of(150, 10_000), tmp_path / "recipe.yaml"
    for number in range(count):
        grammar = Grammar(COMMANDS[command], random.Random(f"{share.seed} {number}"))
        file.write_bytes(grammar.recipe())
        overrides = [grammar.override() for _ in range(number % 3)]
        code, problem = tried(command, file, overrides)
        codes[code] = codes.get(code, 0) + 1
        if problem:
            problems.setdefault(problem.strip().splitlines()[-1], (problem, file.read_bytes()[:600], overrides))
    record({"recipes": count, "valid": codes[0], "refused": codes[2], "problems": list(problems)})
    assert not problems, problems
    assert min(codes[0], codes[2]) > count // 50

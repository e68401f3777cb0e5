"""`karat doctor`: checks the machine and, with a recipe, whether that fits, what limits its speed, and what to change.

The check of the machine includes a trial of each part: each implementation of KArAt attends over a few tokens, and each
decoder reads a JPEG. Only the check of a recipe imports what training needs.
"""

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from karat_scale.commands.doctor.machine import (
    examine_extras,
    examine_gpus,
    examine_libraries,
    examine_python,
    examine_resources,
)
from karat_scale.commands.doctor.report import Finding, Report, examine, found
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.tables import DECODERS

SIDE = 32
BATCH, HEADS, TOKENS, WIDTH, RANK, GRID = 1, 1, 16, 16, 4, 2


def examine_attention() -> Iterator[Finding]:
    """Yield one finding per implementation: it runs, gradient included, or the reason why not."""
    import torch

    from karat_scale.attention import fourier_karat_attention
    from karat_scale.attention.functional import AUTOMATIC, AUTOMATIC_ON_A_GPU, IMPLEMENTATIONS

    cuda, runs = torch.cuda.is_available(), []
    for name in IMPLEMENTATIONS:
        device = "cuda" if cuda and name != "cpu" else "cpu"
        shapes = [(BATCH, HEADS, TOKENS, WIDTH)] * 3 + [(HEADS, RANK, TOKENS, GRID)] * 2 + [(HEADS, TOKENS, RANK)]
        begun, refusal = time.perf_counter(), ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a failed build warns, and then raises the same as an error
                tensors = [torch.randn(*shape, device=device, requires_grad=True) for shape in shapes]
                fourier_karat_attention(*tensors, implementation=name).sum().backward()
            runs.append(name)
        except ValueError as error:
            refusal = str(error).partition("cannot take this call: ")[2] or str(error)
        except Exception as error:  # a kernel that does not compile or launch
            refusal = f"{type(error).__name__}: {' '.join(str(error).split())}"
        figures: dict[str, Any] = {
            "runs": not refusal,
            "device": device,
            "seconds": round(time.perf_counter() - begun, 3),
        }
        if not refusal:
            yield found(f"attention {name}", f"runs on {device}", **figures)
        else:
            fix = "" if name == "triton" and not cuda else "auto uses another one; if a recipe names it, it is refused"
            yield Finding(f"attention {name}", "note", f"cannot run: {refusal}", fix, figures)
    chosen = next(name for name in (AUTOMATIC_ON_A_GPU if cuda else AUTOMATIC) if name in runs)
    yield found("attention auto", f"uses {chosen}", chosen=chosen)


def examine_decoders() -> Iterator[Finding]:
    """Yield one finding per decoder of the folder and webdataset backends: it reads a JPEG, or the reason why not."""
    from karat_scale.data.decoders import make_decoder
    from karat_scale.data.decoders.decode import blank_jpeg, crop_view
    from karat_scale.recipe import DataConfig

    runs = []
    for name in DECODERS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a failed build warns, and then raises the same as an error
                decoder = make_decoder(DataConfig.model_validate({"path": "-", "decoder": name}), "bicubic")
            decoder.read(blank_jpeg(SIDE), lambda width, height: crop_view((0, 0, width, height), SIDE // 2))
        except Exception as error:  # any error of a broken library
            reason = " ".join(str(error).split()).removeprefix(f"data.decoder = {name} cannot run: ")
            yield found(f"decoder {name}", "cannot run", reason, runs=False)
        else:
            runs.append(name)
            yield found(f"decoder {name}", "runs", runs=True)
    if runs:
        yield found("decoder auto", f"uses {runs[0]}", chosen=runs[0])


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
    report = Report(is_main)

    def examine_this_machine() -> None:
        if is_main:
            report.add("machine", "machine", examine_machine())

    try:
        if recipe is None:
            examine_this_machine()
        else:
            try:  # without a recipe, none of these is needed
                from karat_scale.commands.doctor.recipe import check_up
                from karat_scale.recipe.loading import load_recipe

                loaded = load_recipe(recipe, overrides)
            except ImportError as error:
                examine_this_machine()
                reason = f"cannot be examined while a library is missing: {error}"
                report.add("recipe", f"recipe {recipe}", [Finding("recipe", "problem", reason)])
            else:
                check_up(loaded, seconds, report, examine_this_machine)
    except KeyboardInterrupt:
        report.line("\ninterrupted")
        return 1
    report.conclude()
    if json_file and is_main:
        report.write(json_file)
    return report.exit_code


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

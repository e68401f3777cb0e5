"""`karat doctor`: checks the machine and, with a recipe, whether that fits, what limits its speed, and what to change.

The check of the machine includes a trial of each part: each implementation of KArAt attends over a few tokens, and each
decoder reads a JPEG.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from karat_scale.commands.doctor import fit
from karat_scale.commands.doctor.device_speed import examine_extras, examine_gpus, examine_libraries, examine_python
from karat_scale.commands.doctor.fit import Subject
from karat_scale.commands.doctor.report import Finding, Printer, Report, Row, Verdict, examine, found, judge
from karat_scale.commands.doctor.storage import examine_resources
from karat_scale.commands.doctor.timed_run import Figures, setting_of, time_recipe
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.plan import micro_batch_of
from karat_scale.engine import distributed
from karat_scale.engine.deepspeed_config import load_ds_config
from karat_scale.engine.distributed import World
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.tables import DECODERS
from karat_scale.models import parameter_count
from karat_scale.recipe import Recipe
from karat_scale.training.tasks.classification.distillation_teacher import build_model, keep_teacher

MB = 1e6
# If the loop is slower than its slower side by this factor, the two sides hinder each other.
HINDERED = 0.8
# Two sides that are closer than this limit training together.
CLOSE = 1.25


def check_up(recipe: Recipe, seconds: float, report: Report, before: Callable[[], None]) -> None:
    """Examine and time a recipe. `before` is called once the recipe is known to be valid.

    Raises:
        UserError: the recipe is wrong or does not fit the world.
    """
    world = distributed.start(recipe.run.device)
    try:
        micro_batch = micro_batch_of(recipe, world.size)
        load_ds_config(recipe, world.size, micro_batch)
        with tempfile.TemporaryDirectory(prefix="karat-doctor-") as scratch:
            keep_teacher(recipe, Path(scratch))
            model = build_model(recipe, Path(scratch))
        subject = Subject(recipe, world, micro_batch, parameter_count(model))
        before()
        _examine(subject, report, partial(time_recipe, subject, model, seconds=seconds, printer=report.printer))
    finally:
        distributed.stop()


def _examine(subject: Subject, report: Report, measure: Callable[[int], Figures]) -> None:
    backend: Backend | None = None

    def data() -> Iterable[Finding]:
        nonlocal backend
        # Hashing all shards would take all of the available time.
        backend = open_backend(ImageSpec.of(subject.recipe.changed(data__verify="size")))
        yield from fit.examine_data(subject, backend)
        yield from fit.examine_batches(subject, backend)

    findings = _examined(subject.world, "data", data)
    others = {
        "workers": fit.examine_workers,
        "run.dir": fit.examine_run_directory,
        "checkpoint.url": fit.examine_checkpoint_url,
    }
    for name, examination in others.items():
        findings += examine(name, partial(examination, subject))
    report.add("recipe", f"recipe {subject.recipe.run.name}", findings)
    if backend is None or any(finding.name == "data" and finding.level == "problem" for finding in findings):
        return
    num_train = backend.num_train
    backend.close()

    verdict = _examined(subject.world, "timed run", lambda: _judge(subject, measure(num_train), report))
    report.add("verdict", "what bounds training", verdict)


def _examined(world: World, name: str, examination: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Examine like `examine`; but with several ranks, raise, since one rank must not continue while the others wait."""
    fix = "lower train.micro_batch, or set train.precision=bf16"
    if world.size > 1:
        with one_line_out_of_memory(lambda: fix):
            return list(examination())

    def with_fix() -> Iterable[Finding]:
        try:
            return list(examination())
        except torch.OutOfMemoryError:
            return [found(name, "the micro batch does not fit the GPU's memory", fix, wrong=True)]

    return examine(name, with_fix)


def _judge(subject: Subject, figures: Figures, report: Report) -> list[Finding]:
    """Show the stages; return the verdict and its notes."""
    setting = setting_of(subject, figures, _decoder_name(subject.recipe))
    verdict = judge(figures.rates, setting)
    report.figures = {
        **figures.to_json(),
        "bound": verdict.bound,
        "advice": verdict.advice,
        "data_images_per_second": round(verdict.data_rate, 2),
        "device_images_per_second": round(verdict.device_rate, 2),
    }
    report.printer.table("images per second of each stage by itself", ("stage", "img/s", ""), _rows(subject, figures))
    return [
        found("bound", f"{verdict.bound}: {verdict.reason}", verdict.advice),
        *_remarks(figures, verdict),
    ]


def _rows(subject: Subject, figures: Figures) -> list[Row]:
    data, recipe = figures.data, subject.recipe
    workers = f"in {plural(figures.workers, 'worker')}" if figures.workers else "in the trainer"
    details = {
        "decode": f"{workers}; {data.decode_one_core:,.0f} on one core",
        "augmentation": f"{workers}; {100 * (1 - data.decode_share):.0f} % of the data path",
        "transfer": f"normalised and mixed, {1000 * figures.transfer_seconds:.1f} ms for {figures.micro_batch} images",
        "model": f"forward + backward, {1000 * figures.model_seconds:,.0f} ms for {figures.micro_batch} images",
        "optimizer": f"{1000 * figures.optimizer_seconds:.1f} ms a step of {recipe.train.global_batch} images",
    }
    if figures.storage is not None:
        storage = figures.storage
        details["storage"] = (
            f"{storage.random / MB:,.0f} MB/s at random, {storage.sequential / MB:,.0f} in sequence, {storage.state}; "
            f"{storage.random_again / MB:,.0f} again"
        )
    if figures.communication is not None:
        exchange = figures.communication
        details["communication"] = f"all-reduce of {exchange.bytes / MB:,.0f} MB in {1000 * exchange.seconds:,.1f} ms"
    rows = [(stage, f"{rate:,.0f}", details[stage]) for stage, rate in figures.rates.items()]
    loop = figures.loop
    waits = f"{100 * loop.waiting_share:.0f} % of the time waits for data"
    batches = f"{plural(loop.steps, 'step')} of {figures.global_batch}; {waits}"
    return [*rows, ("the real loop", f"{loop.images_per_second:,.0f}", batches)]


def _remarks(figures: Figures, verdict: Verdict) -> Iterable[Finding]:
    loop = figures.loop
    if loop.unreadable:
        yield found("samples", f"{loop.unreadable} could not be decoded", "data_prep/verify.py lists them")
    wanted = figures.recipe.train.global_batch
    if figures.global_batch != wanted:
        yield found("timed batch", f"{figures.global_batch} instead of {wanted}, to save time; see --seconds")
    slower, faster = sorted((verdict.data_rate, verdict.device_rate))
    if figures.workers and faster < CLOSE * slower:
        text = f"data makes {verdict.data_rate:,.0f} img/s and the trainer takes {verdict.device_rate:,.0f}"
        yield found("close", text, "to gain much, change both; --seconds measures for longer")
    if figures.workers and figures.global_batch == wanted and loop.images_per_second < HINDERED * slower:
        text = f"the loop makes {loop.images_per_second:,.0f} img/s, and its slower side by itself makes {slower:,.0f}"
        yield found(
            "together",
            text,
            "data workers, the trainer and other processes hinder each other: they share cores and memory",
        )
    storage = figures.rates.get("storage")
    if storage is not None and storage < slower and verdict.bound != "storage":
        text = f"the first epoch reads {storage:,.0f} img/s from the disk, less than the {slower:,.0f} of what follows"
        yield found("first epoch", text, "copy the data to a local disk: data_prep/stage.py")


def _decoder_name(recipe: Recipe) -> str:
    if recipe.data.row.own_decoder or recipe.data.row.files is None:
        return ""
    from karat_scale.data.decoders import make_decoder

    return make_decoder(recipe.data, recipe.augment.interpolation).name


SIDE = 32
BATCH, HEADS, TOKENS, WIDTH, RANK, GRID = 1, 1, 16, 16, 4, 2


def examine_attention() -> Iterator[Finding]:
    """Yield one finding per implementation: it runs, or the reason why not."""
    import torch

    from karat_scale.attention.functional import AUTOMATIC, IMPLEMENTATIONS

    cuda = torch.cuda.is_available()
    runs = []
    for name in IMPLEMENTATIONS:
        device = "cuda" if cuda and name != "cpu" else "cpu"
        begun = time.perf_counter()
        refusal = _attention_refusal(name, device)
        seconds = time.perf_counter() - begun
        if refusal is None:
            runs.append(name)
            yield found(f"attention {name}", f"runs on {device}", runs=True, device=device, seconds=round(seconds, 3))
        else:
            fix = "" if name == "triton" and not cuda else "auto uses another one; if a recipe names it, it is refused"
            yield Finding(
                f"attention {name}",
                "note",
                f"cannot run: {refusal}",
                fix,
                {"runs": False, "device": device, "seconds": round(seconds, 3)},
            )
    chosen = next(name for name in AUTOMATIC if name in runs and (name != "cpu" or not cuda))
    yield found("attention auto", f"uses {chosen}", chosen=chosen)


def _attention_refusal(implementation: str, device: str) -> str | None:
    """Return the reason why the implementation cannot attend, or None if it can, including its gradient."""
    import torch

    from karat_scale.attention import fourier_karat_attention

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device=device, requires_grad=True)

    query, key, value = (random(BATCH, HEADS, TOKENS, WIDTH) for _ in range(3))
    cos_coef, sin_coef = (random(HEADS, RANK, TOKENS, GRID) for _ in range(2))
    proj = random(HEADS, TOKENS, RANK)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a failed build warns, and then raises the same as an error
            output = fourier_karat_attention(query, key, value, cos_coef, sin_coef, proj, implementation=implementation)
            output.sum().backward()
    except ValueError as error:
        return str(error).partition("cannot take this call: ")[2] or str(error)
    except Exception as error:  # a kernel that does not compile or launch
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def examine_decoders() -> Iterator[Finding]:
    """Yield one finding per decoder of the folder and webdataset backends: it runs, or the reason why not."""
    runs = []
    for name in DECODERS:
        refusal = _decoder_refusal(name)
        if refusal is None:
            runs.append(name)
            yield found(f"decoder {name}", "runs", runs=True)
        else:
            yield found(f"decoder {name}", "cannot run", refusal, runs=False)
    if runs:
        yield found("decoder auto", f"uses {runs[0]}", chosen=runs[0])


def _decoder_refusal(name: str) -> str | None:
    """Return the reason why the decoder cannot read a JPEG, or None if it can."""
    from karat_scale.data.decoders import make_decoder
    from karat_scale.data.decoders.decode import blank_jpeg, crop_view
    from karat_scale.recipe import DataConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a failed build warns, and then raises the same as an error
            decoder = make_decoder(DataConfig.model_validate({"path": "-", "decoder": name}), "bicubic")
        decoder.read(blank_jpeg(SIDE), lambda width, height: crop_view((0, 0, width, height), SIDE // 2))
    except Exception as error:  # any error of a broken library
        return " ".join(str(error).split()).removeprefix(f"data.decoder = {name} cannot run: ")
    return None


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

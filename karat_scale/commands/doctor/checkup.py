"""The part of the report about the recipe: does it fit, what limits its speed, what to change first."""

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from karat_scale.commands.doctor import fit
from karat_scale.commands.doctor.fit import Subject
from karat_scale.commands.doctor.report import Finding, Report, Row, examine, found
from karat_scale.commands.doctor.timed_run import Figures, setting_of, time_recipe
from karat_scale.commands.doctor.verdict import Verdict, judge
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.plan import micro_batch_of
from karat_scale.engine import distributed
from karat_scale.engine.deepspeed_config import load_ds_config
from karat_scale.engine.distributed import World
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.foundation.console import plural
from karat_scale.models import parameter_count
from karat_scale.recipe import Recipe
from karat_scale.training.tasks.classification.teacher import build_model, keep_teacher

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

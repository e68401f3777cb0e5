"""The conversion of a trained model before the first step of a run with `convert.images`, and the survey.

The model begins with the weights of `init_from`, but the attention of its blocks is new. From training images, each
block learns to reproduce the output of the original's attention, all blocks at once. This matching depends only on
recipe, data and initial weights: a run that is killed during it repeats it with the same bits. RUN/matched.safetensors
keeps the result until the run has a checkpoint, and the report on it for good. Then training continues as usual.

The ranks share the blocks, and each reads all the images.
"""

import itertools
import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from karat_scale.checkpoint.tensor_storage import read_metadata
from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.backends import Backend, ImageSpec
from karat_scale.data.exact import ExactLoader
from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.engine import distributed
from karat_scale.engine.distributed import wait_for
from karat_scale.engine.engine import PRECISIONS, allow_tf32
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.engine.reporting.progress import Reporter, choose_display
from karat_scale.foundation.console import plural, print_table
from karat_scale.foundation.errors import EXIT_STOPPED, RunDirectoryError, UserError
from karat_scale.foundation.files import parse_json, read_text, replace_file
from karat_scale.models import create_model
from karat_scale.models.init_from import OPERATOR, take_weights
from karat_scale.models.layers import attention_layers
from karat_scale.models.matching import Conversion, descend, errors, solve
from karat_scale.models.transfer import weights_digest
from karat_scale.recipe import AttentionConfig, Recipe
from karat_scale.recipe.base import Effect
from karat_scale.recipe.loading import dump_recipe, effects, flatten
from karat_scale.training.agreement import Agreement, StoppedError, StopSignals
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.task import Task
from karat_scale.training.trainer import starting_model
from karat_scale.training.weights_file import write_model

FILE = "matched.safetensors"
SURVEY = "survey.json"
SURVEYED = "survey.yaml"  # its recipe, as RUN/recipe.yaml would mean that a run has begun
# Numbers of images: in a step of gradient descent, for least squares, for the report's errors, for the survey's timing.
BATCH, SOLVED, MEASURED, TIMED = 64, 500, 256, 16
# Losses of accuracy, in points of top-1, for which the survey proposes what to convert.
LOSSES = (0.5, 1.0, 2.0, 5.0)
REPORTS = 10  # lines on a descent
REPEATS = 3  # of each timing

Report = dict[str, Any]


def take_original(model: nn.Module, recipe: Recipe, weights: Mapping[str, Tensor], attention: AttentionConfig) -> str:
    """Copy a trained model's weights into one with other attention, except the operators of blocks that differ.

    Args:
        attention: the trained model's attention.

    Returns:
        A line on what was not simply copied.
    """
    own, kept = model.state_dict(), dict(weights)
    for number, layer in enumerate(attention_layers(model)):
        if _function(recipe.attention.of_block(number)) != _function(attention.of_block(number)):
            prefix = f"{layer.name}{OPERATOR}"
            kept = {name: tensor for name, tensor in kept.items() if not name.startswith(prefix)}
            if attention.learns:
                kept |= {name: tensor for name, tensor in own.items() if name.startswith(prefix)}
    return take_weights(model, kept)


def _function(section: AttentionConfig) -> dict[str, Any]:
    """Return the keys of a block's section on which its attention depends, given the parameters."""
    return section.model_dump(include=section.keys_in_use - {"init", "implementation"})


def begin_conversion(
    model: nn.Module, recipe: Recipe, weights: Mapping[str, Tensor], attention: AttentionConfig
) -> Conversion:
    """Return a model's conversion: every block whose new attention is learned and differs from the original's.

    Raises UserError if there is none, or if a block's learned attention would become softmax, which learns nothing.
    """
    theirs: nn.Module | None = None
    if attention.learns:
        theirs = create_model(recipe.model, attention.changed(implementation="auto"))  # this device may lack theirs
        take_weights(theirs, weights)
    elif any(OPERATOR in name for name in weights):
        raise UserError(
            "its attention is learned, but it does not say by which recipe; use the run itself, or a file of `karat "
            "export`"
        )
    originals: dict[int, nn.Module | None] = {}
    for number, layer in enumerate(attention_layers(model)):
        own, section = recipe.attention.of_block(number), attention.of_block(number)
        operator = None if theirs is None else getattr(attention_layers(theirs)[number].attention, "operator", None)
        learns = hasattr(layer.attention, "operator")
        if operator is not None and not learns:
            raise UserError(
                f"its block {number} has attention.kind = {section.kind}, which cannot be "
                "converted to softmax; in attention.blocks, give this block a learned kind"
            )
        if learns and _function(own) != _function(section):
            originals[number] = operator
    if not originals:
        raise UserError("it has this attention already, so there is nothing to convert; set another attention.kind")
    return Conversion(model, originals)


def spread_ids(images: int) -> npt.NDArray[np.int64]:
    """Return at most MEASURED ids of a split, in batches: from all over it, because folders are sorted by class."""
    count = min(MEASURED, images)
    ids = np.full((math.ceil(count / BATCH), BATCH), PADDING)
    ids.flat[:count] = np.linspace(0, images - 1, count).round()
    return ids


class Stage:
    """The conversion before the first step, on one rank. Raises StoppedError if a signal asks to stop.

    Args:
        task: the task, with a `Recipe`; its images are those of `backend`.
    """

    report: Report
    from_softmax: bool
    """Whether all replaced attention was softmax."""

    def __init__(
        self, task: Task, backend: Backend, conversion: Conversion, directory: RunDirectory, signals: StopSignals
    ) -> None:
        self._task, self._backend, self._conversion, self._signals = task, backend, conversion, signals
        self._recipe: Any = task.recipe
        self._world, self._reporter = task.world, task.reporter
        self._path = directory.path / FILE
        self.from_softmax = all(original.operator is None for original in conversion.originals.values())
        self._agreement, self._beats = Agreement(task.world), itertools.count()

    def run(self) -> None:
        """Match the new attention with the original's, or take what an earlier start matched. Collective."""
        conversion, world = self._conversion, self._world
        allow_tf32(self._recipe.train.tf32)
        identity = self._identity()
        report = world.on_main(lambda: read_report(self._path.parent, identity))
        conversion.model.to(world.device).eval()
        new = nn.ModuleDict({str(number): heads for number, heads in conversion.new.items()})
        if report is None:
            world.on_main(lambda: _drop_survey_of_another(self._path.parent, self._recipe))
            report = self._match()
            facts = {"identity": identity, "report": json.dumps(report)}
            world.on_main(lambda: write_model(new, self._path, facts))
        # A finished descent is read back, too: so the weights do not depend on the ranks that made it.
        with world.together():
            new.load_state_dict(load_file(self._path))
        conversion.use(conversion.blocks)
        conversion.model.to("cpu").train()
        self.report = report
        self._reporter.event("convert", 0, told(report), report)

    def evaluate(self, blocks: Collection[int]) -> float:
        """Return top-1 on the validation split with the new attention in these blocks. Collective."""
        conversion = self._conversion
        conversion.use(blocks)
        conversion.model.eval()

        @torch.no_grad()
        def forward(images: Tensor) -> Tensor:
            logits: Tensor = conversion.model(images.float())
            return logits

        return float(self._task.evaluate(forward, self._on_batch).to_json()["top1"])

    def _match(self) -> Report:
        conversion, config, world = self._conversion, self._recipe.convert, self._world
        everything = conversion.blocks
        self._reporter.info("evaluating the original, and the unmatched new attention")
        top1 = {"original": self.evaluate(()), "at_once": self.evaluate(everything)}
        conversion.use(())
        mine = [group for number, group in enumerate(conversion.groups()) if number % world.size == world.rank]
        blocks = sorted(itertools.chain(*mine))
        count = min(config.images, self._task.num_train)
        states = {number: _copied(conversion.new[number]) for number in blocks}

        def keep_better(after: Mapping[int, list[float]]) -> None:
            for group in mine:
                if sum(sum(after[number]) for number in group) <= sum(sum(kept[number]) for number in group):
                    kept.update((number, after[number]) for number in group)
                    states.update((number, _copied(conversion.new[number])) for number in group)
                else:
                    conversion.new[group[0]].load_state_dict(states[group[0]])

        with world.together():
            ids = enumerate(spread_ids(self._backend.num_val))
            batches = self._backend.eval_batches(BatchSlice(0, number, of_batch) for number, of_batch in ids)
            normalize = Normalize(self._recipe.augment.mean, self._recipe.augment.std)
            feed = DeviceFeed(batches, world.device)
            shown = torch.cat([normalize(batch.images)[batch.valid] for batch in feed])
            found = {"at_once": errors(conversion, blocks, shown)}
            kept = dict(found["at_once"])
            solved = self._solve(mine, count) if config.rounds else []
            if solved:  # too few images fit any unknowns
                found["least_squares"] = errors(conversion, solved, shown)
                keep_better(kept | found["least_squares"])
        if config.steps:
            step = partial(self._on_step, config.steps)
            training = self._training_images(count, config.steps)
            descend(conversion, blocks, training, config.steps, config.rate, config.scores, step)
            keep_better(errors(conversion, blocks, shown))  # the rate may be too high
        found["matched"] = kept
        merged: dict[str, dict[int, list[float]]] = {}
        for their_states, theirs in world.gather((states, found)):
            for number, state in their_states.items():
                conversion.new[number].load_state_dict(state)
            for name, by_block in theirs.items():
                merged.setdefault(name, {}).update(by_block)
        top1["matched"] = self.evaluate(everything)
        return {
            "from": self._recipe.init_from,
            "images": count,
            "blocks": [
                {"block": number, **{name: by_block[number] for name, by_block in merged.items() if number in by_block}}
                for number in everything
            ],
            "top1": top1,
        }

    def _solve(self, groups: Sequence[Sequence[int]], count: int) -> list[int]:
        """Match groups of blocks by least squares; return the blocks whose attention is linear in its parameters."""
        conversion = self._conversion
        wanted = min(count, SOLVED)
        images = torch.cat([batch.cpu() for batch in self._training_images(count, -(-wanted // BATCH))])[:wanted]
        solved: list[int] = []
        for number, group in enumerate(groups, 1):
            self._reporter.info(f"matching the attention by least squares: {number} of {len(groups)}")
            calls = []
            for part in images.split(BATCH):
                found = conversion.calls(part.to(self._world.device), group)
                calls += [found[number] for number in group]
            if solve(conversion.new[group[0]], calls, self._recipe.convert.rounds):
                solved += group
            if self._world.size == 1:  # other ranks would not notice
                self._stop_if_asked(self._signals.received is not None)
            self._reporter.beat("matching")
        return solved

    def first_images(self) -> Tensor:
        """Return the first images of training, on the device."""
        return next(self._training_images(TIMED, 1))

    def _training_images(self, count: int, batches: int) -> Iterator[Tensor]:
        """Yield normalised batches of the first `count` images of the training order, again and again, without labels.

        Each time they are augmented anew, as in training, but not mixed.
        """
        backend, recipe = self._backend, self._recipe.changed(augment__mix_prob=0.0)
        plan = backend.plan(recipe.train.global_batch, recipe.train.global_batch, 0, 1)
        ids = plan.epoch_order(0)[:count]
        count = len(ids)
        size = min(BATCH, count)
        loader = ExactLoader.of(ImageSpec.of(recipe), plan, backend, self._world.device, torch.float32)

        def slices() -> Iterator[BatchSlice]:
            for number in range(batches):
                places = torch.arange(number * size, (number + 1) * size)
                yield BatchSlice(number * size // count, number, ids[(places % count).numpy()])

        feed = loader.feed(slices())
        for batch in feed:
            images = loader.finish(batch)[0]
            feed.fetch_ahead()
            yield images

    def _identity(self) -> str:
        """Return a digest of what the result depends on."""
        recipe, conversion = self._recipe, self._conversion
        effect_of, sections = effects(type(recipe)), ("convert", "model", "attention", "augment", "data")
        keys = {
            key: value
            for key, value in flatten(recipe).items()
            if key.partition(".")[0] in sections and effect_of[key] not in (Effect.NOTHING, Effect.SPEED)
        }
        weights = [weights_digest(one) for one in (*conversion.originals.values(), conversion.model)]
        images = self._task.train_identity, self._task.num_train, self._task.num_val
        text = json.dumps([keys, *images, recipe.run.seed, recipe.train.tf32, *weights])
        return sha256(text.encode()).hexdigest()

    def _on_step(self, steps: int, step: int) -> None:
        self._on_batch(step, steps)
        if step * REPORTS // steps != (step - 1) * REPORTS // steps:
            self._reporter.info(f"matching the attention: step {step} of {steps}")

    def _on_batch(self, done: int, total: int) -> None:
        self._reporter.beat("matching")
        agreed = self._agreement.maxima(next(self._beats), self._signals.received is not None)
        self._stop_if_asked(agreed is not None and bool(agreed[0]))

    def _stop_if_asked(self, asked: bool) -> None:
        if asked:
            stopped = StoppedError()
            stopped.saved = True  # there is no state to save yet: the next start does the same again
            raise stopped


def _copied(heads: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in heads.state_dict().items()}


def read_report(run: Path, identity: str | None = None) -> Report | None:
    """Return the report of a run that was converted; None for others, or if the file is damaged.

    `identity` is the digest of what the result depends on; None accepts any.
    """
    with suppress(OSError, SafetensorError, KeyError, ValueError):
        facts = read_metadata(run / FILE)
        if identity is None or facts["identity"] == identity:
            report: Report = parse_json(facts["report"])
            return report
    return None


def read_survey(run: Path) -> Report | None:
    """Return what `karat convert --survey` found in a run's directory, or None."""
    with suppress(OSError, ValueError):
        found: Report = parse_json(read_text(run / SURVEY))
        return found
    return None


def _drop_survey_of_another(run: Path, recipe: Recipe) -> None:
    """Remove the survey of another original or attention. Other blocks may be converted: a survey proposes them."""
    found = read_survey(run)
    if found is not None and (found["from"], found["attention"]) != (recipe.init_from, _surveyed_attention(recipe)):
        for name in (SURVEY, SURVEYED):
            (run / name).unlink(missing_ok=True)


def _surveyed_attention(recipe: Recipe) -> dict[str, Any]:
    return recipe.attention.model_dump(mode="json", exclude={"blocks", "implementation"})


def mean_error(block: Mapping[str, Any], stage: str = "matched") -> float:
    """Return the mean error of a block's heads in a report."""
    heads: list[float] = block[stage]
    return sum(heads) / len(heads)


def told(report: Report) -> str:
    """Return a line on a report."""
    blocks, top1 = report["blocks"], report["top1"]
    before, after = (
        sum(mean_error(block, stage) for block in blocks) / len(blocks) for stage in ("at_once", "matched")
    )
    return (
        f"matched the attention of {plural(len(blocks), 'block')} with that of {report['from']} on "
        f"{plural(report['images'], 'image')}: error of O {before:.3f} before, {after:.3f} after; top-1 "
        f"{top1['original']:.2f} % originally, {top1['at_once']:.2f} % unmatched, {top1['matched']:.2f} % matched"
    )


def survey(task_type: type[Task], recipe: Recipe) -> int:
    """Find which blocks to convert: try each by itself, then one more after the other; return the exit code.

    RUN/survey.json has the result, which `karat analyze` shows, with or without a run there. A run of the same recipe
    goes on from here.

    Raises:
        UserError: the recipe does not fit the source, the data or the run directory, or the run there has begun.
    """
    if recipe.distill.from_ != recipe.init_from:  # whose classes are checked
        raise UserError(
            f"distill.from = {recipe.distill.from_ or '(empty)'}: --survey compares with SOURCE, which must have the "
            "classes of the data; leave distill.from out"
        )
    signals = StopSignals().install()
    with (
        suppress(StoppedError),
        distributed.joined(recipe.run.device, recipe.run.peer_timeout_minutes, signals.check) as world,
    ):
        directory = RunDirectory(recipe.run.dir)
        with world.together():
            if world.is_main:
                directory.claim()
            if directory.store.names():
                raise RunDirectoryError(f"run.dir = {directory.path} has checkpoints; choose another run.dir")
        reporter = Reporter(choose_display(world.is_main, recipe.run.name), None, world.rank)
        task: Any = task_type(recipe, world, reporter).at(0)
        try:
            with one_line_out_of_memory(partial(task_type.less_memory, recipe, world.size)):
                model = starting_model(task, directory, signals)
                found = _surveyed(task.stage, model, world.device, PRECISIONS[recipe.train.precision].compute, reporter)
        except StoppedError:
            reporter.info("stopped; run the same command to go on")
            raise
        finally:
            task.close()
            reporter.close()
        if world.is_main:
            kept = {**found, "attention": _surveyed_attention(recipe)}
            replace_file(directory.path / SURVEYED, dump_recipe(recipe))
            replace_file(directory.path / SURVEY, json.dumps(kept, indent=1) + "\n")
            _show(found, recipe, task.stage.from_softmax)
        return 0
    return EXIT_STOPPED


def _surveyed(stage: Stage, model: nn.Module, device: torch.device, dtype: torch.dtype, reporter: Reporter) -> Report:
    report, images = stage.report, stage.first_images()
    model.to(device)
    blocks = {block["block"]: dict(block) for block in report["blocks"]}
    for number, block in blocks.items():
        block["top1_alone"] = stage.evaluate([number])
        reporter.info(f"block {number} alone: {block['top1_alone']:.2f} %")
    # The blocks that cost least come first; of equals, those with the least error.
    order = sorted(blocks, key=lambda number: (-blocks[number]["top1_alone"], mean_error(blocks[number])))
    curve: list[Report] = []
    for count in range(len(order) + 1):
        converted = sorted(order[:count])
        point = {"blocks": converted, "top1": stage.evaluate(converted), **_cost(model, images, dtype)}
        reporter.info(f"{plural(count, 'block')} converted: {point['top1']:.2f} %")
        curve.append(point)
    best = curve[0]["top1"]
    proposals = {str(loss): max(n for n, point in enumerate(curve) if best - point["top1"] <= loss) for loss in LOSSES}
    return {"from": report["from"], "images": report["images"], "blocks": [*blocks.values()], "curve": curve} | {
        "most_blocks_for_a_loss": proposals
    }


def _cost(model: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Return how fast forward and backward passes are, and what one image keeps in memory between them.

    dtype: what training computes in.
    """
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds, autocast = [], torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
    for _ in range(REPEATS):
        wait_for(images.device)
        start = time.perf_counter()
        with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(images).sum()
            held = sum(kept.values())
        loss.backward()
        wait_for(images.device)
        seconds.append(time.perf_counter() - start)
        kept.clear()
        model.zero_grad()
    return {"images_per_second": len(images) / min(seconds), "mb_per_image": held / len(images) / 1e6}


def _show(found: Report, recipe: Recipe, from_softmax: bool) -> None:
    rows = []
    for block in found["blocks"]:
        heads = " ".join(f"{error:.3f}" for error in block["matched"])
        rows.append([str(block["block"]), f"{mean_error(block):.3f}", heads, f"{block['top1_alone']:.2f}"])
    best = found["curve"][0]["top1"]
    title = f"{found['from']}: top-1 {best:.2f} %. Each block alone with {recipe.attention.kind}, matched:"
    print_table(title, ["block", "error of O", "of each head", "top-1, %"], rows, (2,))
    rows = []
    for point in found["curve"]:
        cost = f"{point['images_per_second']:,.0f}", f"{point['mb_per_image']:.2f}"
        rows.append([str(len(point["blocks"])), f"{point['top1']:.2f}", *cost])
    head = ["blocks converted", "top-1, %", "images/s", "MB an image"]
    print_table("One block after the other, from the least loss to the greatest:", head, rows)
    for loss, count in found["most_blocks_for_a_loss"].items():
        converted = found["curve"][count]["blocks"]
        rest = [block["block"] for block in found["blocks"] if block["block"] not in converted]
        others = ", ".join(f"{number}: {{kind: softmax}}" for number in rest)
        can_say = from_softmax and rest and converted and not recipe.attention.blocks
        how = f": 'attention.blocks={{{others}}}'" if can_say else ""
        print(f"for a loss of at most {loss} points, before fine-tuning: {plural(count, 'block')}{how}")

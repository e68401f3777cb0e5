"""The trained models that a run learns from: the teacher of its outputs, and the one that its attention comes from.

The run keeps both, so that it needs no other run. A checkpoint names each by the digest of its weights.

RUN/distill.safetensors is the classifier that a student learns from: its weights and what builds its network. The loss
is soft (Hinton, Vinyals and Dean, arXiv 1503.02531) or hard, also with the distillation token (DeiT: Touvron et al.,
arXiv 2012.12877). The teacher is frozen.

RUN/teacher.safetensors is the model that the run's attention is transferred from. It is a file of `karat export`:
weights, and the sections that build their model. A checkpoint resumes only with the same one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.checkpoint.tensor_storage import read_metadata
from karat_scale.checkpoint.weights import preprocessing
from karat_scale.engine.engine import forward_for_evaluation
from karat_scale.foundation.errors import RecipeError, RunDirectoryError, UserError
from karat_scale.models import create_model
from karat_scale.models.factory import check_transfers
from karat_scale.models.flops import forward_flops
from karat_scale.models.init_from import take_weights
from karat_scale.models.transfer import Teacher, give_teacher, weights_digest
from karat_scale.recipe import AttentionConfig, Recipe
from karat_scale.recipe.files import TIMM, locate
from karat_scale.recipe.train import DistillConfig
from karat_scale.training import weights_file
from karat_scale.training.run_directory import OpenRun, RunDirectory

FILE = "distill.safetensors"


@dataclass(frozen=True)
class DistillationTeacher:
    """A frozen network, and the format of its images.

    Attributes:
        network: the network, in float32 on the CPU until `Distillation` moves it.
        image_size: the side of its square input, in pixels.
        mean, std: the mean and standard deviation of its normalisation, per channel.
        digest: the digest of its weights.
    """

    network: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str


def keep_distillation_teacher(recipe: Recipe, into: Path) -> None:
    """Copy the weights of `distill.from`, if any, into a run: those that `karat eval` would take.

    A run keeps the teacher that it began with.

    Raises:
        RecipeError: there is no such classifier, or none that a student can learn from.
    """
    source, kept = recipe.distill.from_, into / FILE
    if not source or (kept.is_file() and not RunDirectory(into).begins_anew(recipe)):
        return
    try:
        if source.startswith(TIMM):
            name = source.removeprefix(TIMM)
            network: Any = weights_file.timm_model(name)
            known = network.pretrained_cfg
            seen = {"input_size": list(known["input_size"]), "mean": list(known["mean"]), "std": list(known["std"])}
            made = {"name": name.partition(".")[0], "num_classes": known["num_classes"]}
            facts = {"timm": json.dumps(made), "preprocessing": json.dumps(seen)}
            weights_file.write_model(network, kept, {**facts, "weights_sha256": weights_digest(network)})
            return
        path, checkpoint = locate(source)
        if checkpoint:
            run = OpenRun.at(path, Recipe, checkpoint=checkpoint)
            _refuse_student(run.recipe.attention)
            weights_file.write_weights(run, run.weights_kind, kept)
        else:
            _keep_file(recipe, path, kept)
    except UserError as error:
        raise RecipeError(f"{_named(recipe)}: {str(error).removeprefix(f'{source}: ')}") from error


def read_distillation_teacher(recipe: Recipe, classes: Sequence[str], run: Path) -> DistillationTeacher:
    """Return the teacher that a run keeps.

    Args:
        classes: the student's classes, in the order of the labels.

    Raises:
        RunDirectoryError: the teacher's file is missing or damaged.
        RecipeError: the teacher has other classes.
    """
    path = run / FILE
    if not path.is_file():
        raise RunDirectoryError(f"{path} is missing; restore it, since the run needs its teacher")
    facts = weights_file.read_facts(path)
    seen, digest = facts.preprocessing, facts.weights_sha256
    if seen is None or digest is None:
        raise RunDirectoryError(f"{path} does not say how its images are prepared; put the whole file back")
    if facts.timm is None:
        network = weights_file.read_exported(path)
    else:
        if not timm.is_model(facts.timm.name):  # timm would look for other names in folders and on the hub
            raise RunDirectoryError(f"{path}: timm has no {facts.timm.name}; put a whole copy back")
        network = timm.create_model(facts.timm.name, num_classes=facts.timm.num_classes)
        weights_file.load_exported(network, path)
    network.requires_grad_(False)
    _check_classes(recipe, network, classes, facts.classes)
    return DistillationTeacher(network, seen.input_size[-1], tuple(seen.mean), tuple(seen.std), digest)


class TeacherCost(NamedTuple):
    """The cost that a teacher adds to a run: weights on each rank, and operations for each training image."""

    parameters: int
    flops: int


def cost_of(network: nn.Module, image_size: int) -> TeacherCost:
    """Return what a teacher's network costs."""
    return TeacherCost(sum(p.numel() for p in network.parameters()), forward_flops(network, image_size))


def planned_cost(recipe: Recipe) -> TeacherCost:
    """Return what the teacher of `distill.from` will cost, without its weights; nothing if there is none.

    Raises:
        RecipeError: there is no such teacher.
    """
    source = recipe.distill.from_
    if not source:
        return TeacherCost(0, 0)
    try:
        with torch.device("meta"):
            if source.startswith(TIMM):
                network: Any = timm.create_model(source.removeprefix(TIMM))
                return cost_of(network, network.pretrained_cfg["input_size"][-1])
            path, checkpoint = locate(source)
            theirs = OpenRun.at(path, Recipe).recipe if checkpoint else None
            if theirs is None and weights_file.export_facts(path).preprocessing is None:
                theirs = recipe.changed(attention=AttentionConfig())
            model, attention = (theirs.model, theirs.attention) if theirs else weights_file.exported_sections(path)
            _refuse_student(attention)
            return cost_of(create_model(model, attention), model.image_size)
    except (UserError, RuntimeError) as error:
        raise RecipeError(f"{_named(recipe)}: {str(error).removeprefix(f'{source}: ')}") from error


def describe_teacher(recipe: Recipe, teacher: DistillationTeacher) -> str:
    """Return one line on a teacher and on what its forward pass adds to the student's training."""
    cost = cost_of(teacher.network, teacher.image_size)
    return (
        f"learns from {recipe.distill.from_} ({cost.parameters:,} parameters): its forward pass adds "
        f"{cost.flops / 1e9:.3g} GFLOPs to each training image"
    )


def _keep_file(recipe: Recipe, path: Path, kept: Path) -> None:
    if weights_file.export_facts(path).preprocessing is not None:
        _refuse_student(weights_file.exported_sections(path)[1])
        network = weights_file.read_exported(path)
        # A snapshot has no digest.
        weights_file.write_model(network, kept, {**read_metadata(path), "weights_sha256": weights_digest(network)})
        return
    # Weights by timm's names, whose model is not known: it is taken to be the recipe's, with softmax.
    attention = AttentionConfig()
    network = create_model(recipe.model, attention)
    weights = weights_file.read_weights(str(path))
    take_weights(network, weights.tensors, new_head=False)
    normalised = dict(zip(("mean", "std"), weights.normalised or (), strict=False))
    sections = {"model": recipe.model, "attention": attention}
    facts = {name: json.dumps(section.model_dump(mode="json")) for name, section in sections.items()}
    facts |= {
        "preprocessing": json.dumps({**preprocessing(recipe), **normalised}),
        "weights_sha256": weights_digest(network),
    }
    weights_file.write_model(network, kept, facts)


def _named(recipe: Recipe) -> str:
    """Return the teacher as the user named it: a key of the recipe, or the SOURCE of `karat convert`."""
    source = recipe.distill.from_
    return f"SOURCE {source}" if recipe.convert.images and source == recipe.init_from else f"distill.from = {source}"


def _refuse_student(attention: AttentionConfig) -> None:
    if attention.transfer_from:
        raise RecipeError("its attention comes from a teacher of its own; name a run without attention.transfer_from")


def _check_classes(recipe: Recipe, network: nn.Module, classes: Sequence[str], theirs: Sequence[str]) -> None:
    ours = recipe.model.num_classes
    there = getattr(network, "num_classes", ours)
    if there != ours:
        raise RecipeError(
            f"{_named(recipe)} has {there} classes, but model.num_classes = {ours}; name a teacher of as many classes"
        )
    for number, (here, other) in enumerate(zip(classes, theirs, strict=False)):
        if here != other:
            raise RecipeError(
                f"{_named(recipe)}: its class {number} is {other!r}, but this data's is {here!r}; the teacher "
                "must have learned the same classes in the same order"
            )


ClassLoss = Callable[[Tensor, Tensor], Tensor]


class Distillation:
    """Adds a teacher to the classification loss of a recipe; the teacher is moved to the device."""

    def __init__(self, recipe: Recipe, teacher: DistillationTeacher, device: torch.device) -> None:
        self._config = recipe.distill
        self.teacher = teacher
        self._forward = forward_for_evaluation(teacher.network, recipe.train, device)
        # From the student's normalised pixels to the teacher's: x * scale + shift.
        mean, std = (torch.tensor(values, device=device) for values in (recipe.augment.mean, recipe.augment.std))
        their_mean, their_std = (torch.tensor(values, device=device) for values in (teacher.mean, teacher.std))
        self._scale = (std / their_std).view(1, 3, 1, 1)
        self._shift = ((mean - their_mean) / their_std).view(1, 3, 1, 1)

    def losses(self, output: Any, images: Tensor, targets: Tensor, of_labels: ClassLoss) -> dict[str, Tensor]:
        """Return the loss of a micro batch as `loss`, and its parts `label_loss` and `teacher_loss`.

        Args:
            output: the student's logits [b, classes], or those of the class token and of the distillation token.
            images: float [b, 3, H, W], as the student sees them.
            targets: the targets of the labels, float [b, classes].
            of_labels: a function that returns the loss of logits and targets.
        """
        logits, distilled = (part.float() for part in (output if isinstance(output, tuple) else (output, output)))
        label_loss = of_labels(logits, targets)
        teacher_loss = distillation_loss(distilled, self.teacher_logits(images), self._config)
        weight = self._config.weight
        loss = (1 - weight) * label_loss + weight * teacher_loss
        return {"loss": loss, "label_loss": label_loss, "teacher_loss": teacher_loss}

    def teacher_logits(self, images: Tensor) -> Tensor:
        """Return the teacher's logits [b, classes] for the student's images, resized to the teacher's size."""
        views = images.float() * self._scale + self._shift
        size = self.teacher.image_size
        if views.shape[-1] != size:
            views = functional.interpolate(views, (size, size), mode="bilinear", antialias=True)
        logits: Tensor = self._forward(views)
        return logits


def distillation_loss(student: Tensor, teacher: Tensor, config: DistillConfig) -> Tensor:
    """Return the mean loss of logits [b, classes] against a teacher's, computed in float32 at least.

    Soft: T^2 KL(softmax(teacher / T) || softmax(student / T)). Hard: the cross-entropy with the teacher's argmax.
    """
    student, teacher = (logits if logits.dtype == torch.float64 else logits.float() for logits in (student, teacher))
    if config.kind == "hard":
        return functional.cross_entropy(student, teacher.argmax(-1))
    temperature = config.temperature
    ours, theirs = (functional.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    return temperature**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def use_distillation_token(model: nn.Module) -> bool:
    """Let a model with DeiT's distillation token return both tokens' logits in training; return whether it has one."""
    learn_apart = getattr(model, "set_distilled_training", None)
    if learn_apart is None:
        return False
    learn_apart()
    return True


TEACHER_FILE = "teacher.safetensors"


def keep_teacher(recipe: Recipe, into: Path) -> None:
    """Copy the weights of `attention.transfer_from`, if any, into a run: those that `karat eval` would take.

    A run keeps the teacher that it began with.

    Raises:
        RecipeError: there is no such run, it has no checkpoint to use, or it normalises images unlike this recipe.
    """
    source, kept = recipe.attention.transfer_from, into / TEACHER_FILE
    if not source or (kept.is_file() and not RunDirectory(into).begins_anew(recipe)):
        return
    try:
        run = OpenRun.at(source, Recipe)
        theirs = run.recipe
        check_transfers(theirs.model.name)
        if theirs.attention.transfer_from:
            raise RecipeError(f"it has its matrices from {theirs.attention.transfer_from}; name that run")
        for key in ("mean", "std"):
            there, here = getattr(theirs.augment, key), getattr(recipe.augment, key)
            if there != here:
                raise RecipeError(f"it was trained with augment.{key} = {list(there)}; use the same, not {list(here)}")
        weights_file.write_weights(run, run.weights_kind, kept)
    except UserError as error:
        raise RecipeError(f"attention.transfer_from = {source}: {error}") from error


def build_model(recipe: Recipe, run: Path) -> nn.Module:
    """Return the recipe's model, freshly initialised, with the teacher that the run keeps, if it needs one.

    Raises:
        RecipeError: the model cannot be built, or the teacher's matrices do not have its shape.
        RunDirectoryError: the teacher's file is missing or damaged.
    """
    model = create_model(recipe.model, recipe.attention)
    if recipe.attention.transfer_from:
        teacher = Teacher(weights_file.read_exported(run / TEACHER_FILE, recipe.attention.implementation))
        give_teacher(model, teacher, recipe.attention.transfer_from, recipe.attention.transfer_heads)
    return model


def trained_classifier(run: OpenRun[Recipe]) -> nn.Module:
    """Return a run's model; interpolated if an override gives it another image size than it was trained at."""
    as_trained = run.recipe.changed(model__image_size=run.trained.model.image_size)
    model = build_model(as_trained, run.path)
    run.load(model)
    if as_trained.model == run.recipe.model:
        return model
    resized = build_model(run.recipe, run.path)
    take_weights(resized, model.state_dict(), new_head=False)
    return resized

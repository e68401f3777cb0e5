"""The trained classifier that a run's student learns from, kept in the run, so that the run needs no other.

RUN/distill.safetensors holds its weights and what builds its network. Checkpoints name it by the digest of the weights.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from karat_scale.checkpoint.tensor_storage import read_metadata
from karat_scale.checkpoint.weights import wants_ema
from karat_scale.foundation.errors import RecipeError, RunDirectoryError, UserError
from karat_scale.foundation.trust import require_trust
from karat_scale.models import create_model
from karat_scale.models.flops import forward_flops
from karat_scale.models.transfer import weights_digest
from karat_scale.recipe import AttentionConfig, Recipe
from karat_scale.training.initial_weights import TIMM, export_facts, locate, timm_model
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.weights_file import (
    TimmNetwork,
    exported_sections,
    load_exported,
    read_exported,
    read_facts,
    write_model,
    write_weights,
)

FILE = "distill.safetensors"


@dataclass(frozen=True)
class DistillationTeacher:
    """A frozen network, and what its images look like.

    Attributes:
        network: float32 on the CPU, until `Distillation` moves it.
        image_size: the side of its square input, in pixels.
        mean, std: of its normalisation, per channel.
        digest: of its weights.
    """

    network: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str


def keep_distillation_teacher(recipe: Recipe, run: Path) -> None:
    """Copy the weights of `distill.from`, if any, into a run: those that `karat eval` would take.

    A run keeps the teacher that it began with.

    Raises:
        RecipeError: there is no such classifier, or none that a student can learn from.
    """
    source, kept = recipe.distill.from_, run / FILE
    if not source or (kept.is_file() and not RunDirectory(run).begins_anew(recipe)):
        return
    try:
        if source.startswith(TIMM):
            _keep_timm_model(source.removeprefix(TIMM), kept)
            return
        path, checkpoint = locate(source)
        if checkpoint:
            _keep_checkpoint(path, checkpoint, kept)
        else:
            _keep_export(path, kept)
    except UserError as error:
        raise RecipeError(f"distill.from = {source}: {str(error).removeprefix(f'{source}: ')}") from error


def read_distillation_teacher(recipe: Recipe, classes: Sequence[str], run: Path) -> DistillationTeacher:
    """Return the teacher that a run keeps.

    Args:
        classes: the student's, in the order of the labels.

    Raises:
        RunDirectoryError: its file is missing or damaged.
        RecipeError: it has other classes.
    """
    path = run / FILE
    if not path.is_file():
        raise RunDirectoryError(f"{path} is missing; put it back, the run cannot go on without its teacher")
    facts = read_facts(path)
    seen, digest = facts.preprocessing, facts.weights_sha256
    if seen is None or digest is None:
        raise RunDirectoryError(f"{path} does not say how its images are prepared; put the whole file back")
    network = _timm_network(path, facts.timm) if facts.timm else read_exported(path)
    network.requires_grad_(False)
    _check_classes(recipe, network, classes, facts.classes)
    return DistillationTeacher(network, seen.input_size[-1], tuple(seen.mean), tuple(seen.std), digest)


class TeacherCost(NamedTuple):
    """What a teacher adds to a run: weights on each rank, and operations for each training image."""

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
            theirs = RunDirectory(path).recipe() if checkpoint else None
            model, attention = (theirs.model, theirs.attention) if theirs else exported_sections(path)
            require_trust(attention.basis, RunDirectory(path).recipe_file if theirs else path)
            _refuse_student(attention)
            return cost_of(create_model(model, attention), model.image_size)
    except (UserError, RuntimeError) as error:
        raise RecipeError(f"distill.from = {source}: {str(error).removeprefix(f'{source}: ')}") from error


def describe_teacher(recipe: Recipe, teacher: DistillationTeacher) -> str:
    """Return one line on a teacher and on what its forward pass costs beside the student's training."""
    cost = cost_of(teacher.network, teacher.image_size)
    return (
        f"learns from {recipe.distill.from_} ({cost.parameters:,} parameters): its forward pass adds "
        f"{cost.flops / 1e9:.3g} GFLOPs to each training image"
    )


def _keep_checkpoint(run: Path, checkpoint: str, kept: Path) -> None:
    directory = RunDirectory(run)
    theirs = directory.recipe()
    require_trust(theirs.attention.basis, directory.recipe_file)
    _refuse_student(theirs.attention)
    name = directory.store.find_intact(checkpoint)
    kind = "ema" if wants_ema("auto", theirs, directory.store.state(name)) else "raw"
    write_weights(directory, theirs, name, kind, kept)


def _keep_export(path: Path, kept: Path) -> None:
    if export_facts(path).preprocessing is None:
        raise RecipeError("not a file of karat export; name a run, what karat export wrote of it, or timm:NAME")
    _refuse_student(exported_sections(path)[1])
    write_model(read_exported(path), kept, read_metadata(path))


def _refuse_student(attention: AttentionConfig) -> None:
    if attention.transfer_from:
        raise RecipeError("its attention comes from a teacher of its own; name a run without attention.transfer_from")


def _keep_timm_model(name: str, kept: Path) -> None:
    network = timm_model(name)
    known: Any = network.pretrained_cfg
    seen = {"input_size": list(known["input_size"]), "mean": list(known["mean"]), "std": list(known["std"])}
    architecture = json.dumps({"name": name.partition(".")[0], "num_classes": known["num_classes"]})
    facts = {"timm": architecture, "preprocessing": json.dumps(seen), "weights_sha256": weights_digest(network)}
    write_model(network, kept, facts)


def _timm_network(path: Path, made: TimmNetwork) -> nn.Module:
    if not timm.is_model(made.name):  # timm would look for other names in folders and on the hub
        raise RunDirectoryError(f"{path}: timm has no {made.name}; put a whole copy back")
    network: nn.Module = timm.create_model(made.name, num_classes=made.num_classes)
    load_exported(network, path)
    return network


def _check_classes(recipe: Recipe, network: nn.Module, classes: Sequence[str], theirs: Sequence[str]) -> None:
    source, ours = recipe.distill.from_, recipe.model.num_classes
    there = getattr(network, "num_classes", ours)
    if there != ours:
        raise RecipeError(
            f"distill.from = {source} has {there} classes, but model.num_classes = {ours}; they must agree"
        )
    for number, (here, other) in enumerate(zip(classes, theirs, strict=False)):
        if here != other:
            raise RecipeError(
                f"distill.from = {source}: its class {number} is {other!r}, but this data's is {here!r}; the teacher "
                "must have learned the same classes in the same order"
            )

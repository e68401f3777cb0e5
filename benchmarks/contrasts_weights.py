"""The models of the second experiment in examples/weights, and what training changed in their attention.

`python -m benchmarks.contrasts weights WORK` exports the best run of each arm and draws the figure. The page of results
has the table.
"""

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.attention_results import table
from benchmarks.contrasts import ROOT, SEEDS, Trial, chosen_rate, karat
from karat_scale.attention.operator import AttentionHeads
from karat_scale.commands.figures import new_figure, rendered, show_map
from karat_scale.foundation.files import write_atomically
from karat_scale.models.factory import create_model
from karat_scale.models.layers import attention_layers
from karat_scale.models.operators import heads_of
from karat_scale.recipe.loading import load_recipe

TOKENS, SIDE = 65, 8  # a class token and 8 x 8 patches
MODELS = ROOT / "examples/weights"
PICTURE = ROOT / "docs/figures/attention_without_scores.png"
FOLDERS = {
    "smooth": "cifar10_karat",
    "without_scores": "cifar10_without_scores",
    "frozen_functions": "cifar10_frozen_functions",
    "static_softmax": "cifar10_static_softmax",
    "biased_softmax": "cifar10_softmax",
    "static": "cifar10_static",
}


def export_best(work: Path) -> None:
    """Export the best run of each arm at 22 epochs whose directory is in WORK. Models that exist stay as they are."""
    for arm, name in FOLDERS.items():
        rate = chosen_rate(arm)
        runs = [Trial("main", arm, rate, seed) for seed in SEEDS[arm]] if rate is not None else []
        found = {trial: trial.top1() or 0.0 for trial in runs if (work / trial.name).is_dir()}
        if found and not (MODELS / name).exists():
            run = work / max(found, key=found.__getitem__).name
            options = ("--format", "hub-folder", "--checkpoint", "latest", "--out", str(MODELS / name))
            karat("export", str(run), *options)


@functools.cache
def before_and_after(arm: str) -> tuple[list[AttentionHeads], list[AttentionHeads]]:
    """Return the learned heads of an arm's model by block: at their start, which follows from the seed, and trained."""
    folder = MODELS / FOLDERS[arm]
    recipe = load_recipe(folder / "recipe.yaml")
    torch.manual_seed(recipe.run.seed)  # as in training
    start, end = (create_model(recipe.model, recipe.attention) for _ in range(2))
    end.load_state_dict(load_file(folder / "model.safetensors"))
    heads_of_start, heads_of_end = (
        [heads for layer in attention_layers(model) if (heads := heads_of(layer.attention))] for model in (start, end)
    )
    return heads_of_start, heads_of_end


@torch.no_grad()
def changes() -> str:
    """Return the table of how near functions and W stay to their random start."""
    rows = []
    for arm in ("smooth", "frozen_functions"):
        for block, pair in enumerate(zip(*before_and_after(arm), strict=True)):
            start, end = ({name: x.double() for name, x in heads.named_parameters()} for heads in pair)
            functions = [torch.cat([own["cos_modes"], own["sin_modes"]]) for own in (start, end)]
            w = [own["proj_modes"] for own in (start, end)]
            # The second mode is the class token, up to a constant (`attention/softmax.py`).
            shares = [float(x[:, 1].square().sum() / x.square().sum()) for x in w]
            changed = [f"{say(*x):.2f}" for x in (functions, w) for say in (cosine, change)]
            rows.append([arm, block, *changed, *(f"{x:.0%}" for x in shares)])
    columns = ["arm", "block", "functions", "change", "W", "change", "class token, start", "class token, end"]
    return table(columns, rows)


def cosine(x: Tensor, y: Tensor) -> float:
    """Return the cosine of two tensors, each taken as one vector."""
    return float((x * y).sum() / x.norm() / y.norm())


def change(start: Tensor, end: Tensor) -> float:
    """Return how much a tensor has changed, relative to the norm of its start."""
    return float((end - start).norm() / start.norm())


@torch.no_grad()
def draw() -> None:
    """Draw S of KArAt without scores, a row of each head, at the start and after training."""
    both = before_and_after("without_scores")
    heads = both[0][0].num_heads
    figure = new_figure(8, 1.9)
    axes = figure.subplots(len(both), len(both[0]) * heads)
    for row, (name, blocks) in enumerate(zip(("start", "trained"), both, strict=True)):
        rows = torch.cat([one.scores(*torch.zeros(2, 1, heads, TOKENS, 1))[0, :, 0] for one in blocks])
        for column, weights in enumerate(rows):
            patches = weights[1:]
            limit = float(patches.abs().max())
            title = f"{column // heads}, {column % heads}" if row == 0 else ""
            options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
            show_map(axes[row, column], patches.view(SIDE, SIDE).numpy(), title, **options)
        axes[row, 0].set_ylabel(name)
    write_atomically(PICTURE, rendered(figure))
    print(PICTURE)

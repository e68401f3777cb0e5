"""The models of the second experiment in examples/weights, and what training changed in their attention.

`python -m benchmarks.contrasts weights WORK` exports the best run of each arm and draws the figure. The page of results
has the table.
"""

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

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
        kept = [trial for trial in runs if (work / trial.name).is_dir()]
        found = {trial.name: top1 for trial in kept if (top1 := trial.top1()) is not None}  # those that have finished
        if found and not (MODELS / name).exists():
            run = work / max(found, key=found.__getitem__)
            karat("export", str(run), "--format", "hub-folder", "--checkpoint", "latest", "--out", str(MODELS / name))


@functools.cache
def before_and_after(arm: str) -> list[list[AttentionHeads]]:
    """Return the learned heads of an arm's model by block: at their start, which follows from the seed, and trained."""
    folder = MODELS / FOLDERS[arm]
    recipe = load_recipe(folder / "recipe.yaml")
    torch.manual_seed(recipe.run.seed)  # as in training
    start, end = (create_model(recipe.model, recipe.attention) for _ in range(2))
    end.load_state_dict(load_file(folder / "model.safetensors"))
    layers = (attention_layers(model) for model in (start, end))
    return [[heads for layer in own if (heads := heads_of(layer.attention))] for own in layers]


@torch.no_grad()
def changes() -> str:
    """Return the table of how near functions and W stay to their random start."""
    rows = []
    for arm in ("smooth", "frozen_functions"):
        for block, pair in enumerate(zip(*before_and_after(arm), strict=True)):
            start, end = ({name: x.double() for name, x in heads.named_parameters()} for heads in pair)
            functions = [torch.cat([own["cos_modes"], own["sin_modes"]]).flatten() for own in (start, end)]
            w = [own["proj_modes"] for own in (start, end)]
            changed: list[Tensor] = []
            for before, after in (functions, [x.flatten() for x in w]):
                changed += [cosine_similarity(before, after, dim=0), (after - before).norm() / before.norm()]
            # The second mode is the class token, up to a constant (`attention/softmax.py`).
            shares = [x[:, 1].square().sum() / x.square().sum() for x in w]
            rows.append([arm, block, *(f"{x:.2f}" for x in changed), *(f"{x:.0%}" for x in shares)])
    columns = ["arm", "block", "functions", "change", "W", "change", "class token, start", "class token, end"]
    return table(columns, rows)


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

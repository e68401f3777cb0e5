"""What S of a trained run depends on, block by block."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from karat_scale.commands.analyze.figures import new_figure
from karat_scale.commands.analyze.result import Result, Settings, Table, note_bad_images
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.analyze.validation_images import ValidationImages
from karat_scale.commands.analyze.visit import visit_images
from karat_scale.models.attention_matrices import can_be_replaced, mean_over_queries, replaced
from karat_scale.models.content import FIGURES, Content
from karat_scale.models.factory import layer_sizes


def analyze_content(run: TrainedRun, settings: Settings) -> Result:
    """Measure what S depends on, for every block.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    model, images = run.model(), run.images(settings.images)
    sizes = layer_sizes(run.recipe.model)
    content = Content(len(sizes))

    def add(block: int, raw: Tensor, learned: Tensor) -> None:
        content.add(block, raw, learned, len(learned) // sizes[block].sets)

    done = visit_images(model, run, images, settings, "content", add)
    figures = content.figures()
    result = Result()
    blocks = [dict(zip(FIGURES, own, strict=True)) for own in figures.tolist()]
    result.numbers = {"images": done, "blocks": blocks}
    result.arrays = {"shares": figures[:, :3], "frobenius_norm": figures[:, 3]}
    result.figures["shares"] = (
        _draw(figures),
        "Share of the energy of S that depends on the query and on the image, and share of scores beyond pi.",
    )
    _add_accuracy(result, run, settings, model, images, content)
    columns = ["block", "S depends on the query", "S depends on the image", "scores beyond pi", "Frobenius norm of S"]
    rows = [[block, *own] for block, own in enumerate(figures.tolist())]
    result.tables.append(Table("What S depends on", columns, rows))
    note_bad_images(result, images.bad)
    return result


@torch.no_grad()
def _add_accuracy(
    result: Result,
    run: TrainedRun,
    settings: Settings,
    model: nn.Module,
    images: ValidationImages,
    content: Content,
) -> None:
    """Add top-1 as trained, and with each S replaced by its mean over queries or over images."""
    means = [torch.as_tensor(mean) for mean in content.means()]
    # A mean of several sets of tokens is one for each: windows, or the patch sets of a MobileViT.
    if not can_be_replaced(model) or any(len(mean) > 1 for mean in means):
        result.notes.append("top-1 with averaged S: only for plain ViTs without attention transfer")
        return
    changes: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "S": nullcontext,
        "mean over queries": lambda: replaced(model, mean_over_queries),
        "mean over images": lambda: replaced(model, lambda block, learned: means[block].to(learned)),
    }
    right, done = dict.fromkeys(changes, 0), 0
    for batch, labels in images.batches(settings.batch, run.device):
        for name, change in changes.items():
            with change():
                right[name] += int((model(batch).argmax(-1) == labels).sum())
        done += len(batch)
        settings.progress("top-1 with averaged S", done, len(images))
    top1 = {name: 100 * count / done for name, count in right.items()}
    result.numbers["top1"] = top1
    title = f"Top-1 of {done} images with each S replaced"
    result.tables.append(Table(title, ["by", "top-1, %"], [[name, value] for name, value in top1.items()]))


def _draw(figures: npt.NDArray[np.float64]) -> Figure:
    figure = new_figure(6, 3.2)
    axes = figure.subplots()
    blocks = np.arange(len(figures))
    for number, label in enumerate(("depends on the query", "depends on the image", "scores beyond pi")):
        axes.plot(blocks, figures[:, number], marker="o", label=label)
    axes.set(xlabel="block", ylabel="share", xticks=blocks, ylim=(0, 1))
    axes.legend()
    return figure

"""The functions of each score alone over the scores that occur: psi of `form: content`."""

from collections.abc import Mapping
from typing import Any

import torch

from karat_scale.attention.heads import AttentionHeads
from karat_scale.commands.analyze.curves import ScoreHistogram
from karat_scale.commands.analyze.figures import GRID, OWN_LIMITS, OWN_X, new_figure
from karat_scale.commands.analyze.result import Result

POINTS = 200


@torch.no_grad()
def add_score_functions(result: Result, heads: Mapping[int, AttentionHeads], histogram: ScoreHistogram) -> None:
    """Add a figure and the curves of each block whose heads have such a function."""
    for block, own in heads.items():
        figure = new_figure(max(2.2 * own.num_heads, 3.2), 2.6)
        for head, axes in enumerate(figure.subplots(1, own.num_heads, squeeze=False)[0]):
            low, high = histogram.span(block, head)
            x = torch.linspace(low, high, POINTS, device=next(own.parameters()).device)
            curves = own.function_of_score(x.expand(own.num_heads, 1, -1))
            if curves is None:
                break
            curve = curves[head, 0].cpu().numpy()
            axes.plot(x.cpu().numpy(), curve)
            draw_scores(axes, histogram, block, head, (low, high))
            axes.set(title=f"head {head}", xlabel="score", xlim=(low, high), label=OWN_X)
            result.arrays[f"block{block}_head{head}_of_score_x"] = x.cpu().numpy()
            result.arrays[f"block{block}_head{head}_of_score"] = curve
        else:
            caption = f"Block {block}: the function of each score alone, over the scores that occur (grey: how often)."
            result.figures[f"of_score_block_{block}"] = figure, caption


def draw_scores(axes: Any, histogram: ScoreHistogram, block: int, head: int, span: tuple[float, float]) -> None:
    """Draw how often the scores of a head occur, behind its curves."""
    behind = axes.twinx()
    behind.set_label(OWN_LIMITS)
    middles = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    inside = (middles >= span[0]) & (middles <= span[1])
    behind.fill_between(
        middles[inside], histogram.counts[block, head][inside], color=GRID, alpha=0.35, linewidth=0, step="mid"
    )
    behind.set(yticks=[], ylim=(0, None))
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)

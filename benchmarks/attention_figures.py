"""Draws what S depends on in the runs of the experiment: docs/figures/what_s_depends_on.png."""

import json
from typing import Any

import numpy as np

from benchmarks.attention_trials import ARMS, RECORDS, ROOT, STAGES, chosen_rates
from karat_scale.commands.figures import new_figure, rendered
from karat_scale.foundation.files import write_atomically

PICTURE = ROOT / "docs/figures/what_s_depends_on.png"
PANELS = {"by_query": "depends on the query", "by_image": "depends on the image"}
LINES = ("-", "--")


def write_figure() -> None:
    """Draw the shares of each arm by block, a mean over the seeds of its stage."""
    figure = new_figure(8, 3.4)
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        for number, (arm, records) in enumerate(shown().items()):
            shares = np.mean([[block[key] for block in record["content"]] for record in records], 0)
            axes.plot(range(len(shares)), shares, marker="o", markersize=3, label=arm, linestyle=LINES[number // 7])
        axes.set(title=f"share of S's energy that {label}", xlabel="block", xticks=range(len(shares)), ylim=(-0.02, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    write_atomically(PICTURE, rendered(figure))
    print(PICTURE)


def shown() -> dict[str, list[dict[str, Any]]]:
    """Return the records of each arm at its chosen learning rate: of the comparison, if it was compared."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    chosen = chosen_rates()
    found: dict[str, dict[str, list[dict[str, Any]]]] = {stage: {} for stage in STAGES}
    for arm in (arm for arm in ARMS if arm in chosen):
        for record in records:
            if (record["arm"], record["rate"]) == (arm, chosen[arm]):
                found[record["stage"]].setdefault(arm, []).append(record)
    return {arm: found["compare"].get(arm, own) for arm, own in found["rate"].items()}

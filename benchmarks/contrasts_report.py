"""Writes docs/experiments/contrasts_results.md from the records of benchmarks/contrasts.py."""

import itertools
import json
import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from benchmarks.attention_results import difference, holm, table
from benchmarks.contrasts import (
    ARMS,
    COMPARED,
    CONTRASTS,
    EPOCHS,
    LABELS,
    LATER,
    ONE_CHANGE,
    RECORDS,
    REPLACED,
    REPORTED,
    SEEDS,
    best_rate,
    chosen_rate,
    results,
)
from benchmarks.contrasts_weights import changes
from karat_scale.foundation.files import write_atomically

PAGE = RECORDS.parent / "contrasts_results.md"
HEAD = """# Results of the second experiment

The protocol is [contrasts.md](contrasts.md), which says when it was amended. This page is written by
`python -m benchmarks.contrasts report` from the records in `docs/experiments/contrasts/`. Top-1 is in percent.
"""
COLUMNS = f"""## How to read the tables

- **Arms** have the [measures of the protocol](contrasts.md#evaluation): the training loss of the last 200 steps; the
  shares of S's energy on 16 test images, a mean over blocks; top-1 of {REPLACED:,} test images with each S as it is, or
  replaced by its mean; the largest share of a block's scores beyond pi at the end; the gradient's norm before clipping.
- **Contrasts** have the mean difference with its 95 % t interval over seeds, its error by the choice of the test
  images (1.96 standard errors), Holm's p once all seeds have run, and the difference without seed 0.
- **All pairs** have the same for the seeds that both have, and the images that only one of them gets right. They were
  not planned, and their number is not corrected for. **By epoch** is a mean over seeds.
- Top-1 is that of the run's last evaluation. Errors and counts come from its predictions, which `karat analyze` made
  again; of equal logits, which bf16 often has, it took another. They differ by less than 0.1 points.
"""
OTHERS = """## Other attention after 4 epochs

Without a test, at 3 seeds.
"""
CHANGES = """## What training changes

The cosine, over all heads of a block, between learned weights and their random start, their change relative to the
norm of the start, and the class token's share of the squares of W. Not planned, and of one seed: of the models in
`examples/weights`, which have the best top-1 of those that were kept.
"""
NO_SCORES = ("without_scores", "static", "query_only")
REPLACEMENTS = ("S", "mean over queries", "mean over images")
ByArm = dict[str, dict[int, dict[str, Any]]]  # records of the compared runs by arm and seed


def write_results() -> None:
    """Write the page."""
    write_atomically(PAGE, render())
    print(PAGE)


def render() -> str:
    """Return the page.

    Raises ValueError if runs of one table and seed are not of one code, or saw other images or another order, or S was
    replaced on another number of images.
    """
    parts = [HEAD, rates(), COLUMNS]
    for stage in COMPARED:
        records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob(f"{stage}-*.json"))]
        if len({(record["seed"], record["data_digest"]) for record in records}) > len({r["seed"] for r in records}):
            raise ValueError("the compared runs of one seed did not see the same images in the same order")
        tested, others = (of_arms(records, arms) for arms in (ARMS, LATER))
        own = [record for record in records if record["arm"] in ARMS]
        if len({(record["seed"], record["commit"]) for record in own}) > len({record["seed"] for record in own}):
            raise ValueError("the compared runs of one seed are of several commits")
        epochs = EPOCHS[stage]
        if tested:
            parts += [f"## After {epochs} epochs\n", compared(tested)]
            parts += [contrasts(tested, epochs), curves(tested, epochs)]
        if others:
            parts += [OTHERS, compared(others), beside_smooth({**tested, **others})]
    parts += [CHANGES, changes()]
    return "\n".join(parts)


def of_arms(records: list[dict[str, Any]], arms: Iterable[str]) -> ByArm:
    """Return the records of those of the arms that have some. Raises ValueError if they cannot be compared."""
    own = [record for record in records if record["arm"] in arms]
    if {record["replaced"]["images"] for record in own} - {REPLACED}:
        raise ValueError(f"S was not replaced on {REPLACED:,} images in each run")
    return {arm: {r["seed"]: r for r in own if r["arm"] == arm} for arm in arms if arm in {r["arm"] for r in own}}


def rates() -> str:
    """Return the tables of learning rates, with what has run."""
    text = "## Learning rates\n\nOn the 5,000 held-out images, seed 99, after 4 and then after 22 epochs.\n\n"
    arms = [arm for arm in (*ARMS, *LATER) if arm not in ONE_CHANGE]
    found = {arm: (results(arm, "rate"), results(arm, "check")) for arm in arms}
    tried = sorted({rate for both in found.values() for own in both for rate in own})
    rows = []
    for arm, both in found.items():
        chosen = best_rate(arm) if arm in LATER else chosen_rate(arm)
        cells = [f"{own[rate]:.2f}" if rate in own else "" for own in both for rate in tried]
        rows.append([arm, *cells, f"{chosen:g}" if chosen else ""])
    return text + table(["arm", *(f"{rate:g}" for rate in tried * 2), "chosen"], rows)


def compared(by_arm: ByArm) -> str:
    """Return the table of arms."""
    rows, seeds = [], sorted({seed for found in by_arm.values() for seed in found})
    for arm, found in by_arm.items():
        own = [*found.values()]
        ends = [record["top1"] for record in own]
        content = [statistics.mean(x for r in own for x in r["content"][key]) for key in ("by_query", "by_image")]
        replaced = [statistics.mean(r["replaced"][what] for r in own) for what in REPLACEMENTS]
        beyond = max(x for r in own for x in r["content"].get("beyond_pi", [0.0]))
        loss = statistics.mean(record["training"][-1][1] for record in own)
        norm = max(norm for record in own for _, _, norm in record["training"])
        rows.append(
            [
                arm,
                f"{own[0]['rate']:g}",
                len(own),
                f"{statistics.mean(ends):.2f}",
                *(f"{found[seed]['top1']:.2f}" if seed in found else "" for seed in seeds),
                f"{loss:.3f}",
                *(f"{max(0.0, x):.2f}" for x in content),
                *(f"{x:.1f}" for x in replaced),
                "" if arm in NO_SCORES else f"{beyond:.0%}",
                f"{norm:.1f}",
            ]
        )
    columns = ["arm", "rate", "seeds", "top-1", *(f"seed {seed}" for seed in seeds), "training loss", "by the query"]
    columns += ["by the image", *REPLACEMENTS, "beyond pi", "norm"]
    return table(columns, rows)


def contrasts(by_arm: ByArm, epochs: int) -> str:
    """Return the table of paired differences."""
    others = sorted(by_arm.keys() & {"static_softmax", "biased_softmax"}, key=lambda arm: -mean_top1(by_arm, arm))
    gaps = {pair: paired(by_arm, *pair) for pair in (*CONTRASTS, *REPORTED)}
    complete = all(len(gaps[pair]) == min(len(SEEDS[arm]) for arm in pair) for pair in CONTRASTS)
    chances = {pair: float(stats.ttest_1samp(gaps[pair], 0.0).pvalue) for pair in CONTRASTS} if complete else {}
    corrected = holm({" - ".join(pair): chance for pair, chance in chances.items()})
    rows = []
    for pair, own in gaps.items():
        name = " - ".join(pair)
        p = f"{corrected[name]:.3f}" if name in corrected else ""
        said = ["not yet run", ""]
        if own:  # a single seed has no interval
            points = difference(own) if len(own) > 1 else f"{own[0]:+.2f}"
            said = [points, f"+-{error_of_images(by_arm, *pair):.2f}"]
        later = paired(by_arm, *pair, first=1)
        rows.append([name, len(own), *said, p, f"{statistics.mean(later):+.2f}" if later else ""])
    text = f"### Contrasts after {epochs} epochs\n\n"
    text += f"The softmax to beat is `{others[0]}`.\n\n" if len(others) > 1 else ""
    text += table(["contrast", "seeds", "points", "test images", "p", "without seed 0"], rows)
    if len(by_arm) == 1:
        return text
    pairs = []
    for a, b in itertools.combinations(by_arm, 2):
        if own := paired(by_arm, a, b):
            error = f"+-{error_of_images(by_arm, a, b):.2f}"
            pairs.append([a, b, f"{statistics.mean(own):+.2f}", error, *disagreement(by_arm, a, b)])
    text += f"\n### All pairs after {epochs} epochs\n\n"
    return text + table(["arm", "other arm", "points", "test images", "only the arm", "only the other"], pairs)


def beside_smooth(by_arm: ByArm) -> str:
    """Return the table of differences to KArAt with smooth functions, and from which commits they are."""
    rows = []
    commits: set[str] = set()
    for arm in LATER:
        if len(own := paired(by_arm, arm, "smooth")) > 1:
            rows.append([f"{arm} - smooth", len(own), difference(own)])
            commits |= {record["commit"] for record in by_arm[arm].values()}
    if not rows:
        return ""
    (own_commit,) = {record["commit"] for record in by_arm["smooth"].values()}
    others = ", ".join(sorted(commit[:8] for commit in commits - {own_commit}))
    said = f"`smooth` is of commit {own_commit[:8]}, the others are of {others}.\n\n" if others else ""
    return said + table(["difference", "seeds", "points"], rows)


def mean_top1(by_arm: ByArm, arm: str) -> float:
    """Return an arm's top-1, a mean over seeds."""
    return float(statistics.mean(record["top1"] for record in by_arm[arm].values()))


def paired(by_arm: ByArm, arm: str, other: str, first: int = 0) -> list[float]:
    """Return one arm's top-1 less another's, for each seed from `first` on that both have."""
    seeds = sorted(by_arm.get(arm, {}).keys() & by_arm.get(other, {}).keys())
    return [by_arm[arm][seed]["top1"] - by_arm[other][seed]["top1"] for seed in seeds if seed >= first]


def error_of_images(by_arm: ByArm, arm: str, other: str) -> float:
    """Return 1.96 standard errors, in points, of two arms' mean difference over the seeds that both have.

    It is the error by the choice of the test images, for just these seeds.
    """
    seeds = by_arm[arm].keys() & by_arm[other].keys()
    gaps = [correct(by_arm[arm][seed]).astype(float) - correct(by_arm[other][seed]) for seed in seeds]
    by_image = np.mean(gaps, 0)
    return float(196 * by_image.std(ddof=1) / len(by_image) ** 0.5)


def disagreement(by_arm: ByArm, arm: str, other: str) -> tuple[str, str]:
    """Return the numbers of images, over all seeds that both have, that only one of two arms gets right."""
    first = second = 0
    for seed in by_arm.get(arm, {}).keys() & by_arm.get(other, {}).keys():
        right = [correct(by_arm[name][seed]) for name in (arm, other)]
        first += int((right[0] & ~right[1]).sum())
        second += int((right[1] & ~right[0]).sum())
    return f"{first:,}", f"{second:,}"


def correct(record: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """Return for each test image, in the order of ids, if a run got it right."""
    predicted, labels = (np.array([*text]) for text in (record["predictions"], LABELS.read_text().strip()))
    right: npt.NDArray[np.bool_] = predicted == labels
    return right


def curves(by_arm: ByArm, epochs: int) -> str:
    """Return top-1 by epoch, a mean over seeds."""
    steps = [step for step, *_ in next(iter(next(iter(by_arm.values())).values()))["curve"]]
    rows = []
    for arm, found in by_arm.items():
        means = np.mean([[top1 for _, top1, _ in record["curve"]] for record in found.values()], 0)
        rows.append([arm, *(f"{x:.1f}" for x in means)])
    columns = ["arm", *(f"{round(step / steps[-1] * epochs)}" for step in steps)]
    return f"### By epoch of {epochs}\n\n{table(columns, rows)}"

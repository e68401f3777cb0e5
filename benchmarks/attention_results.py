"""Writes docs/experiments/attention_results.md and its figure from the records of the experiment."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

from benchmarks.attention_figures import write_figure
from benchmarks.attention_trials import ARMS, RATES, RECORDS, SPARE_SEED, STARTS, VARIANTS, Trial
from karat_scale.foundation.files import write_atomically

PAGE = RECORDS.parent / "attention_results.md"
MARGIN = -0.5
LEVEL = 0.025  # the interval's lower bound is above the margin where p is below this
SHARES = ("by_query", "by_image")  # of the energy of S
BASELINES = ("softmax", "static_softmax", "static")
HEAD = """# Results of the comparison of kinds of attention

The protocol, fixed before the runs, is [attention.md](attention.md). This page is written by
`python -m benchmarks.attention_results` from the records in `docs/experiments/attention/`.
"""
Records = list[dict[str, Any]]
ByArm = dict[str, dict[int, dict[str, Any]]]  # records by arm and seed


def write_results() -> None:
    """Write the page."""
    write_atomically(PAGE, render())
    print(PAGE)


def render() -> str:
    """Return the page."""
    records: Records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    parts = [HEAD, rates(), comparison(of_stage(records, "compare"))]
    parts += [starts(of_stage(records, "start")), longer(of_stage(records, "long"))]
    return "\n".join(part for part in parts if part)


def of_stage(records: Records, stage: str) -> Records:
    """Return the records of a stage."""
    return [record for record in records if record["stage"] == stage]


def rates() -> str:
    """Return the table of learning rates."""
    rows = []
    for arm in ARMS:
        results = [Trial("rate", arm, rate, SPARE_SEED).result() for rate in RATES]
        found = [result["top1"] if result else None for result in results]
        best = max((x for x in found if x is not None), default=None)
        rows.append(
            [arm, *("not yet run" if x is None else f"**{x:.2f}**" if x == best else f"{x:.2f}" for x in found)]
        )
    text = "## Learning rates\n\nTop-1 in percent on the 5,000 held-out images after one epoch, seed 99.\n\n"
    return text + table(["arm", *RATES], rows)


def comparison(records: Records) -> str:
    """Return the tables of the comparison, if it has begun."""
    if not records:
        return ""
    by_arm = by_arm_and_seed(records)
    rows = []
    for arm, found in by_arm.items():
        ends = [record["top1"] for record in found.values()]
        quarter = statistics.mean(record["top1_at_a_quarter"] for record in found.values())
        top1 = f"{statistics.mean(ends):.2f}", f"{min(ends):.2f} to {max(ends):.2f}", f"{quarter:.2f}"
        rows.append([arm, len(ends), *top1, *(share(found, key) for key in SHARES)])
    columns = ["arm", "seeds", "top-1", "range", "at a quarter", "by the query", "by the image"]
    text = (
        "## Comparison\n\nTop-1 in percent on the 10,000 test images at the last step of two epochs, its range over "
        "seeds, and at a quarter of the steps; the shares of S's energy that depend on the query and on the image, a "
        "mean over blocks.\n\n"
    )
    return "\n".join((text + table(columns, rows), leads(by_arm), intervals(by_arm), replacements(by_arm)))


def by_arm_and_seed(records: Records) -> ByArm:
    """Return the records of each arm that has run, by seed."""
    found = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in (*ARMS, *STARTS)}
    return {arm: own for arm, own in found.items() if own}


def share(found: dict[int, dict[str, Any]], key: str) -> str:
    """Return a share of the energy of S, a mean over blocks and seeds. Rounding can put it below 0."""
    mean = statistics.mean(block[key] for record in found.values() for block in record["content"])
    return f"{max(0.0, mean):.2f}"


def leads(by_arm: ByArm) -> str:
    """Return how far each arm is ahead of softmax at a quarter of its steps and at the end."""
    rows = []
    for arm in by_arm:
        gaps = {key: gaps_between(arm, "softmax", by_arm, key) for key in ("top1_at_a_quarter", "top1")}
        if arm != "softmax" and gaps["top1"]:
            rows.append([arm, *(f"{statistics.mean(own):+.2f}" for own in gaps.values())])
    text = "Mean lead over softmax in points, by seed. A lead that shrinks is a lead in speed.\n\n"
    return text + table(["arm", "at a quarter", "at the end"], rows)


def intervals(by_arm: ByArm) -> str:
    """Return the paired differences of each variant from the baselines, and whether it is at least softmax."""
    gaps = {arm: gaps_of(arm, by_arm) for arm in VARIANTS if arm in by_arm}
    # Against both baselines: the larger of the two probabilities of such a lead if its true mean is the margin.
    chances = {
        arm: max(chance(own[baseline]) for baseline in BASELINES[:2])
        for arm, own in gaps.items()
        if all(len(own[baseline]) > 1 for baseline in BASELINES[:2])
    }
    corrected = holm(chances)
    rows = []
    for arm, own in gaps.items():
        cells = ["not yet run" if len(own[baseline]) < 2 else difference(own[baseline]) for baseline in BASELINES]
        answer = ("not yet run", "") if arm not in corrected else said(corrected[arm])
        rows.append([arm, *cells, *answer])
    columns = ["variant", *(f"less {baseline}" for baseline in BASELINES), "p", "at least softmax"]
    text = (
        "Mean difference by seed with its 95 % t interval. p is the probability of a mean so far above "
        f"{MARGIN} in a one-sided paired t test, the larger of those against softmax and static_softmax, with Holm's "
        f"correction over the variants. A variant is at least softmax if p is below {LEVEL}. The intervals are not "
        "corrected for their number, and leave out the error of the test set. static_softmax is handicapped: its gate "
        "started at 0 in these runs and hardly opened, so a lead over it says little.\n\n"
    )
    return text + table(columns, rows)


def replacements(by_arm: ByArm) -> str:
    """Return top-1 of the trained models with each S replaced by a mean, of the arms that all seeds have it of."""
    rows = []
    for arm, found in by_arm.items():
        if all("replaced" in record for record in found.values()):
            own = [record["replaced"] for record in found.values()]
            rows.append([arm, *(f"{statistics.mean(figures[name] for figures in own):.1f}" for name in own[0])])
    text = (
        "Top-1 of 2,000 test images, with each S as it is, or replaced by its mean over queries or images; a mean over "
        "seeds.\n\n"
    )
    return text + table(["arm", "S", "mean over queries", "mean over images"], rows) if rows else ""


def gaps_of(arm: str, by_arm: ByArm) -> dict[str, list[float]]:
    """Return the arm's top-1 less that of each baseline, for each seed that both have."""
    return {baseline: gaps_between(arm, baseline, by_arm) for baseline in BASELINES}


def gaps_between(arm: str, other: str, by_arm: ByArm, key: str = "top1") -> list[float]:
    """Return one arm's figure less another's, for each seed that both have."""
    seeds = sorted(by_arm[arm].keys() & by_arm.get(other, {}).keys())
    return [by_arm[arm][seed][key] - by_arm[other][seed][key] for seed in seeds]


def difference(gaps: Sequence[float]) -> str:
    """Return a mean with its interval."""
    low, high = interval(gaps)
    return f"{statistics.mean(gaps):+.2f} ({low:+.2f} to {high:+.2f})"


def said(corrected: float) -> tuple[str, str]:
    """Return a corrected probability and what it means."""
    return f"{corrected:.3f}" if corrected >= 0.001 else "< 0.001", "yes" if corrected < LEVEL else "not shown"


def chance(gaps: Sequence[float]) -> float:
    """Return the probability of such gaps where their true mean is the margin, by a one-sided t test."""
    return float(stats.ttest_1samp(gaps, MARGIN, alternative="greater").pvalue)


def holm(chances: dict[str, float]) -> dict[str, float]:
    """Return the probabilities after Holm's correction for their number."""
    corrected, least = {}, 0.0
    for place, arm in enumerate(sorted(chances, key=chances.__getitem__)):
        least = max(least, min(1.0, (len(chances) - place) * chances[arm]))
        corrected[arm] = least
    return corrected


def interval(gaps: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t interval of a mean."""
    half = stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
    return statistics.mean(gaps) - half, statistics.mean(gaps) + half


def starts(records: Records) -> str:
    """Return the table of the paper's possible starts, if any has run."""
    if not records:
        return ""
    own = by_arm_and_seed(records)
    rows = [[arm, f"{r['top1']:.2f}", f"{r['top1_at_a_quarter']:.2f}"] for arm in own for r in own[arm].values()]
    text = "## What the paper leaves open\n\n"
    text += "Top-1 in percent on the test images after two epochs, and at a quarter of the steps.\n\n"
    return text + table(["start", "top-1", "at a quarter"], rows)


def longer(records: Records) -> str:
    """Return the tables of the longer runs, if there are any."""
    if not records:
        return ""
    by_arm = by_arm_and_seed(records)
    rows = [
        [arm, seed, f"{r['top1']:.2f}", f"{r['top1_at_a_quarter']:.2f}", *(share({seed: r}, key) for key in SHARES)]
        for arm, found in by_arm.items()
        for seed, r in sorted(found.items())
    ]
    text = "## Longer runs\n\n22 epochs; the columns are those of the comparison.\n\n"
    text += table(["arm", "seed", "top-1", "at a quarter", "by the query", "by the image"], rows)
    return "\n".join(part for part in (text, leads(by_arm), replacements(by_arm)) if part)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"|{'|'.join(map(str, line))}|\n" for line in lines)


if __name__ == "__main__":
    write_results()
    write_figure()

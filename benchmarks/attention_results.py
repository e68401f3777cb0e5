"""Writes docs/experiments/attention_results.md from the records of the experiment."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

from benchmarks.attention_trials import ARMS, RATES, RECORDS, SPARE_SEED, VARIANTS, Trial
from karat_scale.files import write_atomically

PAGE = RECORDS.parent / "attention_results.md"
MARGIN = -0.5
LEVEL = 0.025  # the interval's lower bound is above the margin where p is below this
BASELINES = ("softmax", "static_softmax", "static")
HEAD = """# Results of the comparison of kinds of attention

The protocol, fixed before the runs, is [attention.md](attention.md). This page is written by
`python -m benchmarks.attention_experiment report` from the records in `docs/experiments/attention/`.
"""
Records = list[dict[str, Any]]


def write_results() -> None:
    """Write the page."""
    write_atomically(PAGE, render())
    print(PAGE)


def render() -> str:
    """Return the page."""
    records: Records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    parts = [HEAD, rates(), comparison(of_stage(records, "compare")), longer(of_stage(records, "long"))]
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
    by_arm = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in ARMS}
    by_arm = {arm: found for arm, found in by_arm.items() if found}
    rows = []
    for arm, found in by_arm.items():
        ends, quarters = ([r[key] for r in found.values()] for key in ("top1", "top1_at_a_quarter"))
        spread = f"{min(ends):.2f} to {max(ends):.2f}"
        shares = [
            statistics.mean(block[key] for block in r["content"]) for r in found.values() for key in ("by_query",)
        ]
        images = [statistics.mean(block["by_image"] for block in r["content"]) for r in found.values()]
        cells = f"{statistics.mean(ends):.2f}", spread, f"{statistics.mean(quarters):.2f}"
        rows.append([arm, len(ends), *cells, f"{statistics.mean(shares):.2f}", f"{statistics.mean(images):.2f}"])
    columns = ["arm", "seeds", "top-1", "range", "at a quarter", "by the query", "by the image"]
    text = (
        "## Comparison\n\nTop-1 in percent on the 10,000 test images at the last step of two epochs, its range over "
        "seeds, and at a quarter of the steps. The last columns are the shares of S's energy that depend on the query "
        "and on the image, a mean over blocks.\n\n"
    )
    return text + table(columns, rows) + "\n" + intervals(by_arm)


def intervals(by_arm: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Return the paired differences of each variant from the baselines, and whether it is at least softmax."""
    gaps = {arm: gaps_of(arm, by_arm) for arm in VARIANTS if arm in by_arm}
    # Against both: the larger of the two probabilities that a mean at the margin gives so much.
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
        f"correction over the variants. A variant is at least softmax if p is below {LEVEL}.\n\n"
    )
    return text + table(columns, rows)


def gaps_of(arm: str, by_arm: dict[str, dict[int, dict[str, Any]]]) -> dict[str, list[float]]:
    """Return the arm's top-1 less that of each baseline, for each seed that both have."""
    return {
        baseline: [
            by_arm[arm][seed]["top1"] - by_arm[baseline][seed]["top1"]
            for seed in sorted(by_arm[arm].keys() & by_arm.get(baseline, {}).keys())
        ]
        for baseline in BASELINES
    }


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


def longer(records: Records) -> str:
    """Return the table of the longer runs, if there are any."""
    if not records:
        return ""
    rows = [[r["arm"], r["seed"], f"{r['top1']:.2f}", f"{r['top1_at_a_quarter']:.2f}"] for r in records]
    return "## Longer runs\n\n22 epochs.\n\n" + table(["arm", "seed", "top-1", "at a quarter"], rows)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)

"""The sentences at the top of the report. Each is computed from a run's figures, and says no more than they support.

Intervals are at 95 %.
"""

import math
from collections.abc import Collection, Sequence

Z = 1.96
LITTLE, MOSTLY = 0.1, 0.5
"""Shares below the first are called "little", and shares from the second on "mostly"."""
BENT = 0.25
"""From this share of curves in the energy that is not constant, functions count as more than straight lines."""
AS_WELL = 1.0
"""Points of top-1 up to which a change of the model counts as none."""


def percent(share: float) -> str:
    """Return a share in percent; one below 0 is a rounding error."""
    return f"{100 * max(share, 0.0):.0f} %"


def accuracy_sentence(top1: float, images: int, classes: int, evaluations: int = 1) -> str:
    """Return a sentence on how often a model is right, with the interval for this size of test set (Wilson, 1927).

    evaluations: the number of evaluations of which this is the chosen best one.
    """
    share, extra = top1 / 100, Z**2 / images
    middle = share + extra / 2
    margin = Z * math.sqrt((share * (1 - share) + extra / 4) / images)
    low, high = (100 * (middle + sign * margin) / (1 + extra) for sign in (-1, 1))
    text = f"It is right on {top1:.1f} % of {images:,} test images (95 % interval for all such images: "
    text += f"{low:.1f} to {high:.1f} %). "
    guess = f"a guess between {classes} classes is right on {100 / classes:.3g} %."
    text += guess.capitalize() if low > 100 / classes else f"That is not shown to be more than chance: {guess}"
    if evaluations > 1:
        text += f" It is the best of {evaluations} evaluations on these images, which flatters it."
    return text


def content_sentence(by_query: Sequence[float], by_image: Sequence[float]) -> str:
    """Return a sentence on how much of S depends on the query and the image, from the shares of its energy by block."""
    parts = []
    for what, shares in (("query", by_query), ("image", by_image)):
        mean = sum(shares) / len(shares)
        degree = "little" if mean < LITTLE else "partly" if mean < MOSTLY else "mostly"
        least, most = percent(min(shares)), percent(max(shares))
        by_block = f"; {least} to {most} by block" if least != most else ""
        parts.append(f"{degree} on the {what} ({percent(mean)} of its energy{by_block})")
    return f"S depends {' and '.join(parts)}."


def lost_points(right: Sequence[bool], changed: Sequence[bool]) -> tuple[float, float, float]:
    """Return the loss of top-1 in points and its interval, from the hits of a model and a changed one on images.

    The interval is that of Agresti and Min (2005) for pairs, which also holds where the change makes no difference.
    """
    pairs = list(zip(right, changed, strict=True))
    lost, gained, count = pairs.count((True, False)), pairs.count((False, True)), len(pairs) + 2
    mean = (lost - gained) / count
    margin = Z * math.sqrt(lost + gained + 1 - (lost - gained) ** 2 / count) / count
    return 100 * (lost - gained) / len(pairs), 100 * max(mean - margin, -1), 100 * min(mean + margin, 1)


def constant_sentence(right: Sequence[bool], changed: Sequence[bool], by_image: float, is_all: bool = False) -> str:
    """Return a sentence on whether a constant matrix would do as well as S.

    right: whether the model is right on each image. changed: the same with the mean in place of each S. by_image: the
    largest share of a block's energy that depends on the image. is_all: whether these are all images of the split.
    """
    images = len(right)
    if by_image < 1e-6 and images > 1:
        return "Each S is a constant matrix already: no image changes it."
    mean, low, high = lost_points(right, changed)
    if low > 0:
        return (
            f"With a constant matrix in place of each S, the trained model loses {mean:.1f} points of top-1 ({low:.1f} "
            f"to {high:.1f}) on {images:,} images, so it uses what S says of the image."
        )
    change = f"top-1 changes by {0 - mean:+.1f} points ({0 - high:+.1f} to {0 - low:+.1f})"
    if high < AS_WELL:
        return (
            f"A constant matrix in place of each S does as well in the trained model: on {images:,} images, {change}."
        )
    return (
        f"These {images:,} images cannot tell whether a constant matrix in place of each S would do as well in the "
        f"trained model: {change}; {'the split has no more' if is_all else '--images takes more of them'}."
    )


def functions_sentence(constant: float, line: float, curve: float) -> str:
    """Return a sentence on what the functions look like, from the parts of their energy over the scores that occur."""
    total = constant + line + curve
    if line + curve < LITTLE * total:
        judged = "they hardly read the scores"
    elif curve < BENT * (line + curve):
        judged = "they read the scores nearly as straight lines would"
    else:
        judged = "they do more with the scores than a straight line could"
    parts = [percent(part / total) for part in (constant, line, curve)]
    return (
        f"Over the scores that occur, {parts[0]} of the functions' energy is a constant, {parts[1]} a straight line "
        f"and {parts[2]} a curve: {judged}."
    )


def not_shown(kinds: Collection[str], repeats_seeds: bool, has_other_tests: bool) -> list[str]:
    """Return a sentence on what the runs cannot show, from their kinds of attention; none if nothing is missing."""
    absent = {
        "how much another seed would change": not repeats_seeds,
        "how softmax would do, trained the same way": "softmax" not in kinds,
        "how a constant matrix that is learned from the start would do (attention.kind=static)": "static" not in kinds,
        "other test sets": not has_other_tests,
    }
    missing = [what for what, is_absent in absent.items() if is_absent]
    return [f"Not shown here: {'; '.join(missing)}."] if missing else []

"""The record of one sample's augmentation: what two backends must agree on."""

from dataclasses import dataclass

# A RandAugment operation's name and the arguments of its function: degrees, factors, pixels.
Operation = tuple[str, tuple[float, ...]]


@dataclass(frozen=True)
class Draw:
    """What one sample's augmentation does.

    box: left, top, width, height in source pixels. ops: RandAugment's operations with their arguments. jitter:
    (name, factor) in the order applied. erase: left, top, width, height in pixels of the result, and the seed of the
    noise that fills it.
    """

    box: tuple[int, int, int, int]
    flip: bool = False
    ops: tuple[Operation, ...] = ()
    jitter: tuple[tuple[str, float], ...] = ()
    erase: tuple[int, int, int, int, int] | None = None

"""The time that a section may take."""

import time


class Budget:
    """Seconds from now on, and how long work of each kind took, so that none begins that would not end in time."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self._took: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds, never below 0."""
        return max(0.0, self._ends - time.monotonic())

    def allows(self, kind: str, guess: float) -> bool:
        """Whether there is time for work that takes as long as the last of its kind, or `guess` seconds at first."""
        return self.left >= self._took.get(kind, guess)

    def note(self, kind: str, begun: float) -> None:
        """Remember work that began at `begun` of `time.monotonic` and ends now."""
        self._took[kind] = time.monotonic() - begun

"""Trying again, with longer and longer pauses, until a deadline."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from karat_scale.errors import DataError
from karat_scale.stores.failures import StoreError, final_error, judged

DEFAULT_TIMEOUT = 300.0
# The share of the timeout after which a store has failed, so that its error comes before that of a waiting loader.
_PATIENCE = 0.8
# The share of that time that one try may take.
_TRY = 1 / 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
T = TypeVar("T")


class Retries:
    """How long to try: for most of `timeout` seconds, a request with all its tries. `setting` is the recipe's key."""

    def __init__(self, timeout: float, setting: str) -> None:
        self._setting, self._timeout, self._patience = setting, timeout, _PATIENCE * timeout

    def deadline(self) -> float:
        """Return the time, of time.monotonic, at which a request that begins now is given up."""
        return time.monotonic() + self._patience

    def persist(self, where: str, ask: Callable[[float], T], deadline: float | None = None) -> T:
        """Return what `ask`, given the seconds of one try, returns; tries again until the deadline.

        Args:
            where: the URL that errors name.

        Raises:
            StoreError: no try was good, or one met an error that is final.
        """
        begun = time.monotonic()
        deadline = begun + self._patience if deadline is None else deadline
        pause, tries, jitter = _FIRST_PAUSE, 0, random.Random()  # its own, for training's must not change
        while True:
            left = deadline - time.monotonic()
            try:
                return ask(max(0.01, min(left, _TRY * self._patience)))
            except DataError:  # final, or of the sink
                raise
            except Exception as error:
                tries += 1
                reason, is_final = judged(error)
            if is_final:
                raise final_error(where, reason)
            pause = min(2 * pause, _LONGEST_PAUSE)
            wait = pause * (0.5 + jitter.random())
            if time.monotonic() + wait >= deadline:
                spent = time.monotonic() - begun
                raise StoreError(
                    f"{where}: {reason}, {tries} times in {spent:.0f} s; check the store, or raise "
                    f"{self._setting} (now {self._timeout:g} s) if it is only slow"
                )
            time.sleep(wait)

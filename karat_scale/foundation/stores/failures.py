"""What the errors of the libraries mean, and which of them another try may not meet again.

It is tried again with longer and longer pauses, until a deadline.
"""

import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from karat_scale.foundation.errors import DataError

# Answers of a server that may be other ones later; all others from 400 to 499 are final.
_PASSING = (408, 425, 429)
# Libraries' errors that no second try changes, by name, since these libraries may not be installed.
_FINAL = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError", "NoSuchBucket")


class StoreError(DataError):
    """A file at a URL cannot be read or written; the message names it."""


class MissingFileError(StoreError):
    """There is no such file."""


class ChangedFileError(StoreError):
    """A file at a URL is no longer the one that was indexed."""


class FinalError(Exception):
    """The reason of an error that another try would not change."""


_MISSING = "it is missing"


def final_error(where: str, reason: str) -> StoreError:
    """Return the error of a file that another try would not help."""
    kind = MissingFileError if reason.startswith(_MISSING) else StoreError
    return kind(f"{where}: {reason}")


def judged(error: BaseException) -> tuple[str, bool]:
    """Return what an error means, and whether it is final."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, FinalError):
            return str(cause), True
        if (status := _status(cause)) is not None:
            what = {403: "access is refused", 401: "access is refused", 404: _MISSING}.get(status, "it failed")
            hint = "; check the credentials that the store's library finds" if status in (401, 403) else ""
            return f"{what} (HTTP {status}){hint}", status < 500 and status not in _PASSING
        if type(cause).__name__ in _FINAL or isinstance(cause, ssl.SSLCertVerificationError):
            return f"{type(cause).__name__}; check the credentials, the endpoint and the certificates", True
    if isinstance(error, FileNotFoundError):
        return _MISSING, True
    if isinstance(error, PermissionError):
        return "access is refused; check the credentials that the store's library finds", True
    if any(isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in causes):
        return "no answer came in time", False
    if isinstance(error, EOFError):
        return f"the answer was cut short: {error}", False
    words = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), "")
    return f"the connection failed ({words or type(error).__name__})", False


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        yield cause
        cause = cause.__cause__ or cause.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in the answer that an error of any of the libraries tells of."""
    if type(error).__module__.startswith("aiohttp.http_"):  # of aiohttp's parser: the code is its own, of a cut answer
        return None
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        holders = ((error, "status"), (response, "status_code"), (error, "status_code"), (error, "code"))
        found = next((getattr(holder, name) for holder, name in holders if hasattr(holder, name)), None)
    return found if isinstance(found, int) and 400 <= found < 600 else None


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

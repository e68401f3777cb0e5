"""The shards of a stream: their names, and the endless list in which all cycles follow each other."""

import os
import re
from functools import lru_cache
from urllib.parse import urlparse

from webdataset.gopen import gopen_schemes, rewrite_url
from webdataset.shardlists import expand_urls

from karat_scale.data.order import epoch_order
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.tables import refuse_untrusted
from karat_scale.recipe import DataConfig
from karat_scale.recipe.data import check_tars

_VARIABLE = re.compile(r"\$\{(\w+)\}")
# What the library opens as a file, and what curl only reads. Other schemes run commands.
_FILES, _READ_ONLY = ("", "file"), ("http", "https")


class StreamShards:
    """The shards that `data.stream` spells.

    In each cycle, all of them are in an order that is drawn from (seed, cycle). The cycles follow each other in an
    endless list, whose entries are counted from 0. Lane l of L lanes reads the entries l, l + L, l + 2 L, ...

    Attributes:
        urls: what the library opens.
        names: the same for messages, without the values of `${NAME}`, which may be secret.

    Raises:
        DataError: the library cannot read `data.stream`, or it has a credential.
        UntrustedError: it is of a run that may be somebody else's, and what is opened may do more than read.
    """

    def __init__(self, data: DataConfig, seed: int) -> None:
        self._seed = seed
        self.urls = _expanded(data.stream)
        self.names = [_without_values(url, _variables(data.stream)) for url in self.urls]
        for url, name in zip(self.urls, self.names, strict=True):
            scheme = _check_can_be_opened(url, name)
            # A URL with the value of a variable would tell it to the server.
            if data.found_in and scheme not in _FILES and not (scheme in _READ_ONLY and url == name):
                refuse_untrusted(f"{data.found_in}: data.stream = {name} runs a command or sends a variable's value")
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return len(self.urls)

    def at(self, entry: int) -> int:
        """Return the number of the shard at an entry of the endless list."""
        cycle, place = divmod(entry, len(self))
        return self._order(cycle)[place]

    def _order_of(self, cycle: int) -> list[int]:
        order: list[int] = epoch_order(self._seed, cycle, len(self)).tolist()
        return order

    def check_lanes(self, ranks: int, per_rank: int) -> None:
        """Refuse fewer shards than lanes, since two lanes would read the same. Raises DataError."""
        lanes = ranks * per_rank
        if len(self) < lanes:
            raise DataError(
                f"data.stream has {plural(len(self), 'tar')}, fewer than {lanes} = {plural(ranks, 'rank')} x "
                f"{plural(per_rank, 'data worker')}, which read one each; name at least {lanes} (a pipe: may be named "
                "more than once), or lower data.workers"
            )


def _expanded(text: str) -> list[str]:
    try:
        urls: list[str] = expand_urls(text)
    except AssertionError as error:
        name = str(error).rpartition("WDS_")[2]
        raise DataError(
            f"data.stream: ${{{name}}} is the variable WDS_{name} of the environment, which is not set; set it, or "
            f"write ${name} for a variable of the command's shell"
        ) from None
    except ValueError:
        raise DataError(r"data.stream has a { without its }, or one too many; write \{ for the character") from None
    if not all(urls):
        raise DataError("data.stream has an empty name between two ::")
    return urls


def _variables(text: str) -> list[str]:
    """Return the names of the variables in a text, and of those in their values."""
    names = list(dict.fromkeys(_VARIABLE.findall(text)))
    for name in names:  # which grows
        names += [inner for inner in _VARIABLE.findall(os.environ[f"WDS_{name}"]) if inner not in names]
    return names


def _without_values(url: str, variables: list[str]) -> str:
    for name in reversed(variables):
        if value := os.environ[f"WDS_{name}"]:
            url = url.replace(value, f"${{{name}}}")
    return url


def _check_can_be_opened(url: str, name: str) -> str:
    """Return the scheme of what the library opens; empty for a file. Raises DataError."""
    try:
        check_tars(name)
    except ValueError as error:
        raise DataError(str(error)) from None
    try:
        opened = rewrite_url(url)  # as GOPEN_REWRITE of the environment says
        scheme: str = urlparse(opened).scheme
    except ValueError as error:
        raise DataError(f"data.stream: {name} is no URL: {error}") from None
    if opened == "-":
        raise DataError("data.stream: - is the standard input, which data workers cannot share; use a pipe: or a file")
    if scheme not in (*_FILES, *gopen_schemes):
        raise DataError(
            f"data.stream: {name}: the webdataset library opens no {scheme}:; use pipe: and the command that prints it"
        )
    return scheme

"""The shards of a stream, and the samples of a lane from a given place on, shuffled and without end.

All cycles over the shards follow each other in an endless list. The webdataset library opens shards, reads their
samples and groups them. Its reader ends without a word at a damaged header, at a missing end, and where another tar
follows. So the bytes are watched on their way to it, and what it leaves is looked at. A shard is whole, or an error.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import urlparse

import psutil
from webdataset.filters import shuffle
from webdataset.gopen import Pipe, gopen, gopen_schemes, rewrite_url
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from karat_scale.data.indexing.samples import IMAGES, LabelRule, NoLabelError, number_of
from karat_scale.data.plan import LanePlace, epoch_order, shuffle_seed
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
        name = str(error).partition("wds_WDS_")[2]
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


# How a tar ends, at least.
_END = bytes(1024)
_BLOCK = 512
# The reader asks for 10 kB at a time, and drops what it has left. Near the end it gets single blocks, so that it drops
# none.
_HELD_BACK = 20 << 10
_PIECE = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "zcat", b"BZh": "bzcat", b"\xfd7zXZ": "xzcat", b"\x28\xb5\x2f\xfd": "zstdcat"}
# A command whose output has ended is about to end, too.
_PATIENCE = 5.0


class ShardError(Exception):
    """What is wrong with a shard, in words that follow its name. The library adds to the arguments of exceptions."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ShardBytes:
    """The bytes of a shard, for the library to read. is_empty: there are none."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._held, self._given, self._tail = b"", b"", b""
        self._has_ended = False
        self.is_empty = True

    def read(self, size: int) -> bytes:
        """Return at most so many bytes; none at the end. Raises ShardError."""
        while not self._has_ended and len(self._held) < size + _HELD_BACK:
            self._fetch(size)
        if self._has_ended:
            size = min(size, _BLOCK)
        self._given, self._held = self._held[:size], self._held[size:]
        return self._given

    def check_end(self) -> None:
        """Look at what the reader left. Raises ShardError if that is not the end of a tar, or the command failed."""
        unread = self._given[-_BLOCK:] + self._held
        while not unread.strip(b"\0") and not self._has_ended:
            unread = self._fetch(_PIECE)
        if unread.strip(b"\0"):
            raise self.explained("has a damaged header, or another tar that follows it,")
        if self._tail != _END:
            raise self.explained("ends early")
        if failed := _failure(self._stream, None):
            raise ShardError(failed)

    def explained(self, reason: str) -> ShardError:
        """Return the reason, or that the command failed, if that is why."""
        return ShardError(_failure(self._stream, _PATIENCE if self._has_ended else 0.0) or reason)

    def _fetch(self, size: int) -> bytes:
        try:
            data: bytes = self._stream.read(size)
        except OSError as error:  # its text may have the value of a variable
            raise self.explained(f"cannot be read ({error.strerror or type(error).__name__})") from error
        if self.is_empty:
            for magic, program in _COMPRESSED.items():
                if data.startswith(magic):
                    raise ShardError(f"is compressed, and tars are read as they are (use pipe: and {program})")
        self._has_ended = not data
        self.is_empty &= not data
        self._held += data
        self._tail = (self._tail + data)[-len(_END) :]
        return data


def _failure(stream: Any, patience: float | None) -> str:
    """Return how the command of a shard failed, once it has ended; empty if it did not, or there is none."""
    if not isinstance(stream, Pipe):
        return ""
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = stream.proc.wait(patience)
        if code < 0 and -code != signal.SIGPIPE:
            return f"was ended by signal {-code}"
        if code > 0 and code not in stream.ignore_status:
            return f"ended with exit code {code}"
    return ""


@contextmanager
def opened(url: str) -> Iterator[ShardBytes]:
    """Open a shard; its command, if it has one, ends with the block. Raises ShardError."""
    try:
        stream = gopen(url)
    except OSError as error:
        program = f": {error.filename}" if error.filename and str(error.filename) != url else ""
        raise ShardError(f"cannot be opened ({error.strerror or type(error).__name__}{program})") from error
    except Exception as error:  # of a library that finds the file
        raise ShardError(f"cannot be opened ({type(error).__name__})") from error
    try:
        yield ShardBytes(stream)
    finally:
        if isinstance(stream, Pipe):
            _end_command(stream.proc)
        with contextlib.suppress(OSError):
            stream.close()


def _end_command(command: "subprocess.Popen[bytes]") -> None:
    """End a command that is not read to its end, with all that it has started."""
    if command.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            shell = psutil.Process(command.pid)  # first, or it would say that the others were killed
            for process in (shell, *shell.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        command.wait()


DOUBLED = "__doubled__"


def read_tar(url: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as the library makes them, in the shard's order.

    A sample in which a suffix occurs twice has DOUBLED, and the first of the two.

    Args:
        url: what to open.
        name: what messages call it.

    Raises:
        DataError: the shard cannot be opened, is damaged or ends early, or its command fails.
    """
    count = 0
    try:
        with opened(url) as shard:
            for sample in _samples(shard):
                count += 1
                yield sample
            shard.check_end()
    except ShardError as error:
        after = f" after {plural(count, 'sample')}" if count else ""
        text = f"data.stream: {name} {error.reason}{after}; put it right, or take it out of data.stream"
        raise DataError(text) from None


def _samples(shard: ShardBytes) -> Iterator[dict[str, Any]]:
    doubled = False

    def note(error: Exception) -> bool:
        nonlocal doubled
        if not isinstance(error, ValueError):
            raise error
        doubled = True
        return True  # go on

    try:
        for sample in group_by_keys(tar_file_expander([{"url": "", "stream": shard}]), handler=note):
            yield {**sample, DOUBLED: True} if doubled else sample
            doubled = False
    except ShardError:
        raise
    except Exception as error:  # of tarfile, or of a header's text
        reason = str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__
        raise shard.explained("is empty" if shard.is_empty else f"is damaged or ends early ({reason})") from error


# Samples that the buffer must have before one is taken from it.
_INITIAL = 100


class StreamSample(NamedTuple):
    """A sample as it is stored. problem: why it cannot be used; its image and label say nothing then."""

    id: int
    key: str
    image: bytes
    label: int
    problem: str = ""


class InLane(NamedTuple):
    """A sample of a lane. shard: its number. place: of the lane after it."""

    sample: StreamSample
    cycle: int
    shard: int
    place: LanePlace


class StreamSource:
    """The shards of a recipe's stream, and how its samples say their class.

    classes: the names of the classes, in the order of the labels.
    """

    def __init__(self, data: DataConfig, seed: int, classes: tuple[str, ...]) -> None:
        self.shards = StreamShards(data, seed)
        self._seed, self._buffer = seed, data.stream_buffer
        self._rule = LabelRule.parse(data.stream_label)
        self._numbers = {name: number for number, name in enumerate(classes)}

    def lane(self, place: LanePlace, lanes: int, begins: Callable[[int], None]) -> Generator[InLane, None, None]:
        """Yield the samples of a lane from a place on, without end.

        The order in a shard is a function of the seed and the shard's entry in the endless list. So to go on inside a
        shard, its samples are read and shuffled once more from its start, and those that were used are dropped.

        Args:
            lanes: of all ranks.
            begins: is told the number of each shard before it is opened.

        Raises:
            DataError: a shard cannot be read, is not whole or has no sample.
        """
        entry, used = place
        while True:
            shard = self.shards.at(entry)
            begins(shard)
            mix = shuffle(self._buffer, initial=_INITIAL, rng=random.Random(shuffle_seed(self._seed, entry)))
            samples: Iterator[StreamSample] = mix(self._samples(shard))
            there = sum(1 for _ in islice(samples, used))
            if there < used:
                name = self._name(shard)
                raise DataError(f"data.stream: {name} has {plural(there, 'sample')}, and the run has used {used}")
            for sample in samples:
                used += 1
                yield InLane(sample, entry // len(self.shards), shard, LanePlace(entry, used))
            if not used:
                raise DataError(f"data.stream: {self._name(shard)} has no sample; take it out of data.stream")
            entry, used = entry + lanes, 0

    def _name(self, shard: int) -> str:
        return self.shards.names[shard]

    def _samples(self, shard: int) -> Iterator[StreamSample]:
        name = self._name(shard)
        for members in read_tar(self.shards.urls[shard], name):
            yield self._sample(members, name)

    def _sample(self, members: Mapping[str, Any], shard: str) -> StreamSample:
        key = members["__key__"]
        number = _stable_id(shard, key)
        suffix = next((suffix for suffix in members if suffix in IMAGES), "")
        try:
            if not members.get(suffix):
                raise NoLabelError("the image is empty" if suffix else f"no image ({', '.join(IMAGES)})")
            if DOUBLED in members:
                raise NoLabelError("a suffix occurs twice")
            return StreamSample(number, key, members[suffix], self._label(members, f"{key}.{suffix}"))
        except NoLabelError as error:
            return StreamSample(number, key, b"", 0, str(error))

    def _label(self, members: Mapping[str, Any], image: str) -> int:
        kind = self._rule.kind
        if kind != "path" and kind not in members:
            raise NoLabelError(f"no label: .{kind} is missing")
        label = self._rule.label(image, b"" if kind == "path" else members[kind])
        try:
            number = number_of(label, self._numbers)
        except KeyError:
            raise NoLabelError(f"its class {str(label)[:60]!r} is none of data.path's {len(self._numbers)}") from None
        if not 0 <= number < len(self._numbers):
            raise NoLabelError(f"its label is {number}, but data.path has {len(self._numbers)} classes")
        return number


def _stable_id(shard: str, key: str) -> int:
    """Return a number below 2^63 that tells a sample from others."""
    digest = blake2b(f"{shard}\0{key}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

"""The `webdataset` backend with `data.order: stream`: training batches of tars without an index.

The shards, cycle after cycle, are an endless list. Lane l of L reads every L-th shard, from a given place on, and
shuffles their samples. A batch is made from the next samples of a lane: they are decoded, transformed and collected.
The progress of a rank is where its lanes stand after the last batch that was trained on. A checkpoint holds it.

The webdataset library opens shards, reads their samples and groups them. Its reader stops silently at a damaged
header, at a missing end, and where another tar follows. So the bytes are watched on their way to it, and what it
leaves unread is checked. A shard is read whole, or it is an error.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from itertools import islice
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlparse

import psutil
from pydantic import Field
from webdataset.filters import shuffle
from webdataset.gopen import Pipe, gopen, gopen_schemes, rewrite_url
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from karat_scale.data.backends.images import ImageBackend
from karat_scale.data.batch import Batch, Streamed
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.decode import FORMATS, UndecodableImageError
from karat_scale.data.indexing import IMAGES, LabelRule, NoLabelError, number_of
from karat_scale.data.loading.assemble import MAX_REPLACEMENTS, Assembler, ImageSpec, Sample
from karat_scale.data.loading.workers import lead_own_commands
from karat_scale.data.plan import BatchSlice, LanePlace, TrainPlan, epoch_order, shuffle_seed
from karat_scale.data.shards.remote import RemoteUse
from karat_scale.data.shards.shards import ShardSplit
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
        urls: the URLs that the library opens.
        names: the same URLs for messages, without the values of `${NAME}`, which may be secret.

    Raises:
        DataError: the library cannot read `data.stream`, or `data.stream` has a credential.
        UntrustedError: `data.stream` is from a run that may be somebody else's, and opening it may do more than read.
    """

    def __init__(self, data: DataConfig, seed: int) -> None:
        try:
            self.urls: list[str] = expand_urls(data.stream)
        except AssertionError as error:
            name = str(error).partition("wds_WDS_")[2]
            raise DataError(
                f"data.stream: ${{{name}}} is the variable WDS_{name} of the environment, which is not set; set it, or "
                f"write ${name} for a variable of the command's shell"
            ) from None
        except ValueError:
            raise DataError(r"data.stream has a { without its }, or one too many; write \{ for the character") from None
        if not all(self.urls):
            raise DataError("data.stream has an empty name between two ::")
        self.names = _without_values(self.urls, data.stream)
        for url, name in zip(self.urls, self.names, strict=True):
            scheme = _check_can_be_opened(url, name)
            # A URL that has the value of a variable would send it to the server.
            if data.found_in and scheme not in _FILES and not (scheme in _READ_ONLY and url == name):
                refuse_untrusted(f"{data.found_in}: data.stream = {name} runs a command or sends a variable's value")
        self._order = lru_cache(maxsize=2)(lambda cycle: epoch_order(seed, cycle, len(self)).tolist())

    def __len__(self) -> int:
        return len(self.urls)

    def at(self, entry: int) -> int:
        """Return the number of the shard at an entry of the endless list."""
        cycle, place = divmod(entry, len(self))
        shard: int = self._order(cycle)[place]
        return shard

    def check_lanes(self, ranks: int, per_rank: int) -> None:
        """Refuse fewer shards than lanes, since two lanes would read the same. Raises DataError."""
        lanes = ranks * per_rank
        if len(self) < lanes:
            raise DataError(
                f"data.stream has {plural(len(self), 'tar')}, fewer than {lanes} = {plural(ranks, 'rank')} x "
                f"{plural(per_rank, 'data worker')}, which read one each; name at least {lanes} (a pipe: may be named "
                "more than once), or lower data.workers"
            )


def _without_values(urls: list[str], text: str) -> list[str]:
    """Return URLs with the names of variables instead of their values, for those in `text` and those in values."""
    names = list(dict.fromkeys(_VARIABLE.findall(text)))
    for name in names:  # which grows
        names += [inner for inner in _VARIABLE.findall(os.environ[f"WDS_{name}"]) if inner not in names]
    for name in reversed(names):
        if value := os.environ[f"WDS_{name}"]:
            urls = [url.replace(value, f"${{{name}}}") for url in urls]
    return urls


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
        raise DataError(f"data.stream: {name} is not a URL: {error}") from None
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
    """A fault of a shard; `reason` follows the shard's name in messages. The library adds to exceptions' arguments."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ShardBytes:
    """The bytes of a shard, for the library to read. is_empty: whether there are none."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._held, self._given, self._tail = b"", b"", b""
        self._has_ended = False
        self.is_empty = True

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes; none at the end. Raises ShardError."""
        while not self._has_ended and len(self._held) < size + _HELD_BACK:
            self._fetch(size)
        if self._has_ended:
            size = min(size, _BLOCK)
        self._given, self._held = self._held[:size], self._held[size:]
        return self._given

    def check_end(self) -> None:
        """Check what the reader left. Raises ShardError if that is not the end of a tar, or if the command failed."""
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
        """Return an error with the reason; if the command failed, with that instead."""
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
_SUFFIXES = {*IMAGES, *map(str.lower, FORMATS)}  # those by which `karat prepare` names images, too


def read_tar(url: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as the library makes them, in the shard's order.

    A sample in which a suffix occurs twice has the key DOUBLED, and only the first of the two members.

    Args:
        url: the URL to open.
        name: the shard's name in messages.

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
        text = f"data.stream: {name} {error.reason}{after}; fix it, or take it out of data.stream"
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
    """A sample as it is stored. problem: why it cannot be used; its image and label are meaningless then."""

    id: int
    key: str
    image: bytes
    label: int
    problem: str = ""


class InLane(NamedTuple):
    """A sample of a lane. shard: the number of its shard. place: the lane's place after the sample."""

    sample: StreamSample
    cycle: int
    shard: int
    place: LanePlace


class StreamSource:
    """The shards of a recipe's stream, and the rule for the class of a sample.

    classes: the names of the classes, in the order of the labels.
    """

    def __init__(self, data: DataConfig, seed: int, classes: tuple[str, ...]) -> None:
        self.shards = StreamShards(data, seed)
        self._seed, self._buffer = seed, data.stream_buffer
        self._rule = LabelRule.parse(data.stream_label)
        self._numbers = {name: number for number, name in enumerate(classes)}

    def lane(self, place: LanePlace, lanes: int, begins: Callable[[int], None]) -> Generator[InLane, None, None]:
        """Yield the samples of a lane from a place on, without end.

        The order in a shard is a function of the seed and the shard's entry in the endless list. So to resume inside a
        shard, its samples are read and shuffled again from its start, and those that were used are skipped.

        Args:
            lanes: the number of lanes of all ranks.
            begins: is called with the number of each shard before it is opened.

        Raises:
            DataError: a shard cannot be read, is not whole or has no sample.
        """
        entry, used = place
        while True:
            shard = self.shards.at(entry)
            name = self.shards.names[shard]
            begins(shard)
            mix = shuffle(self._buffer, initial=_INITIAL, rng=random.Random(shuffle_seed(self._seed, entry)))
            stored = read_tar(self.shards.urls[shard], name)
            samples: Iterator[StreamSample] = mix(self._sample(members, name) for members in stored)
            there = sum(1 for _ in islice(samples, used))
            if there < used:
                raise DataError(
                    f"data.stream: {name} has {plural(there, 'sample')}, and the run has used {used}; put back "
                    "the tar that it began with"
                )
            for sample in samples:
                used += 1
                yield InLane(sample, entry // len(self.shards), shard, LanePlace(entry, used))
            if not used:
                raise DataError(f"data.stream: {name} has no sample; take it out of data.stream")
            entry, used = entry + lanes, 0

    def _sample(self, members: Mapping[str, Any], shard: str) -> StreamSample:
        key = members["__key__"]
        digest = blake2b(f"{shard}\0{key}".encode(errors="surrogateescape"), digest_size=8).digest()
        number = int.from_bytes(digest, "little") >> 1  # below 2^63; it tells a sample from others
        suffix = next((suffix for suffix in members if suffix in _SUFFIXES), "")
        try:
            if not members.get(suffix):
                raise NoLabelError("the image is empty" if suffix else f"no image ({', '.join(IMAGES)})")
            if DOUBLED in members:
                raise NoLabelError("a suffix occurs twice")
            return StreamSample(number, key, members[suffix], self._label(members, f"{key}.{suffix}"))
        except NoLabelError as error:
            return StreamSample(number, key, b"", 0, str(error))

    def _label(self, members: Mapping[str, Any], image: str) -> int:
        label = self._rule.label(image, self._rule.source(members) or b"")
        try:
            number = number_of(label, self._numbers)
        except KeyError:
            raise NoLabelError(f"its class {str(label)[:60]!r} is none of data.path's {len(self._numbers)}") from None
        if not 0 <= number < len(self._numbers):
            raise NoLabelError(f"its label is {number}, but data.path has {len(self._numbers)} classes")
        return number


class UnusableSampleError(UndecodableImageError):
    """A sample of a stream lacks an image or a valid label; the message is the reason."""

    done = "used"


class StreamAssembler(Assembler):
    """Makes training batches of a stream. Each worker reads its own lane; its next sample replaces a bad one."""

    def __init__(self, source: StreamSource, spec: ImageSpec, decoder: Decoder) -> None:
        super().__init__(spec, decoder, training=True)
        self._source = source
        self._lanes: dict[int, Generator[InLane, None, None]] = {}
        self._used: list[InLane] = []  # the last candidate of each row of the batch

    def _candidates(self, part: BatchSlice) -> Iterator[Iterator[Sample]]:
        if part.place is not None or part.lane not in self._lanes:
            lead_own_commands()
            place = part.place or LanePlace(part.lane)
            self._lanes[part.lane] = self._source.lane(place, part.lanes, self._whereabouts.tell)
        return (self._next_of(self._lanes[part.lane], row) for row in range(len(part.sample_ids)))

    def _next_of(self, lane: Iterator[InLane], row: int) -> Iterator[Sample]:
        for one in islice(lane, MAX_REPLACEMENTS):
            self._used[row:] = [one]
            locate = partial(self._locate, one)
            yield Sample(one.sample.id, one.sample.label, one.cycle, partial(_image_of, one), locate)

    def _locate(self, one: InLane) -> tuple[str, str]:
        return one.sample.key, self._source.shards.names[one.shard]

    def _streamed(self, part: BatchSlice) -> Streamed:
        return Streamed(part.lane, self._used[-1].place, tuple(map(self._locate, self._used)))

    def whereabouts(self, workers: int) -> str:
        return self._whereabouts.told(workers, lambda i: f"reads {self._source.shards.names[i]}")

    def close(self) -> None:
        """Stop the commands of lanes that this process itself reads."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            lane.close()


def _image_of(one: InLane) -> bytes:
    if one.sample.problem:
        raise UnusableSampleError(one.sample.problem)
    return one.sample.image


class StreamBackend(ImageBackend):
    """Trains on a stream, and evaluates on an indexed split, which also names the classes. See Backend."""

    def __init__(self, spec: ImageSpec) -> None:
        data = spec.data
        remote = RemoteUse.of(data, training=False)
        val = ShardSplit(data.path, data.val_split, spec.num_classes, data.verify, remote=remote)
        super().__init__(val, val, spec)
        self.num_train = data.stream_samples or 0

    def plan(
        self, global_batch: int, micro_batch: int, rank: int, world_size: int, lanes: int | None = None
    ) -> TrainPlan:
        plan = super().plan(global_batch, micro_batch, rank, world_size, lanes)
        StreamShards(self._data, self.spec.seed).check_lanes(world_size, plan.lanes)
        return plan

    @cached_property
    def _make_stream(self) -> StreamAssembler:  # not before it is used: an evaluation needs none of it
        source = StreamSource(self._data, self.spec.seed, self.classes)
        decoder = make_decoder(self._data, self.spec.augment.interpolation)
        return StreamAssembler(source, self.spec, decoder)

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._load(self._make_stream, slices)

    def close(self) -> None:
        super().close()
        if "_make_stream" in self.__dict__:
            self._make_stream.close()


Count = Annotated[int, Field(ge=0, lt=2**40)]


@dataclass
class StreamState:
    """A stream's state in a checkpoint. shards: their number. lanes: (entry, used samples) of all ranks' lanes."""

    shards: Annotated[int, Field(ge=1)]
    lanes: Annotated[list[tuple[Count, Count]], Field(min_length=1)]


class StreamProgress:
    """The places of this rank's lanes.

    lanes: the number of lanes of each rank. shards: the number of the stream's shards.
    """

    def __init__(self, rank: int, ranks: int, lanes: int, shards: int) -> None:
        self._mine = range(rank * lanes, (rank + 1) * lanes)
        self._all, self._shards = ranks * lanes, shards
        self.places = {lane: LanePlace(lane) for lane in self._mine}

    def from_here(self, slices: Iterable[BatchSlice]) -> Iterator[BatchSlice]:
        """Yield the slices; the first slice of each lane has the lane's place."""
        waiting = dict(self.places)
        for part in slices:
            yield replace(part, place=waiting.pop(part.lane, None))

    def note(self, batch: Batch) -> None:
        """Note that a batch was trained on."""
        if batch.streamed is not None:
            self.places[batch.streamed.lane] = batch.streamed.place

    def mine(self) -> list[LanePlace]:
        """Return the places of this rank's lanes in order."""
        return [self.places[lane] for lane in self._mine]

    def state(self, places: Iterable[LanePlace]) -> StreamState:
        """Return the state for a checkpoint, given the places of all ranks' lanes."""
        return StreamState(self._shards, [(place.entry, place.used) for place in places])

    def resume(self, saved: StreamState | None) -> str:
        """Resume from a checkpoint; returns why that is not exact and what happens instead, or an empty text."""
        if saved is None:
            return ""
        if (saved.shards, len(saved.lanes)) == (self._shards, self._all):
            self.places = {lane: LanePlace(*saved.lanes[lane]) for lane in self._mine}
            return ""
        cycle = max(entry for entry, _ in saved.lanes) // saved.shards + 1
        self.places = {lane: LanePlace(cycle * self._shards + lane) for lane in self._mine}
        now, then = _described(self._shards, self._all), _described(saved.shards, len(saved.lanes))
        return f"the stream now has {now}, and {then} in the checkpoint: a new pass over all tars begins"


def _described(shards: int, lanes: int) -> str:
    return f"{plural(shards, 'tar')} and {plural(lanes, 'lane')} (ranks x data workers)"

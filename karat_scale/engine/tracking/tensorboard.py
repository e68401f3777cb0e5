"""TensorBoard: event files in `tensorboard/` of the run's directory, with the figures and histograms."""

import errno
import io
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event as Record
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from karat_scale.engine.tracking.tracker import Event, TrackedRun, figures
from karat_scale.foundation.files import make_folder


class TensorBoard:
    """Writes a new event file at each start. See Tracker."""

    url = ""

    def __init__(self, run: TrackedRun) -> None:
        directory = run.directory / "tensorboard"
        make_folder(directory)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        # Without a buffer: what a full disk refused must not come later.
        self._file = (directory / name).open("wb", buffering=0)
        self._append([Record(wall_time=time.time(), file_version="brain.Event:2")])

    def write(self, events: Sequence[Event]) -> None:
        """Add scalars and histograms."""
        records = []
        for event in events:
            values = [*_scalars(event), *_histograms(event)]
            if values:
                records.append(Record(wall_time=event["time"], step=event["step"], summary=Summary(value=values)))
        self._append(records)

    def upload(self, file: Path, name: str) -> None:
        """Do nothing: the event file lies beside the run's files."""

    def close(self, summary: Event) -> None:
        """Close the event file."""
        self._file.close()

    def _append(self, records: Sequence[Any]) -> None:
        """Write all records, or none of them."""
        buffer, before = io.BytesIO(), self._file.tell()
        writer = RecordWriter(buffer)
        for record in records:
            writer.write(record.SerializeToString())
        try:
            if self._file.write(buffer.getvalue()) != buffer.tell():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        except OSError:
            self._file.truncate(before)
            raise


def _scalars(event: Event) -> Iterator[Any]:
    for name, value in figures(event).items():
        yield Summary.Value(tag=name, simple_value=value)


def _histograms(event: Event) -> Iterator[Any]:
    for name, one in event.get("histograms", {}).items():
        edges, counts = one["edges"], one["counts"]
        histogram = HistogramProto(
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=one["sum"],
            sum_squares=one["sum_squares"],
            bucket_limit=edges[1:],
            bucket=counts,
        )
        yield Summary.Value(tag=name, histo=histogram)

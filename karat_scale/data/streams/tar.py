"""The samples of one shard, as the webdataset library reads and groups them."""

from collections.abc import Iterator
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from karat_scale.data.streams.shard_bytes import ShardBytes, ShardError, opened
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError

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

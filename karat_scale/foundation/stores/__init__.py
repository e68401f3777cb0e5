"""Files by URL, in object stores and on web servers: listings, ranged reads, and writes, all retried. By fsspec.

Credentials and endpoints come from the usual places of the library of each protocol. They are in no URL of ours, and no
message repeats what a library says, since that may hold a signed URL.
"""

from karat_scale.foundation.stores.connection import FileFacts, Sink, check_url, check_writable, is_url
from karat_scale.foundation.stores.failures import DEFAULT_TIMEOUT, ChangedFileError, MissingFileError, StoreError
from karat_scale.foundation.stores.store import Store, WritableStore

__all__ = [
    "DEFAULT_TIMEOUT",
    "ChangedFileError",
    "FileFacts",
    "MissingFileError",
    "Sink",
    "Store",
    "StoreError",
    "WritableStore",
    "check_url",
    "check_writable",
    "is_url",
]

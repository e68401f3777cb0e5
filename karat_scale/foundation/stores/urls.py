"""Which URLs can be used."""

import re
from urllib.parse import urlsplit

# What fsspec needs for each protocol.
PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp", "hf": "huggingface_hub"}
_WRITABLE = ("s3", "gs")


def is_url(text: object) -> bool:
    """True for a text such as s3://bucket/folder, with any protocol."""
    return isinstance(text, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_url(url: str) -> str:
    """Return a URL without a slash at its end.

    Raises:
        ValueError: the protocol is unknown, there is no place in it, or it holds a credential. The message does not
            repeat that.
    """
    parts = urlsplit(url)
    if parts.scheme not in PROTOCOLS:
        raise ValueError(f"{parts.scheme}:// is not supported; use {', '.join(f'{name}://' for name in PROTOCOLS)}")
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{shown} has a user, a query or a fragment, which may be a credential; leave these out, and give "
            "credentials to the store's library (docs/data.md)"
        )
    if not parts.netloc:
        raise ValueError(f"{shown} names no bucket or server")
    return url.rstrip("/")


def check_writable(url: str) -> None:
    """Raise ValueError if files at a URL cannot be written."""
    if urlsplit(url).scheme not in _WRITABLE:
        raise ValueError(f"{url} cannot be written; use {' or '.join(f'{name}://' for name in _WRITABLE)}")

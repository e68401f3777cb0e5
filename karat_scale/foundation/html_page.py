"""HTML pages that open offline: from a package's template, with every text escaped and every image inside."""

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from karat_scale import __version__


def render_page(package: str, template: str, **values: Any) -> str:
    """Return the page of a template in a package's `templates`. Templates also know `version` and the filters below."""
    environment = Environment(
        loader=PackageLoader(package), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"png": _png, "jpeg": _jpeg, "svg": _svg, "cell": _cell, "sort_key": _sort_key}
    return environment.get_template(template).render(version=__version__, **values)


def _png(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _jpeg(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _svg(data: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"


def _cell(value: Any) -> str:
    """Format a number to four figures; a dash if it is undefined."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sort_key(value: Any) -> str:
    return "" if value is None else str(value)

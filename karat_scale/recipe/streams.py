"""What a recipe may say of a stream (`data.order: stream`): the spelling of its tars, and where the class is."""

import re

_LABELS = ("cls", "txt", "path")
# A user in a URL, or a query; a shell variable may stand for both.
_IN_URL = re.compile(r"\w://(?!\$)[^\s/]*@|\w://[^\s'\"]*[?#](?!\$)")
_NAME = r"[\w-]*(?:secret|token|passw(?:or)?d|api[_-]?key|access[_-]?key|credential)[\w-]*"
_IN_COMMAND = (
    re.compile(rf"{_NAME}=(?!['\"]?\$)\S", re.IGNORECASE),
    re.compile(rf"(?:^|\s)--?{_NAME}\s+(?!['\"]?\$)\S", re.IGNORECASE),
    re.compile(r"authorization:(?![^'\"]*\$)", re.IGNORECASE),
    re.compile(r"\s(?:-u|--user)[\s=]+['\"]?[^\s$:]+:(?!\$)\S"),
)


def check_tars(text: str) -> None:
    """Refuse a spelling of tars that holds a credential. The message does not repeat it. Raises ValueError."""
    if _IN_URL.search(text) or any(pattern.search(text) for pattern in _IN_COMMAND):
        raise ValueError(
            "data.stream has a user, a query or a secret in it, which the recipe, the log and each checkpoint would "
            "repeat; leave these out, and let the command take them from a variable of the environment, such as $TOKEN"
        )


def check_label(text: str) -> None:
    """Refuse what says no place of a class. Raises ValueError."""
    kind, _, field = text.partition(":")
    if text not in _LABELS and not (kind == "json" and field):
        raise ValueError(f"data.stream_label = {text}: should be one of cls, json:FIELD, txt, path")

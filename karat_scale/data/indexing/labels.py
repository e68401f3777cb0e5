"""Where a sample's class is written: in `.cls`, in a field of `.json`, in `.txt`, or in the path of the image."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from karat_scale.data.shards.tar_headers import Member
from karat_scale.foundation.errors import DataError

Label = int | str
"""A class's number or name."""
# Fields of .json that are taken for the class without being asked for.
_USUAL_FIELDS = ("label", "cls", "class", "class_id")
# Python refuses to read numbers of thousands of digits.
_MOST_DIGITS = 20
RULES = "cls, json:FIELD, txt, path"


class NoLabelError(Exception):
    """A sample has no usable label; the message is the reason."""


@dataclass(frozen=True)
class LabelRule:
    """Reads the label of a sample.

    Attributes:
        kind: the suffix of the member that has it, or "path".
        field: the field of a JSON object, with dots for objects inside; "" for other kinds.
    """

    kind: str
    field: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.field}" if self.field else self.kind

    @staticmethod
    def parse(text: str) -> "LabelRule":
        """Return the rule that `--label` names. Raises DataError."""
        kind, colon, field = text.partition(":")
        if kind not in ("cls", "json", "txt", "path") or bool(colon) != (kind == "json") or (colon and not field):
            raise DataError(f"--label {text}: should be one of auto, {RULES}")
        return LabelRule(kind, field)

    def split_name(self, name: str) -> tuple[str, str]:
        """Return the key and the suffix, in small letters, of a member; an empty key for one that is in no sample."""
        folder, slash, file = name.removeprefix("./").rpartition("/")
        stem, dot, suffix = file.rpartition(".") if self.kind == "path" else file.partition(".")
        is_hidden = not stem or not dot
        return ("", "") if is_hidden else (f"{folder}{slash}{stem}", suffix.lower())

    def source(self, members: Mapping[str, Member]) -> Member | None:
        """Return the member to read; None if the path says the class. Raises NoLabelError."""
        if self.kind == "path":
            return None
        if self.kind not in members:
            raise NoLabelError(f"no label: .{self.kind} is missing")
        return members[self.kind]

    def label(self, path: str, content: bytes) -> Label:
        """Return the label of the image at `path`, given the content of its source. Raises NoLabelError."""
        if self.kind == "path":
            folder = path.removeprefix("./").rpartition("/")[0].rpartition("/")[2]
            return _named(folder, "the image is in no class folder")
        try:
            text = content.decode().strip()
        except UnicodeDecodeError:
            raise NoLabelError(f"no label: .{self.kind} is no UTF-8") from None
        value = self._field_of(text) if self.kind == "json" else text
        if isinstance(value, str) and value.removeprefix("-").isdecimal():
            if len(value) > _MOST_DIGITS:
                raise NoLabelError(f"no label: {self} is a number of {len(value)} digits")
            return int(value)
        if isinstance(value, str):
            return _named(value, f".{self.kind} is empty")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise NoLabelError(f"no label: {self} is {json.dumps(value)}, neither a number nor a name")

    def _field_of(self, text: str) -> Any:
        try:
            value: Any = json.loads(text)
            for name in self.field.split("."):
                value = value[name]
        except (ValueError, RecursionError):
            raise NoLabelError("no label: .json is damaged") from None
        except (KeyError, TypeError, IndexError):
            raise NoLabelError(f"no label: .json has no field {self.field}") from None
        return value


def _named(name: str, otherwise: str) -> str:
    if not name:
        raise NoLabelError(f"no label: {otherwise}")
    return name


def number_of(label: Label, numbers: dict[str, int]) -> int:
    """Return the number of a class, given the numbers of the names."""
    return numbers[label] if isinstance(label, str) else label


def class_name_in(content: bytes) -> str:
    """Return what a sample's .json says as class_name; an empty text if it says nothing."""
    try:
        name = json.loads(content).get("class_name")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return name.strip() if isinstance(name, str) else ""


def guess_rule(suffixes: Mapping[str, int], first_json: bytes | None, where: str) -> LabelRule:
    """Return the rule that fits a tar.

    Args:
        suffixes: the number of members with each suffix.
        first_json: the content of one `.json`, if there is any.
        where: the tar's name, for errors.

    Raises:
        DataError: nothing in it is a class for certain.
    """
    if "cls" in suffixes:
        return LabelRule("cls")
    if first_json is not None:
        try:
            fields = [key for key, value in json.loads(first_json).items() if isinstance(value, int | str)]
        except (ValueError, AttributeError, RecursionError):
            fields = []
        for field in _USUAL_FIELDS:
            if field in fields:
                return LabelRule("json", field)
        raise DataError(f"{where}: choose the class by --label json:FIELD; .json has the fields {', '.join(fields)}")
    return LabelRule("txt") if "txt" in suffixes else LabelRule("path")

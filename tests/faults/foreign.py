"""Hostile values for each key in the recipe of somebody else's run, and a detector that notices their effects.

A command may read what the recipe names as data, and nothing else. It must start nothing, and open nothing in the
folder `outside`, which also has the module of a hostile class. The files are watched by inotify, which also sees what
C++ and other processes open.
"""

import ctypes
import os
import struct
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import flatten

MODULE = "foreign_class"
# These keys say where the data are, and the user asks for these to be read.
DATA = ("data.path", "data.stream", "data.train_split", "data.val_split")
_OPEN, _MODIFY, _CREATE, _IS_FOLDER = 0x20, 0x2, 0x100, 0x40000000
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")


def hostile_values(outside: Path) -> list[str]:
    """Return spellings of a command, of a class, and of files in `outside`, for any key."""
    command = f"touch {outside}/pwned"
    commands = [
        *(f"{spelled}:{command}" for spelled in ("pipe", "{p,p}ipe", "{p..p}ipe", r"p\ipe", " pipe", "PIPE", "\tpipe")),
        *(f"{spelled}:{command}" for spelled in ("x.tar::pipe", "${PIPE}", r"pi{,}pe", "{pipe,pipe}", "p{i..i}pe")),
        *("${ALL}", "${DEEP}", f"{{pipe:{command},x.tar}}", f"file:pipe:{command}", f"|{command}", f"!{command}", "-"),
        *(f"$({command})", f"`{command}`", f"https://127.0.0.1:9/'; {command}; '", f"gs://x/$({command})"),
        *(f"!!python/object/apply:os.system ['{command}']", "https://127.0.0.1:9/${SECRET}", f"{{{{{command}}}}}"),
    ]
    classes = [f"{MODULE}:Foreign", f"{MODULE}.Foreign", f"{{{MODULE},x}}:Foreign", "${MODULE}:Foreign"]
    files = []
    for name in ("secret.tar", "secret.yaml", "secret.json", "secret.safetensors", "secret.pth", "run"):
        path = f"{outside}/{name}"
        files += [path, f"~/{name}", f"$HOME/{name}", f"../../{outside.name}/{name}", f"{path}/checkpoints/best"]
        files += [f"{kind}{path}" for kind in ("file://", "memory://", "local-dir:", "timm:local-dir:")]
        files.append(f"{path[:-1]}{{{path[-1]},}}")
    return [*commands, *classes, *files]


def text_keys(recipe: Recipe) -> list[str]:
    """Return the keys of a recipe that accept text, alone or in a list."""
    return [key for key in flatten(recipe) if _takes_text(_annotation(type(recipe), key))]


def _annotation(section: Any, key: str) -> Any:
    first, _, rest = key.partition(".")
    field = next(field for name, field in section.model_fields.items() if first in (name, field.alias))
    return _annotation(field.annotation, rest) if rest else field.annotation


def _takes_text(kind: Any) -> bool:
    return kind is str or any(map(_takes_text, typing.get_args(kind)))


def as_value(recipe: Recipe, key: str, text: str) -> Any:
    """Return a text as the value of a key, in a list if the key has one."""
    return [text] if isinstance(flatten(recipe)[key], list) else text


class Effects:
    """What happened: processes that were started with a hostile value, and files that were opened."""

    def __init__(self, outside: Path) -> None:
        self.outside = outside
        self.started: list[str] = []
        self.opened: set[str] = set()
        self.written: set[str] = set()

    def found(self, may_read: bool = False) -> list[str]:
        """Return in words what must not have happened; with `may_read`, files may have been opened."""
        opened = self.written if may_read else self.opened | self.written
        return [*(f"started {text}" for text in self.started), *(f"opened {name}" for name in sorted(opened))]


_watching: Effects | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is not None and event in _STARTS:
        what = repr(arguments[:2])
        if "pwned" in what or "s3cret" in what:
            _watching.started.append(what[:300])


@contextmanager
def watched(outside: Path) -> Iterator[Effects]:
    """Note what happens inside the block, also in processes that it starts."""
    global _watching
    if not getattr(sys, "_karat_foreign_hook", False):  # a hook cannot be removed
        sys.addaudithook(_hook)
        sys._karat_foreign_hook = True  # type: ignore[attr-defined]
    libc = ctypes.CDLL(None, use_errno=True)
    notes = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    folders = {}
    for folder in (outside, *(path for path in outside.rglob("*") if path.is_dir())):
        folders[libc.inotify_add_watch(notes, os.fsencode(folder), _OPEN | _MODIFY | _CREATE)] = folder
    assert notes >= 0
    assert -1 not in folders
    effects = _watching = Effects(outside)
    try:
        yield effects
    finally:
        _watching = None
        for watch, mask, name in _read(notes):
            if not mask & _IS_FOLDER:
                (effects.opened if mask & _OPEN else effects.written).add(str(folders[watch] / name))
        os.close(notes)


def _read(notes: int) -> Iterator[tuple[int, int, str]]:
    """Yield the events of inotify(7): a watch, a mask, and the name of a file in the watched folder."""
    while True:
        try:
            data = os.read(notes, 1 << 16)
        except BlockingIOError:
            return
        while data:
            watch, mask, _, length = struct.unpack_from("iIII", data)
            yield watch, mask, os.fsdecode(data[16 : 16 + length].rstrip(b"\0"))
            data = data[16 + length :]

"""A grammar of random recipes in YAML: keys of the schema and others, with right and wrong values and odd YAML."""

import json
import random
from collections.abc import Callable
from functools import cache, partial

from karat_scale.recipe import RunRecipe
from karat_scale.recipe.files import shipped_recipes
from karat_scale.recipe.loading import flatten, load_recipe

NUMBERS = ("0", "-1", "1", "3.5", "1e-3", "1e400", "-1e400", ".nan", ".inf", "-.inf", "1_000", "0x1F", "0o17", "0b11")
DATES = ("2001-01-01", "2001-02-30", "2001-13-45", "0000-00-00", "99999-01-01", "2001-01-01T25:61:61Z", "190:20:30")
WORDS = (
    *("", "~", "null", "yes", "off", "true", "'no'", "auto", "=", "<<", "?"),
    *("é", "名前", "🦎", "\u202eabc", "\u0000"),
)
QUOTED = (
    *('"\\0"', '"\\x1b[2J"', '"\\ud800"', '"a\\nb"', "'[link=x]y[/link]'", '"[/x]"', '"%s{}%n"', '"../../x"'),
    "/dev/zero",
)
TAGS = (
    *("!!python/object/apply:os.system [exit 1]", "!!python/name:os.system", "!!binary abc", "!!binary 'w6k='"),
    *("!!set {a, b}", "!!omap [a: 1]", "!!timestamp x", "!!int x", "!!int ''", "!!float ''", "!!set [a]", "!!map [a]"),
    *("!!seq {a: 1}", "!!pairs [a]", "!!omap {a: 1}", "!!str [a]", "!!bool x", "!!float [1]", "!!null x"),
    *("!unknown 1", "! 1"),
)
ANCHORS = (
    *("&a 1", "*a", "&b [*b]", "&c {x: *c}", "*none", "&d [1, 2]", "[*d, *d]"),
    *("{<<: *d}", "{<<: {a: 1}}", "{<<: 1}"),
)
KEYS = (
    *("? [1, 2]", "? {a: 1}", "1", "null", "true", "2001-01-01", ".nan", "'a.b'", "<<", "model.depth"),
    *("é", "🦎", '"\\0"'),
)
CUTS = (
    *("\t", "\r", "\x00", "\ufeff", "\u2028", "---\n", "...\n", "%YAML 9.9\n", "%TAG ! x\n"),
    *("- ", ": ", "#", "{", "]", "'", '"', "|"),
)


class Grammar:
    """Random recipes of one kind."""

    def __init__(self, schema: type[RunRecipe], random_numbers: random.Random) -> None:
        self._random, self._schema = random_numbers, schema
        # Most recipes have few odd things, because the first one that is refused hides the others.
        self._oddness = self._random.choice((0.01, 0.05, 0.3))
        self._base = self._random.choice(sorted(shipped_recipes(schema.shipped)))
        self._fitting = _fitting(schema, self._base)
        self._sections = {key.partition(".")[0] for key in self._fitting if "." in key}

    def recipe(self) -> bytes:
        """Return the bytes of a recipe's file."""
        lines = [] if self._is_odd() else [f"extends: {self._base}"]
        lines += [self._line("", self._random.choice(KEYS)) for _ in range(3) if self._is_odd()]
        lines += map(self._section, self._random.sample(sorted(self._sections), self._random.randrange(6)))
        lines += [lines[-1]] if lines and self._is_odd() else []
        text = "\n".join(lines) + "\n"
        for _ in range(3):
            text = self._cut(text) if self._is_odd() else text
        data = text.encode("utf-8", "surrogatepass")
        return data[:9] + b"\xff\xfe" + data[9:] if self._random.random() < 0.01 else data

    def override(self) -> str:
        """Return an argument `key=value`."""
        key = self._random.choice(list(self._fitting))
        if self._is_odd():
            key = self._random.choice((*KEYS, "", "a" * 10_000, "model..depth", "run.name.x", f"{key} ", "data"))
        equals = self._random.choice(("", "==")) if self._is_odd() else "="
        return f"{key}{equals}{self._value(key)}".replace("\x00", "")

    def _is_odd(self) -> bool:
        return self._random.random() < self._oddness

    def _section(self, section: str) -> str:
        if self._is_odd():
            return f"{section}: {self._value(section)}"
        keys = [key for key in self._fitting if key.startswith(f"{section}.")]
        chosen = self._random.sample(keys, min(len(keys), self._random.randrange(5)))
        lines = [self._line("  ", key.partition(".")[2], key) for key in chosen]
        lines += [self._line("  ", self._random.choice(KEYS)) for _ in range(1) if self._is_odd()]
        return "\n".join([f"{section}:", *lines])

    def _line(self, indent: str, name: str, key: str = "") -> str:
        # A key of a section in a section is written as a map.
        *parents, leaf = name.split(".") if key else [name]
        opened, closed = "".join(f"{parent}: {{" for parent in parents), "}" * len(parents)
        return f"{indent}{opened}{leaf}: {self._value(key)}{closed}"

    def _value(self, key: str, depth: int = 0) -> str:
        if key in self._fitting and not self._is_odd():
            return self._fitting[key]
        kinds: tuple[Callable[[], str], ...] = (
            *(partial(self._random.choice, words) for words in (NUMBERS, DATES, WORDS, QUOTED, TAGS, ANCHORS)),
            lambda: self._random.choice(list(self._fitting.values())),
            lambda: self._list(depth),
            lambda: self._map(depth),
            self._extreme,
        )
        return self._random.choice(kinds)()

    def _list(self, depth: int) -> str:
        items = [self._value("", depth + 1) for _ in range(self._random.randrange(4))] if depth < 3 else []
        return f"[{', '.join(items)}]"

    def _map(self, depth: int) -> str:
        keys = self._random.sample(KEYS, self._random.randrange(3)) if depth < 3 else []
        items = [f"{key}: {self._value('', depth + 1)}" for key in keys]
        return f"{{{', '.join(items)}}}"

    def _extreme(self) -> str:
        size = self._random.choice((50, 500, 5000))
        nested = "[" * size + "]" * size, "{a: " * size + "}" * size, "[" * size
        return self._random.choice(("9" * size, "a" * size, f"[{'1, ' * size}]", *nested))

    def _cut(self, text: str) -> str:
        at = self._random.randrange(len(text))
        to = at + self._random.choice((0, 0, 1, 5, len(text)))
        return text[:at] + self._random.choice(("", *CUTS)) + text[to:]


@cache
def _fitting(schema: type[RunRecipe], name: str) -> dict[str, str]:
    """Return the values of a shipped recipe as YAML, by dotted key."""
    recipe = load_recipe(name, (), schema)
    values = {key: json.dumps(value) for key, value in flatten(recipe).items() if key not in ("run.name", "run.dir")}
    return values | {"run.name": "x", "run.dir": "/tmp/x"}

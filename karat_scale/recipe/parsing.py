"""YAML as recipes use it: plain values, each key once, and never more than a recipe can need."""

from collections.abc import Hashable
from typing import Any

import yaml

_MOST_NODES = 10_000  # values in a recipe


def parse(text: str) -> Any:
    """Return what YAML text says. Raises YAMLError, with the line where there is one."""
    try:
        tree = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply; a recipe has sections and keys") from None
    _check_nodes(tree)
    return tree


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys, of which PyYAML keeps the last one, and values that Python cannot hold."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # such as `!!set [a]`
            raise _error(f"a list or a text cannot be read as {_kind(node)}", node)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _error("a key is a list or a map", key_node)
            if key in seen:
                raise _error(f"key {key!r} appears twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, ArithmeticError):
            # PyYAML's own constructors: the 30th of February, `!!int x`, a number of 5,000 digits.
            said = str(node.value)[:40]
            raise _error(f"{said!r} cannot be read as {_kind(node)}; put a text in quotes", node) from None


def _kind(node: yaml.Node) -> str:
    return str(node.tag).rpartition(":")[2]


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check_nodes(tree: object) -> None:
    """Refuse keys that are no names, and what grows beyond all bounds with its aliases. Raises YAMLError."""
    left, seen = [tree], 0
    while left:
        node = left.pop()
        seen += 1
        others = [key for key in node if not isinstance(key, str)] if isinstance(node, dict) else []
        if others:
            raise yaml.YAMLError(f"key {str(others[0])[:100]} should be a name")
        if seen > _MOST_NODES:
            raise yaml.YAMLError(f"more than {_MOST_NODES:,} values, aliases written out")
        left += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()

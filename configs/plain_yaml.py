"""Reads YAML of plain values, as settings files have it, within bounds.

Aliases are refused, since a few hundred bytes of them can describe more than a memory holds, and so is every tag but
those of mappings, lists, text, numbers, true, false and null. A date is text.
"""

from typing import Any

import yaml

MAX_NUMBER = 100  # characters; arithmetic on longer ones takes time that grows with the square of their length
_MAX_REASON = 300  # characters; the parser repeats what it read
_PREFIX = "tag:yaml.org,2002:"
_TYPES = ("map", "seq", "str", "int", "float", "bool", "null")
_TAGS = {f"{_PREFIX}{name}" for name in _TYPES}


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]  # a library without types
    """PyYAML's safe loader without aliases, tags of other types, and numbers without bound."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error(f"an alias (*{event.anchor}); write the value itself", event.start_mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _TAGS:
            raise _error(f"a value of the type {node.tag}; use text, numbers, true, false, null", node.start_mark)
        is_number = node.tag in (f"{_PREFIX}int", f"{_PREFIX}float")
        if is_number and isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_NUMBER:
            raise _error(f"a number of {len(node.value):,} characters; use at most {MAX_NUMBER}", node.start_mark)
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise _error("a key that stands twice; keep one of them", node.start_mark)
        return mapping


def _plain_resolvers() -> dict[str, list[Any]]:
    """PyYAML's table of the types that unquoted text can have, without those that are refused."""
    resolvers: dict[str, list[Any]] = {}
    for first, choices in yaml.SafeLoader.yaml_implicit_resolvers.items():
        resolvers[first] = [choice for choice in choices if choice[0] in _TAGS]
    return resolvers


_PlainLoader.yaml_implicit_resolvers = _plain_resolvers()


def _error(message: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"{message:.200}", problem_mark=mark)


def parse_yaml(text: str) -> Any:
    """The plain value of a YAML text.

    Raises:
        ValueError: no YAML, or more than plain values; its text is one line.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except yaml.MarkedYAMLError as error:
        raise ValueError(_reason(error)) from error
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(_one_line(str(error))) from error  # the constructors' own, on values not of their tag


def _reason(error: yaml.MarkedYAMLError) -> str:
    """The parser's message with the line and column, which counts from 1."""
    words = [part for part in (error.context, error.problem) if part]
    mark = error.problem_mark or error.context_mark
    if mark is not None:
        words.append(f"(line {mark.line + 1}, column {mark.column + 1})")
    return _one_line(" ".join(words))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    printable = line.encode("utf-8", "backslashreplace").decode()
    if len(printable) > _MAX_REASON:
        return f"{printable[:_MAX_REASON]}…"
    return printable

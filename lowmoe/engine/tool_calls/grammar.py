"""Grammars of calls in llguidance's Lark.

Knows:        its notation: rules, literals, tokens by their ids, JSON schemas inside a grammar.
Ignorant of:  how any model writes a call.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowmoe.engine.messages import Tool

# As templates spell JSON; a weak model that may put blanks anywhere puts nothing else. What of a
# schema llguidance does not know is left out of the grammar: clients check arguments themselves.
_SPELLING = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": True,
}

_FOR_PEOPLE = frozenset({"$comment", "default", "description", "examples", "title"})
_ROOTS = ("$defs", "definitions")
_OF_SCHEMAS = frozenset({*_ROOTS, "patternProperties", "properties"})  # by names
_VALUES = frozenset({"const", "enum"})

# What else in an object's schema may let properties in.
_OPENING = frozenset({"$ref", "allOf", "anyOf", "if", "oneOf", "patternProperties"})

ANY_TEXT = "/(?s:.*)/"


class GrammarWriter:
    """token_ids: of the tags that are tokens."""

    def __init__(self, token_ids: Mapping[str, int]) -> None:
        self._token_ids = token_ids
        self._rules: list[str] = []

    def rule(self, body: str, *, options: str = "") -> str:
        """Write a rule down; its name."""
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def whole(self, start: str) -> str:
        """The grammar of what `start` derives."""
        return "\n".join([f"start: {start}", *self._rules, ""])

    def tag(self, tag: str) -> str:
        """A tag as a model writes it."""
        if tag in self._token_ids:
            return f"<[{self._token_ids[tag]}]>"
        return literal(tag)

    def text_before(self, tag: str) -> str:
        """Any text, and the tag that ends it."""
        if tag in self._token_ids:
            return f"{ANY_TEXT} {self.tag(tag)}"
        return self.rule(ANY_TEXT, options=f"[suffix={literal(tag)}]")

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON that the schema accepts."""
        return self.rule("%json " + json.dumps({**_bare(schema), "x-guidance": _SPELLING}))

    def arguments(self, tool: Tool) -> str:
        """The JSON of its arguments: only those it names, unless its schema speaks of others."""
        schema = tool.parameters
        is_closed = "properties" in schema and not _OPENING & schema.keys()
        return self.json({"additionalProperties": False, **schema} if is_closed else schema)

    def parameter(self, tool: Tool, schema: Any) -> str:
        """The JSON of one of its parameters, whose schema may refer to the tool's."""
        roots = {key: tool.parameters[key] for key in _ROOTS if key in tool.parameters}
        return self.json({**roots, **schema} if isinstance(schema, Mapping) else {})

    def call_object(self, tool: Tool, *, key: str = "arguments") -> str:
        """{"name": ..., "arguments": {...}}"""
        head = literal(f'{{"name": "{tool.name}", "{key}": ')
        return self.rule(f'{head} {self.arguments(tool)} "}}"')

    def call_list(self, tools: Sequence[Tool], *, many: bool) -> str:
        """A JSON list of such calls."""
        one = self.rule(any_of([self.call_object(tool) for tool in tools]))
        return f'"[" {one_or_more(one, literal(", ")) if many else one} "]"'


def _bare(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without what is written in it for people, which may be most of it."""
    return {key: _part(key, value) for key, value in schema.items() if key not in _FOR_PEOPLE}


def _part(key: str, value: Any) -> Any:
    if key in _OF_SCHEMAS and isinstance(value, Mapping):
        return {k: _bare(v) if isinstance(v, Mapping) else v for k, v in value.items()}
    if key in _VALUES:
        return value
    if isinstance(value, list | tuple):
        return [_bare(v) if isinstance(v, Mapping) else v for v in value]
    return _bare(value) if isinstance(value, Mapping) else value


def literal(text: str) -> str:
    """Just this text."""
    return json.dumps(text, ensure_ascii=False)


def any_of(choices: Sequence[str]) -> str:
    """One of them."""
    return f"({' | '.join(choices)})"


def one_or_more(item: str, separator: str = "") -> str:
    """separator: written between two, already in the grammar's notation."""
    return f"{item} ({separator} {item})*"

"""Texts that come in parts, as OpenAI's clients write them.

Knows:        which parts are texts, what may stand beside the text.
Ignorant of:  whose text it is.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from lowmoe.server.fields import MAX_PARTS, fault

# Of a part: hints where a prompt's cache should end; what answers have, and OpenAI's client adds.
_IGNORED_IN_PARTS = frozenset(
    ("cache_control", "prompt_cache_breakpoint", "annotations", "logprobs", "parsed")
)


def parts(*types: str) -> BeforeValidator:
    """Text, or a list of parts of these types, as one text: parts follow each other unspaced.

    Parts of other types, images above all, are refused by the name of their type.
    """

    def join(value: object) -> object:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise fault("must be a text or a list of parts")
        if len(value) > MAX_PARTS:
            raise fault("holds {n} parts, {most} are the most", n=len(value), most=MAX_PARTS)
        return "".join(_text_of(part, types) for part in value)

    # What it reads, as the served description says it.
    part = {
        "type": "object",
        "properties": {"type": {"enum": list(types)}, "text": {"type": "string"}},
        "required": ["type"],
    }
    described = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}
    return BeforeValidator(join, json_schema_input_type=Annotated[Any, WithJsonSchema(described)])


def _text_of(part: object, types: tuple[str, ...]) -> str:
    if not isinstance(part, dict):
        raise fault("holds a part that is no object")
    kind = part.get("type")
    if kind not in types:
        raise fault(
            "holds a part of type {kind}, which is not supported. Give {types}",
            kind=repr(kind)[:100],
            types=" or ".join(types),
        )
    key = "refusal" if kind == "refusal" else "text"
    for name in part.keys() - _IGNORED_IN_PARTS - {"type", key}:
        raise fault("holds a part with {name}, which is not supported", name=repr(name)[:100])
    text = part.get(key)
    if not isinstance(text, str):
        raise fault("holds a part of type {kind} without {key}, a text", kind=kind, key=key)
    return text

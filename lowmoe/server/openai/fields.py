"""What the fields of a request have in common: strictness, bounds, refusals by name.

Knows:        how much of anything a request may hold; how a field says that it is not supported.
Ignorant of:  which field is of which request.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

# A body holds 8 MiB at most; these bound what is made of it.
MAX_MESSAGES = 10_000
MAX_PARTS = 1_000
MAX_TOOLS = 128
MAX_CHARS = 8_000_000
# A compiler of grammars is given no more than this; its time grows with both.
MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 65_536, 32


class Fields(BaseModel):
    """A part of a request: of these types exactly, and of no other names."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=()
    )


def fault(message: str, **words: object) -> PydanticCustomError:
    """What to raise in a validator: a message without a full stop, after the field's name."""
    return PydanticCustomError("lowmoe", message, words)


def only(*neutral: object) -> AfterValidator:
    """For a field that is not supported: it may be there, as long as it asks for nothing."""

    def check(value: object) -> object:
        # 1 == True and 0 == 0.0 are meant.
        if value is not None and value not in neutral:
            known = " or ".join(repr(one) for one in neutral)
            raise fault(
                "is not supported. Leave it out{others}",
                others=f", or give {known}" if known else "",
            )
        return value

    return AfterValidator(check)


Refused: TypeAlias = Annotated[Any, only()]
# What the API itself calls an annotation, or a hint that changes no answer.
Ignored: TypeAlias = Any

Text: TypeAlias = Annotated[str, Field(max_length=MAX_CHARS)]
Identity: TypeAlias = Annotated[str, Field(min_length=1, max_length=512)]
FunctionName: TypeAlias = Annotated[
    str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_.:/-]+$")
]


def _bounded(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema itself.  Counts without recursion: its nesting is a client's choice."""
    n_bytes, level = 0, [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                n_bytes += sum(map(len, value)) + len(value)
                below += value.values()
            elif isinstance(value, list):
                n_bytes += len(value)
                below += value
            else:
                n_bytes += len(value) if isinstance(value, str) else 8
        if n_bytes > MAX_SCHEMA_BYTES:
            raise fault("is larger than {most} bytes", most=MAX_SCHEMA_BYTES)
        if not below:
            return schema
        level = below
    raise fault("is nested deeper than {most}", most=MAX_SCHEMA_DEPTH)


Schema: TypeAlias = Annotated[dict[str, Any], AfterValidator(_bounded)]


# Of a part: hints where a prompt's cache should end, and what answers come with.
_IGNORED_IN_PARTS = {"cache_control", "prompt_cache_breakpoint", "annotations", "logprobs"}


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

"""What the fields of a request have in common: strictness, bounds, refusals by name.

Knows:        how much of anything a request may hold; how a field says that it is not supported.
Ignorant of:  which field is of which request, of whose dialect.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# A body holds 8 MiB at most; these bound what is made of it.
MAX_MESSAGES = 10_000
MAX_PARTS = 1_000
MAX_TOOLS = 128
MAX_NAME = 128  # characters of a tool's
MAX_CHARS = 8_000_000
MAX_TOKENS = 10_000_000  # of one answer; the context ends it before
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

MaxTokens: TypeAlias = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Text: TypeAlias = Annotated[str, Field(max_length=MAX_CHARS)]
Identity: TypeAlias = Annotated[str, Field(min_length=1, max_length=512)]
FunctionName: TypeAlias = Annotated[
    str, Field(min_length=1, max_length=MAX_NAME, pattern=r"^[a-zA-Z0-9_.:/-]+$")
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

"""Tools that a model may call, as chat completions and responses describe them.

Knows:        what a function's description holds, how a client says which must be called.
Ignorant of:  how a model calls.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import from_json

from lowmoe.engine.messages import Tool, ToolCall, ToolChoice
from lowmoe.server.errors import FieldError
from lowmoe.server.fields import (
    MAX_CHARS,
    MAX_NAME,
    MAX_TOOLS,
    Fields,
    FunctionName,
    Identity,
    Ignored,
    Schema,
    Text,
    fault,
)
from lowmoe.server.tool_choice import require_agreeing


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call that a client sends back; an empty text is no arguments.

    Raises ValueError.
    """
    # As strict as bodies are read: no NaN, no halves of surrogate pairs, 200 levels at most.
    read = from_json(text, allow_inf_nan=False) if text.strip() else {}
    if not isinstance(read, dict):
        raise ValueError(text)
    return read


def _arguments(text: str) -> str:
    try:
        read_arguments(text)
    except ValueError:
        raise fault("is {text}, but must be a JSON object", text=repr(text)[:100]) from None
    return text


Arguments: TypeAlias = Annotated[str, Field(max_length=MAX_CHARS), AfterValidator(_arguments)]


class CalledFunction(Fields):
    """What was called, and with what.  parsed_arguments: left there by OpenAI's client."""

    name: FunctionName
    arguments: Arguments
    parsed_arguments: Ignored = None


class CallFields(Fields):
    """One call of an earlier answer.  index: left there by who put it together from a stream."""

    id: Identity
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Ignored = None

    def call(self) -> ToolCall:
        """In nobody's dialect."""
        arguments = read_arguments(self.function.arguments)
        return ToolCall(id=self.id, name=self.function.name, arguments=arguments)


class FunctionFields(Fields):
    """A function.  strict: calls keep to the parameters as well as they do without it."""

    name: FunctionName
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """In nobody's dialect."""
        description = self.description or ""
        if not self.parameters:
            return Tool(name=self.name, description=description)
        return Tool(name=self.name, description=description, parameters=self.parameters)


class ToolFields(Fields):
    """A tool of chat completions; only functions are known here."""

    type: Literal["function"]
    function: FunctionFields


class ToolOfResponses(FunctionFields):
    """A function of responses."""

    type: Literal["function"]


class Namespace(Fields):
    """Functions of responses under one name, as codex sends those of others."""

    type: Literal["namespace"]
    name: FunctionName
    description: Text | None = None
    tools: Annotated[list[ToolOfResponses], Field(max_length=MAX_TOOLS)]

    def functions(self) -> Iterator[FunctionFields]:
        """Each by the name that the model knows it by.  Raises FieldError for one too long."""
        for one in self.tools:
            name = name_in(self.name, one.name)
            if len(name) > MAX_NAME:
                raise FieldError(
                    "tools",
                    f"{one.name} of {self.name} makes a name of {len(name)} characters, but "
                    f"{MAX_NAME} are the most. Shorten one of them.",
                )
            yield FunctionFields(name=name, description=one.description, parameters=one.parameters)


def name_in(namespace: str | None, name: str) -> str:
    """What the model calls a function of a namespace, or of none."""
    return name if namespace is None else f"{namespace}__{name}"


def _of_type(*known: str) -> BeforeValidator:
    def check(tool: object) -> object:
        kind = tool.get("type") if isinstance(tool, dict) else known[0]
        if kind not in known:
            raise fault(
                "is of type {kind}, which is not supported. Give {known}",
                kind=repr(kind)[:100],
                known=" or ".join(known),
            )
        return tool

    return BeforeValidator(check)


Tools: TypeAlias = Annotated[
    list[Annotated[ToolFields, _of_type("function")]], Field(max_length=MAX_TOOLS)
]
ToolsOfResponses: TypeAlias = Annotated[
    list[
        Annotated[
            ToolOfResponses | Namespace,
            Field(discriminator="type"),
            _of_type("function", "namespace"),
        ]
    ],
    Field(max_length=MAX_TOOLS),
]


class Choice(Fields):
    """Which tool must be called.  name: only this one."""

    mode: Literal["none", "auto", "required"]
    name: FunctionName | None = None


class _NamedFunction(Fields):
    name: FunctionName


class _NamedTool(Fields):
    type: Literal["function"]
    function: _NamedFunction


class _NamedToolOfResponses(_NamedFunction):
    type: Literal["function"]


def _choice(value: object) -> object:
    if value is None:
        return value
    if isinstance(value, str):
        return {"mode": value}
    match value:
        case {"type": "function", "function": {"name": name, **rest}, **more}:
            return {"mode": "required", "name": name, **rest, **more}
        case {"type": "function", "name": name, **rest}:
            return {"mode": "required", "name": name, **rest}
    raise fault("is neither none, auto or required nor a function by its name")


_Mode: TypeAlias = Literal["none", "auto", "required"]
ToolChoiceField: TypeAlias = Annotated[
    Choice | None, BeforeValidator(_choice, json_schema_input_type=_Mode | _NamedTool | None)
]
ToolChoiceOfResponses: TypeAlias = Annotated[
    Choice | None,
    BeforeValidator(_choice, json_schema_input_type=_Mode | _NamedToolOfResponses | None),
]


def settle(
    tools: Sequence[FunctionFields],
    choice: Choice | None,
    parallel: bool | None,
    *,
    has_form: bool,
) -> tuple[tuple[Tool, ...], ToolChoice]:
    """Tools and which of them to call, in nobody's dialect.  has_form: the answer must have one;
    then none of the tools may be called, and they are left out.

    Raises FieldError for tools of one name, and for a choice that these tools or the form do not
    allow.
    """
    choice = choice or Choice(mode="auto")
    # Who names a tool gets one call of it, and clients take the first of one apart.
    several = parallel is not False and choice.name is None
    settled = ToolChoice(mode=choice.mode, name=choice.name, parallel=several)
    described = tuple(tool.tool() for tool in tools)
    require_agreeing(described, settled)
    if has_form and described and settled.mode != "none":
        raise FieldError("tools", "cannot be together with a form of the answer. Leave one.")
    return () if has_form else described, settled

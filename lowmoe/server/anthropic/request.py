"""The bodies of /v1/messages and of its count_tokens, as an Ask.

Knows:        their fields, which of them go together.
Ignorant of:  answers, HTTP.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from lowmoe.engine.constraint import JsonSchema
from lowmoe.engine.messages import Tool, ToolChoice
from lowmoe.engine.options import MAX_STOP_CHARS, MAX_STOPS
from lowmoe.server.anthropic.blocks import Texts, TurnsField, read_turns
from lowmoe.server.asking import Ask, Sampling
from lowmoe.server.errors import FieldError
from lowmoe.server.fields import (
    MAX_TOOLS,
    Fields,
    FunctionName,
    Identity,
    Ignored,
    MaxTokens,
    Refused,
    Schema,
    Text,
    only,
)
from lowmoe.server.tool_choice import require_agreeing


class ToolFields(Fields):
    """A tool that the client runs; Anthropic's own, which its servers run, are refused by type.

    strict: calls keep to the schema as well as they do without it.
    """

    type: Literal["custom"] | None = None
    name: FunctionName
    description: Text = ""
    input_schema: Schema
    strict: bool | None = None
    cache_control: Ignored = None
    eager_input_streaming: Ignored = None
    allowed_callers: Annotated[Any, only(["direct"])] = None
    defer_loading: Annotated[Any, only(False)] = None
    input_examples: Annotated[Any, only([])] = None


class AutoChoice(Fields):
    """As the model likes."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool = False


class AnyChoice(Fields):
    """At least one of them."""

    type: Literal["any"]
    disable_parallel_tool_use: bool = False


class NamedChoice(Fields):
    """This one."""

    type: Literal["tool"]
    name: FunctionName
    disable_parallel_tool_use: bool = False


class NoChoice(Fields):
    """None of them."""

    type: Literal["none"]


_Choice: TypeAlias = Annotated[
    AutoChoice | AnyChoice | NamedChoice | NoChoice, Field(discriminator="type")
]
_KEEPS_ALL = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
_MODES: dict[str, Literal["none", "auto", "required"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}


def _choice(fields: _Choice | None) -> ToolChoice:
    if fields is None:
        return ToolChoice()
    if isinstance(fields, NamedChoice):  # one call of it, as clients expect
        return ToolChoice(mode=_MODES[fields.type], name=fields.name, parallel=False)
    parallel = isinstance(fields, NoChoice) or not fields.disable_parallel_tool_use
    return ToolChoice(mode=_MODES[fields.type], parallel=parallel)


class Adaptive(Fields):
    """Thinking as the model likes."""

    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class Enabled(Fields):
    """Thinking before the answer.  budget_tokens: models here know none, max_tokens ends both."""

    type: Literal["enabled"]
    budget_tokens: MaxTokens
    display: Literal["summarized", "omitted"] | None = None


class Disabled(Fields):
    """No thinking, of models that can do without."""

    type: Literal["disabled"]


_Thinking: TypeAlias = Annotated[Adaptive | Enabled | Disabled, Field(discriminator="type")]


class FormatFields(Fields):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: Annotated[Schema, Field(alias="schema")]


class OutputFields(Fields):
    """effort: a hint that models here have no use for."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: FormatFields | None = None


class MetadataFields(Fields):
    """user_id: who asks behind a client that asks for many; each has a turn."""

    user_id: Identity | None = None


class CountRequest(Fields):
    """A conversation whose tokens are counted."""

    model: Annotated[str, Field(max_length=512)]
    messages: TurnsField
    system: Texts = Field(default_factory=list)
    tools: list[ToolFields] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: _Choice | None = None
    thinking: _Thinking | None = None
    output_config: OutputFields | None = None
    cache_control: Ignored = None
    speed: Annotated[Any, only("standard")] = None

    @property
    def shows_thinking(self) -> bool:
        """Whether the client wants to read it."""
        thinking = self.thinking
        return isinstance(thinking, Disabled) or not (thinking and thinking.display == "omitted")

    def ask(self, caller: str) -> Ask:
        """In nobody's dialect.  Raises FieldError for fields that contradict each other."""
        tools, choice = self._tools(), _choice(self.tool_choice)
        require_agreeing(tools, choice)
        form = self.output_config and self.output_config.format
        if form and tools and choice.mode != "none":
            raise FieldError("output_config.format", "cannot be together with tools. Leave one.")
        thinking = self.thinking
        return Ask(
            prompt=read_turns(self.system, self.messages),
            tools=() if form else tools,
            tool_choice=choice,
            think=None
            if thinking is None or isinstance(thinking, Adaptive)
            else isinstance(thinking, Enabled),
            constraint=JsonSchema(form.schema_) if form else None,
            caller=caller,
        )

    def _tools(self) -> tuple[Tool, ...]:
        return tuple(
            Tool(name=tool.name, description=tool.description, parameters=tool.input_schema)
            for tool in self.tools
        )


_Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class MessagesRequest(CountRequest):
    """A conversation to answer."""

    max_tokens: MaxTokens
    stop_sequences: list[_Stop] = Field(default_factory=list, max_length=MAX_STOPS)
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    metadata: MetadataFields | None = None
    service_tier: Literal["auto", "standard_only"] | None = None  # there is one
    stream: bool = False
    container: Refused = None
    diagnostics: Refused = None
    inference_geo: Refused = None
    mcp_servers: Annotated[Any, only([])] = None
    context_management: Annotated[Any, only({"edits": []}, _KEEPS_ALL)] = None

    def ask(self, caller: str) -> Ask:
        """In nobody's dialect.  Raises FieldError for fields that contradict each other."""
        user = self.metadata and self.metadata.user_id
        sampling = Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=tuple(self.stop_sequences),
            max_new_tokens=self.max_tokens,
        )
        # Beside the machine, so that nobody takes turns that are another's.
        return replace(super().ask(f"{caller} {user}" if user else caller), sampling=sampling)

"""The body of /v1/responses, as an Ask.

Knows:        the request's fields, which of them go together; what an answer repeats of them.
Ignorant of:  answers, HTTP.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from lowmoe.engine.constraint import Constraint, JsonSchema
from lowmoe.server.asking import MAX_LOGPROBS, Ask
from lowmoe.server.errors import FieldError
from lowmoe.server.fields import Fields, Ignored, MaxTokens, Refused, Schema, Text, only
from lowmoe.server.names import ModelName
from lowmoe.server.openai.chat_request import AnnotatedFields
from lowmoe.server.openai.messages import Effort
from lowmoe.server.openai.responses_items import InputField, read_items
from lowmoe.server.openai.sampling import ANY_OBJECT, SamplingFields
from lowmoe.server.openai.tools import (
    FunctionFields,
    Namespace,
    ToolChoiceOfResponses,
    ToolsOfResponses,
    name_in,
    settle,
)

_Summary: TypeAlias = Literal["auto", "concise", "detailed"]
_LOGPROBS = "message.output_text.logprobs"
# What is thought comes back readable, so that who keeps it needs nothing encrypted.
_ENCRYPTED = "reasoning.encrypted_content"


class Reasoning(Fields):
    """Whether to think first.  summary: thoughts are told as summaries of themselves, which is
    where most clients look for them.
    """

    effort: Effort | None = None
    summary: _Summary | None = None
    generate_summary: _Summary | None = None  # its older name
    context: Annotated[Any, only("auto")] = None
    mode: Annotated[Any, only("standard")] = None


class TextFormat(Fields):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=512)] | None = None
    description: Text | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None

    def constraint(self) -> Constraint | None:
        """In nobody's dialect.  Raises FieldError."""
        if self.type != "json_schema":
            return ANY_OBJECT if self.type == "json_object" else None
        if self.schema_ is None:
            raise FieldError("text.format.schema", "is missing. Give a schema.")
        return JsonSchema(self.schema_)


class TextFields(Fields):
    """How an answer is written."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, only("medium")] = None


class ResponseStreamOptions(Fields):
    """What a stream tells besides the answer: nothing."""

    include_obfuscation: Annotated[Any, only(False)] = None


class ResponsesRequest(SamplingFields, AnnotatedFields):
    """A conversation to answer; nothing of it is kept, so all of it is sent every time."""

    model: ModelName = None
    input: InputField
    instructions: Text | None = None
    max_output_tokens: MaxTokens | None = None
    tools: ToolsOfResponses | None = None
    tool_choice: ToolChoiceOfResponses = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    client_metadata: Ignored = None
    truncation: Annotated[Any, only("disabled")] = None
    background: Annotated[Any, only(False)] = None
    previous_response_id: Refused = None
    conversation: Refused = None
    prompt: Refused = None
    max_tool_calls: Refused = None
    moderation: Refused = None

    @property
    def wants_summary(self) -> bool:
        """Whether thoughts are told as summaries."""
        reasoning = self.reasoning or Reasoning()
        return (reasoning.summary or reasoning.generate_summary) is not None

    def ask(self, caller: str) -> Ask:
        """In nobody's dialect.  Raises FieldError for fields that contradict each other."""
        form = None if self.text is None else self.text.format
        constraint = None if form is None else form.constraint()
        tools, choice = settle(
            self._functions(),
            self.tool_choice,
            self.parallel_tool_calls,
            has_form=constraint is not None,
        )
        effort = None if self.reasoning is None else self.reasoning.effort
        logprobs = self.top_logprobs is not None or _LOGPROBS in (self.include or ())
        return Ask(
            prompt=read_items(self.input, self.instructions),
            tools=tools,
            tool_choice=choice,
            think=None if effort is None else effort != "none",
            sampling=self.sampling(self.max_output_tokens),
            constraint=constraint,
            n_logprobs=(self.top_logprobs or 0) if logprobs else None,
            caller=caller,
        )

    def _functions(self) -> list[FunctionFields]:
        functions: list[FunctionFields] = []
        for tool in self.tools or ():
            functions += tool.functions() if isinstance(tool, Namespace) else [tool]
        return functions

    def names(self) -> dict[str, tuple[str, str]]:
        """By the name that the model knows it by, a function's namespace and its name there."""
        return {
            name_in(tool.name, one.name): (tool.name, one.name)
            for tool in self.tools or ()
            if isinstance(tool, Namespace)
            for one in tool.tools
        }

    def repeated(self) -> dict[str, Any]:
        """What an answer says again of the request, in its fields' order."""
        choice, reasoning = self.tool_choice, self.reasoning or Reasoning()
        told: Any = "auto" if choice is None else choice.mode
        if choice is not None and choice.name is not None:
            told = {"type": "function", "name": choice.name}
        form = {"type": "text"}
        if self.text is not None and self.text.format is not None:
            form = self.text.format.model_dump(by_alias=True, exclude_none=True)
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "store": False,
            "temperature": self.temperature,
            "text": {"format": form},
            "tool_choice": told,
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": "disabled",
        }

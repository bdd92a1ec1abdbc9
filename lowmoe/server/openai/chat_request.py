"""The body of /v1/chat/completions, as an Ask.

Knows:        the request's fields, which of them go together.
Ignorant of:  answers, HTTP.
"""

from typing import Annotated, Any, TypeAlias

from pydantic import Field

from lowmoe.server.asking import MAX_ANSWERS, MAX_LOGPROBS, Ask
from lowmoe.server.errors import FieldError
from lowmoe.server.fields import Fields, Ignored, MaxTokens, Refused, only
from lowmoe.server.names import ModelName
from lowmoe.server.openai.messages import (
    Effort,
    MessagesField,
    TemplateFields,
    read_messages,
    thinks,
)
from lowmoe.server.openai.sampling import FormFields, SamplingFields
from lowmoe.server.openai.tools import ToolChoiceField, Tools, settle

NumberOfAnswers: TypeAlias = Annotated[int, Field(ge=1, le=MAX_ANSWERS)]


class StreamOptions(Fields):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class AnnotatedFields(Fields):
    """What OpenAI keeps beside a request, and hints that change no answer."""

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None


class ChatRequest(SamplingFields, FormFields, AnnotatedFields):
    """A conversation to answer."""

    model: ModelName = None
    messages: MessagesField
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None  # the younger name wins
    n: NumberOfAnswers | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateFields | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    functions: Annotated[Any, only([])] = None
    function_call: Refused = None
    modalities: Annotated[Any, only(["text"])] = None
    verbosity: Annotated[Any, only("medium")] = None
    audio: Refused = None
    prediction: Refused = None
    web_search_options: Refused = None
    moderation: Refused = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def ask(self, caller: str) -> Ask:
        """In nobody's dialect.  Raises FieldError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "is for streams. Leave it out, or stream.")
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "needs logprobs. Set it to true.")
        functions = [tool.function for tool in self.tools or ()]
        constraint = self.constraint()
        tools, choice = settle(
            functions,
            self.tool_choice,
            self.parallel_tool_calls,
            has_form=constraint is not None,
        )
        return Ask(
            prompt=read_messages(self.messages),
            tools=tools,
            tool_choice=choice,
            think=thinks(self.reasoning_effort, self.chat_template_kwargs),
            sampling=self.sampling(self.max_completion_tokens or self.max_tokens),
            constraint=constraint,
            n=self.n or 1,
            n_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            caller=caller,
        )

"""The body of /v1/completions, as Asks: one for each prompt.

Knows:        the request's fields, the forms that a prompt may have.
Ignorant of:  answers, HTTP.
"""

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field

from lowmoe.server.asking import MAX_LOGPROBS, Ask
from lowmoe.server.errors import FieldError
from lowmoe.server.fields import MaxTokens, Text, fault, only
from lowmoe.server.names import ModelName
from lowmoe.server.openai.chat_request import AnnotatedFields, NumberOfAnswers, StreamOptions
from lowmoe.server.openai.sampling import FormFields, SamplingFields

MAX_PROMPTS = 32  # of one request
MAX_PROMPT_TOKENS = 1_000_000  # of one prompt; the context holds fewer
DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this path alone

_TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
_Ids: TypeAlias = Annotated[list[_TokenId], Field(max_length=MAX_PROMPT_TOKENS)]


def _prompts(value: object) -> object:
    """One or several prompts, each a text or token ids, as a list of them."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if not isinstance(value, list) or not all(isinstance(o, str) or _is_ids(o) for o in value):
        raise fault("must be a text, token ids, or a list of texts or of lists of token ids")
    return value


def _is_ids(value: object) -> bool:
    # An empty list is no prompts rather than a prompt of no tokens; neither can be answered.
    return (
        isinstance(value, list)
        and 0 < len(value) <= MAX_PROMPT_TOKENS
        and all(type(one) is int and 0 <= one < 2**31 for one in value)
    )


_Prompts: TypeAlias = Annotated[
    list[str | list[int]],
    Field(min_length=1, max_length=MAX_PROMPTS),
    BeforeValidator(
        _prompts,
        json_schema_input_type=Text
        | _Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[_Ids], Field(min_length=1, max_length=MAX_PROMPTS)],
    ),
]


class CompletionRequest(SamplingFields, FormFields, AnnotatedFields):
    """Prompts to go on with."""

    model: ModelName = None
    prompt: _Prompts
    max_tokens: MaxTokens | None = None
    n: NumberOfAnswers | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: Annotated[Any, only(False)] = None
    suffix: Annotated[Any, only("")] = None
    best_of: Annotated[Any, only(1)] = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def asks(self, caller: str) -> list[Ask]:
        """In nobody's dialect.  Raises FieldError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "is for streams. Leave it out, or stream.")
        return [
            Ask(
                prompt=prompt if isinstance(prompt, str) else tuple(prompt),
                sampling=self.sampling(self.max_tokens or DEFAULT_MAX_TOKENS),
                constraint=self.constraint(),
                n=self.n or 1,
                n_logprobs=self.logprobs,
                caller=caller,
            )
            for prompt in self.prompt
        ]

"""A model's tokenizer, chat template and recommendations, read when they are first needed.

A model without them still computes; only what needs text complains.

Knows:        which small files hold what.
Ignorant of:  where small files are kept.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence

from lowmoe.engine.chat_template import ChatTemplate
from lowmoe.engine.messages import Message, Tool
from lowmoe.engine.options import GenerationDefaults
from lowmoe.engine.text import Tokenizer
from lowmoe.engine.thinking import Thinking, thinking_of
from lowmoe.engine.token_bytes import TokenBytes
from lowmoe.engine.tool_calls.format import ToolFormat
from lowmoe.errors import TextError, UsageError

TOKENIZER = "tokenizer.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
SMALL_FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, GENERATION_CONFIG)


class TextParts:
    """read: the content of a small file, or None if there is none of that name."""

    def __init__(self, read: Callable[[str], bytes | None]) -> None:
        self._read = read

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises TextError if the model came without one."""
        data = self._read(TOKENIZER)
        if data is None:
            raise TextError(
                f"this model has no {TOKENIZER}, so it cannot read or write text. Put the file "
                "beside the checkpoint and quantize again."
            )
        return Tokenizer.from_bytes(data)

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """What each token writes.  Raises TextError where that is not known."""
        return TokenBytes(self.tokenizer)

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """Raises TextError if the model came without one."""
        return ChatTemplate.from_files(
            chat_template_jinja=self._read(CHAT_TEMPLATE),
            tokenizer_config_json=self._read(TOKENIZER_CONFIG),
        )

    @functools.cached_property
    def thinking(self) -> Thinking | None:
        """How the model marks its thinking, if it does."""
        try:
            return thinking_of(self.chat_template.source)
        except TextError:
            # Who asks without a template asks for plain text, and hears of it with messages.
            return None

    @functools.cached_property
    def tool_calls(self) -> ToolFormat | None:
        """How the model calls tools; None for one without a chat template or a tokenizer."""
        try:
            return ToolFormat.of(self.chat_template.style, self.tokenizer)
        except TextError:
            return None

    @functools.cached_property
    def defaults(self) -> GenerationDefaults:
        """What the model's authors recommend; nothing, if the file is missing."""
        data = self._read(GENERATION_CONFIG)
        return GenerationDefaults() if data is None else GenerationDefaults.from_bytes(data)

    def end_ids(self, named: Collection[int]) -> set[int]:
        """Of the tokens that end an answer: those that config.json named, and these defaults."""
        return {*named, *self.defaults.eos_ids}

    def encode(
        self,
        prompt: str | Sequence[Message | Mapping[str, str]],
        *,
        tools: Sequence[Tool] = (),
        think: bool | None = None,
    ) -> list[int]:
        """Token ids of a text to go on with, or of a conversation to answer.

        tools, think: as for `ChatTemplate.render`; a text has neither.
        """
        if isinstance(prompt, str):
            if tools:
                raise UsageError("tools are given with a plain text, but need chat messages")
            return self.tokenizer.encode(prompt, add_special=True)
        return self.chat_template.encode(prompt, self.tokenizer, tools=tools, think=think)

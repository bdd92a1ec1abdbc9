"""The format in which one model calls tools.

Knows:        a style, the tokenizer's tokens for its tags.
Ignorant of:  what the styles are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowmoe.engine.constraint import Grammar
from lowmoe.engine.messages import Tool, ToolChoice
from lowmoe.engine.text import Tokenizer
from lowmoe.engine.thinking import TO_TOOL
from lowmoe.engine.tool_calls.definitions import require_choice, require_tools
from lowmoe.engine.tool_calls.grammar import GrammarWriter
from lowmoe.engine.tool_calls.splitter import CallSplitter
from lowmoe.engine.tool_calls.style import Style


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """token_ids: of the tags that are tokens of this model; they count as tags only as such, so
    that a model that quotes one calls nothing.
    """

    style: Style
    token_ids: Mapping[str, int]

    @staticmethod
    def of(style: Style, tokenizer: Tokenizer) -> "ToolFormat":
        """The format of a model with this style and tokenizer."""
        added = tokenizer.added_tokens
        ids = {tag: tokenizer.token_id(tag) for tag in style.tags if tag in added}
        return ToolFormat(
            style=style, token_ids={tag: i for tag, i in ids.items() if i is not None}
        )

    def splitter(self, tools: Sequence[Tool]) -> CallSplitter:
        """For one answer to a prompt with these tools.  Raises UsageError for unfit tools."""
        require_tools(tools)
        by_name = {tool.name: tool for tool in tools}
        return CallSplitter(self.style, by_name, {*self.token_ids, TO_TOOL})

    def grammar(self, tools: Sequence[Tool], choice: ToolChoice) -> Grammar | None:
        """What forces a call, from the answer's first token on; None if none is forced.

        Before a call may stand the line breaks that follow a model's thinking; the end of the
        grammar is where the model may end its answer. Arguments keep to the tool's schema, as far
        as llguidance knows what it says; parameters come in the order of the schema.

        Raises UsageError for unfit tools, or a choice that is not among them.
        """
        require_tools(tools)
        require_choice(choice, tools)
        if choice.mode != "required":
            return None
        chosen = [tool for tool in tools if choice.name in (None, tool.name)]
        writer = GrammarWriter(self.token_ids)
        return Grammar(writer.whole(self.style.lark(writer, chosen, many=choice.parallel)))

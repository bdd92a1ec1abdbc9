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
        """What forces a call, with its thinking before it; None if none is forced.

        The end of the grammar is where the model may end its answer. Arguments keep to the tool's
        schema as far as llguidance knows what it says; parameters come in the schema's order.

        Raises UsageError for unfit tools, or a choice that is not among them.
        """
        require_tools(tools)
        require_choice(choice, tools)
        if choice.mode != "required":
            return None
        chosen = [tool for tool in tools if choice.name in (None, tool.name)]
        writer = GrammarWriter(self.token_ids)
        start = self.style.lark(writer, chosen, many=choice.parallel)
        if self.style.from_start:
            return Grammar(writer.whole(start), from_start=True)
        # After the model's thinking stand line breaks.
        return Grammar(writer.whole(rf"/\n{{0,2}}/ {start}"))

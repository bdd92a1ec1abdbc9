"""How a family of models writes calls of tools: what each style here can do.

Knows:        reading a call, writing one, forcing one.
Ignorant of:  which model has which style.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.grammar import GrammarWriter
from lowmoe.engine.tool_calls.reader import Reader, Reading

Tools: TypeAlias = Mapping[str, Tool]  # by their names


class Style(Protocol):
    """tags: what stands around calls; where a tokenizer has one as a token, only that counts.

    from_start: whether what forces a call forces all that the model writes, its thinking too.
    """

    @property
    def tags(self) -> Sequence[str]: ...

    @property
    def from_start(self) -> bool:
        return False

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        """Parts of an answer to its end."""

    def write(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the model writes them, where its template leaves that to others."""

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        """Derives one call of any of tools; many: or several, as far as the style has such."""

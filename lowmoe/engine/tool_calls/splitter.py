"""Tells the calls of an answer from its text, as it comes.

Knows:        the order of parts.
Ignorant of:  what calls look like.
"""

from collections.abc import Collection, Sequence

from lowmoe.engine.tool_calls.reader import Part, Reader
from lowmoe.engine.tool_calls.style import Style, Tools


class CallSplitter:
    """For one answer.  Parts are ("answer", text), ("call", name of the tool) and ("arguments",
    more of its JSON).

    Only calls of tools that are offered are calls; whatever else looks like one is text. What comes
    of a call's arguments is JSON from its first character on; if the answer breaks off within it,
    it stays half an object, which no client can take for a whole one.
    """

    def __init__(self, style: Style, tools: Tools, tokens: Collection[str]) -> None:
        self._reader = Reader(tokens)
        self._parts = style.read(self._reader, tools)
        self._is_read = False

    def push(self, text: str, *, control: bool = False) -> Sequence[Part]:
        """Take the next piece; the parts that are certain now.  control: it came as one token."""
        self._reader.push(text, is_token=control)
        return self._certain()

    def flush(self) -> Sequence[Part]:
        """The parts that were held back, as the answer has ended."""
        self._reader.has_ended = True
        return self._certain()

    def _certain(self) -> Sequence[Part]:
        parts: list[Part] = []
        if not self._is_read:
            for part in self._parts:
                if part is None:
                    return parts
                parts.append(part)
            self._is_read = True
        return parts

"""Whether tools and what is said of calling them go together, in every dialect.

Knows:        names of tools, which must be called.
Ignorant of:  what they do, how a client spelled them.
"""

from collections.abc import Sequence

from lowmoe.engine.messages import Tool, ToolChoice
from lowmoe.server.errors import FieldError


def require_agreeing(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Return if each tool has a name of its own and what must be called is there.

    Raises FieldError.
    """
    names: set[str] = set()
    for tool in tools:
        if tool.name in names:
            raise FieldError("tools", f"two are called {tool.name}. Give each a name of its own.")
        names.add(tool.name)
    if choice.mode == "required" and not tools:
        raise FieldError("tool_choice", "demands a call, but there are no tools. Give some.")
    if choice.name is not None and choice.name not in names:
        raise FieldError("tool_choice", f"{choice.name} is none of tools. Name one of them.")

"""How Anthropic writes a frame: named by the type of what it holds.

Knows:        what names a frame.
Ignorant of:  what is told.
"""

from collections.abc import Mapping
from typing import Any

from lowmoe.server import sse


def frame(data: Mapping[str, Any]) -> str:
    """One frame of a stream."""
    return sse.frame(data, event=data["type"])


PING = frame({"type": "ping"})

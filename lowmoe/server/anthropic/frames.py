"""How Anthropic writes a frame: named by the type of what it holds.

Knows:        server-sent events.
Ignorant of:  what is told.
"""

import json
from collections.abc import Mapping
from typing import Any


def frame(data: Mapping[str, Any]) -> str:
    """One frame of a stream."""
    # All but ASCII is escaped: some clients take other line ends than \n for the end of a line.
    return f"event: {data['type']}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


PING = frame({"type": "ping"})

"""Whose turn it is, where several ask.

Knows:        by what clients are told apart.
Ignorant of:  what they ask, turns.
"""

from starlette.requests import Request


def caller_of(request: Request) -> str:
    """The machine that asks: all share one key, and what else a request says of itself is cheap."""
    return "" if request.client is None else request.client.host

"""What a driver in Python is: a program that does one thing after another with a client, and writes
a line of JSON for each, of what it saw.

Knows:        the questions that every client is asked.
Ignorant of:  which client asks, what is right.
"""

import json
import os
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODEL = os.environ["DRIVEN_MODEL"]
_QUESTIONS = json.loads(Path(__file__).with_name("questions.json").read_text())
GIRL, SEA, LONG = (_QUESTIONS[name] for name in ("GIRL", "SEA", "LONG"))
TOO_LONG = "word " * 3000
N_TOKENS, N_LONG = _QUESTIONS["N_TOKENS"], _QUESTIONS["N_LONG"]
TOOL, SCHEMA = _QUESTIONS["TOOL"], _QUESTIONS["SCHEMA"]


class Absent(Exception):
    """This client cannot do that, and why."""


def said(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def refused(ask: Callable[[str], Any], kind: type[Any]) -> dict[str, Any]:
    """What a client raises of this kind, with a status and a message, for too long a text."""
    try:
        ask(TOO_LONG)
    except kind as refusal:
        return {"status": refusal.status_code, "message": refusal.message}
    raise AssertionError("it was not refused")


def two_at_once(chat: Callable[[str], dict[str, Any]]) -> list[str]:
    """Two answers, asked for by two threads."""
    with ThreadPoolExecutor(2) as both:
        return [made["text"] for made in both.map(chat, [GIRL, SEA])]


def drive(behaviours: Mapping[str, Callable[[], Any]]) -> None:
    """Do them all, whatever becomes of each."""
    for name, do in behaviours.items():
        try:
            told = {"saw": do()}
        except Absent as absent:
            told = {"absent": str(absent)}
        except Exception:
            told = {"failed": traceback.format_exc()}
        print(json.dumps({"behaviour": name, **told}), flush=True)

"""What a model writes as in Python is what Python reads, and a little more."""

import ast
import json
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmoe.engine.tool_calls.json_object import MAX_DEPTH
from lowmoe.engine.tool_calls.python_value import PythonValue

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
)
ESCAPES = ["\\", "n", "x41", "x4", "u00e9", "U0001f600", "U00110000", "\n", "d", '"', "'", ",", " "]


def read(text: str) -> tuple[Any] | None:
    value = PythonValue()
    n_taken, _ = value.push(f"{text}, more")
    assert value.is_whole
    assert n_taken == len(text)
    return value.read()


@given(value=VALUES)
def test_what_python_prints_and_what_json_writes_is_read(value: Any) -> None:
    assert read(repr(value)) == (value,)
    assert read(json.dumps(value)) == (value,)


@given(parts=st.lists(st.sampled_from(ESCAPES), max_size=8), quote=st.sampled_from("\"'"))
def test_escapes_are_pythons(parts: list[str], quote: str) -> None:
    written = quote + "".join(parts) + quote
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is no escape
            expected = ast.literal_eval(written)
    except (SyntaxError, ValueError):
        return
    # Python joins strings that stand beside each other, and knows a quote of three.
    if written.count(quote) - written.count(f"\\{quote}") == 2 and isinstance(expected, str):
        assert read(written) == (expected,)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('"say "you" to <b>"', 'say "you" to <b>'),
        ('"two\nlines"', "two\nlines"),
        (r'"\ud83d\ude00\/"', "😀/"),
        ("[true, null]", [True, None]),
    ],
)
def test_what_python_would_refuse_is_read_where_it_is_plain(written: str, expected: Any) -> None:
    assert read(written) == (expected,)


@pytest.mark.parametrize(
    "written", ["Paris", "http://a.b", "f(x)", "NaN", "1e999", "{1: 2}", "[1,]", ""]
)
def test_what_is_no_value_is_none(written: str) -> None:
    assert read(written) is None


def test_brackets_may_not_stand_deeper_than_in_json() -> None:
    for text in ("[" * (MAX_DEPTH + 1), "]", "a}"):
        value = PythonValue()
        value.push(text)
        assert value.is_broken

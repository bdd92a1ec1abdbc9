"""JSON that comes in pieces is found whole and broken where Python's json finds it so."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from lowmoe.engine.tool_calls.json_object import MAX_DEPTH, JsonObject

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers() | FLOATS | st.text()
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)
FRAGMENTS = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    '"a"',
    "\\",
    "\\u00e",
    "é",
    " ",
    "\n",
    "1",
    "-",
    "0",
]
FRAGMENTS += ["1.5e3", ".", "e", "+", "true", "false", "null", "nul", "NaN", "{}", '{"a": 1', "\\n"]


def scanned(text: str, cuts: list[int]) -> tuple[JsonObject, int, str]:
    scan = JsonObject()
    n_taken, written = 0, ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        n, more = scan.push(text[start:end])
        n_taken, written = n_taken + n, written + more
        if scan.is_whole or scan.is_broken:
            break
    return scan, n_taken, written


def read(text: str) -> Any:
    def no_constant(name: str) -> None:
        raise ValueError(name)

    try:
        # strict=False: a line break in a string is mended.
        return json.loads(text, strict=False, parse_constant=no_constant)
    except ValueError:
        return None


@given(value=OBJECTS, ascii=st.booleans(), indent=st.sampled_from([None, 2]), rest=st.text())
def test_an_object_is_whole_at_its_last_brace(
    value: dict[str, Any], ascii: bool, indent: int | None, rest: str
) -> None:
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    scan, n_taken, written = scanned(text + rest, [])
    assert scan.is_whole
    assert (n_taken, written) == (len(text), text)


@settings(max_examples=500)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=12), data=st.data())
def test_what_python_reads_is_whole_and_what_is_whole_python_reads(
    fragments: list[str], data: st.DataObject
) -> None:
    text = "{" + "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=3)))
    scan, n_taken, written = scanned(text, cuts)
    # The first object in the text, if there is one: braces close in one place only.
    expected = next((v for n in range(len(text) + 1) if (v := read(text[:n])) is not None), None)
    assert scan.is_whole == (expected is not None)
    if scan.is_whole:
        assert json.loads(written) == expected
    assert (scan.is_whole, n_taken, written) == (
        (again := scanned(text, []))[0].is_whole,
        *again[1:],
    )


def test_a_line_break_inside_a_string_is_escaped() -> None:
    scan, _, written = scanned('{"a": "1\n\t2", "b\n": 3}', [])
    assert scan.is_whole
    assert json.loads(written) == {"a": "1\n\t2", "b\n": 3}


@pytest.mark.parametrize("bracket", ["[", '{"":'])
def test_what_nests_too_deep_is_broken(bracket: str) -> None:
    inner = MAX_DEPTH - 1
    closing = ("]" if bracket == "[" else "}") * inner
    deep = '{"": ' + bracket * inner + "1" * (bracket != "[") + closing + "}"
    assert scanned(deep, [])[0].is_whole
    assert scanned('{"": ' + bracket * MAX_DEPTH, [])[0].is_broken


@given(pieces=st.lists(st.sampled_from(["\ud83d", "\ude00", "\\", "u", "\n", "é"]), min_size=1))
def test_half_a_surrogate_pair_is_mended(pieces: list[str]) -> None:
    text = "".join(pieces)
    scan, _, written = scanned(json.dumps({text: [text]}), [])
    assert scan.is_whole
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    # Clients of both APIs read calls with this reader, which refuses such halves.
    assert from_json(written) == {mended: [mended]}


@pytest.mark.parametrize("number", ["1e999", "-1e309", "9" * 5000, "1" + "0" * 309 + ".5"])
def test_a_number_that_no_float_holds_is_broken_before_it_is_told(number: str) -> None:
    scan, _, written = scanned(f'{{"a": {number}}}', [])
    assert scan.is_broken
    found = from_json(written, allow_partial=True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found

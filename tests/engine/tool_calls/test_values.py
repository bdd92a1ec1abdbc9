"""What a model writes between tags becomes JSON that every client can read."""

import pytest
from pydantic_core import from_json

from lowmoe.engine.tool_calls.values import value_json

ANY: frozenset[str] = frozenset()


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "Infinity", "[1e999]"])
def test_a_number_that_json_has_not_stays_text(text: str) -> None:
    assert from_json(value_json(text, ANY), allow_inf_nan=False) == text


def test_half_a_surrogate_pair_is_no_character() -> None:
    assert from_json(value_json(r'["\ud83d", "\ud83d\ude00"]', ANY)) == ["\ufffd", "\U0001f600"]

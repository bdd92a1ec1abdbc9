"""The forms that clients ask answers to have, through OpenAI's chat completions and completions."""

from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from lowmoe.engine.constraint import Constraint, Grammar, JsonSchema, Regex
from lowmoe.server.fields import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH
from tests.server.fake_service import FakeService, saying
from tests.server.openai_clients import HELLO, openai_client


class Point(pydantic.BaseModel):
    """A place."""

    x: int
    y: int


@pytest.fixture(scope="module")
def service() -> FakeService:
    """Says the same point to everything."""
    return FakeService([saying('{"x": 1, ', '"y": 2}')])


@pytest.fixture(scope="module")
def client(service: FakeService) -> Iterator[openai.OpenAI]:
    """Talks with it."""
    with openai_client(service) as client:
        yield client


def test_an_answer_is_parsed_as_the_type_that_was_asked_for(
    client: openai.OpenAI, service: FakeService
) -> None:
    made = client.chat.completions.parse(model="demo", messages=HELLO, response_format=Point)
    assert made.choices[0].message.parsed == Point(x=1, y=2)
    with client.chat.completions.stream(
        model="demo", messages=HELLO, response_format=Point
    ) as stream:
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.parsed == Point(x=1, y=2)
    constraint = service.asks[-1].constraint
    assert isinstance(constraint, JsonSchema)
    assert constraint.schema["properties"].keys() == {"x", "y"}
    assert constraint.schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("given", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, JsonSchema({"type": "object"})),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": False},
                }
            },
            JsonSchema({"type": "integer"}),
        ),
        ({"guided_json": {"type": "string"}}, JsonSchema({"type": "string"})),
        ({"guided_regex": "[ab]+"}, Regex("[ab]+")),
        ({"guided_grammar": 'start: "a"'}, Grammar('start: "a"')),
        ({"guided_choice": ["yes", 'n"o']}, Grammar('start: "yes" | "n\\"o"')),
        ({"structured_outputs": {"json": {}}}, JsonSchema({})),
        ({"structured_outputs": {"regex": "[ab]+"}}, Regex("[ab]+")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar('start: "a"')),
        ({"structured_outputs": {"choice": ["a"]}}, Grammar('start: "a"')),
        ({"structured_outputs": {"json_object": True}}, JsonSchema({"type": "object"})),
    ],
)
def test_every_way_to_ask_for_a_form_means_one(
    client: openai.OpenAI, service: FakeService, given: dict[str, Any], constraint: Constraint
) -> None:
    client.chat.completions.create(model="demo", messages=HELLO, extra_body=given)
    assert service.asks[-1].constraint == constraint
    client.completions.create(model="demo", prompt="Once", extra_body=given)
    assert service.asks[-1].constraint == constraint


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs.regex",
        ),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
        ({"guided_json": '{"type": "string"}'}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": nested(MAX_SCHEMA_DEPTH + 1)}, "guided_json"),
        ({"guided_json": {"enum": ["x" * MAX_SCHEMA_BYTES]}}, "guided_json"),
        ({"guided_json": {"enum": [0] * MAX_SCHEMA_BYTES}}, "guided_json"),
        ({"grammar": 'root ::= "a"'}, "grammar"),
    ],
)
def test_forms_that_cannot_be_kept_to_are_refused_by_their_field(
    client: openai.OpenAI, given: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=HELLO, extra_body=given)
    assert caught.value.param == field


def test_a_schema_may_be_as_deep_as_is_said(client: openai.OpenAI) -> None:
    given = {"guided_json": nested(MAX_SCHEMA_DEPTH)}
    assert client.chat.completions.create(model="demo", messages=HELLO, extra_body=given).choices

"""How tokens are chosen and what form they must have: fields that every request has alike.

Knows:        OpenAI's names for sampling, and those that vLLM added.
Ignorant of:  what sampling does, how a form is kept to.
"""

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from lowmoe.engine.constraint import Constraint, Grammar, JsonSchema, Regex
from lowmoe.engine.options import MAX_STOP_CHARS, MAX_STOPS
from lowmoe.server.asking import MAX_ANSWERS, Sampling
from lowmoe.server.errors import FieldError
from lowmoe.server.fields import MAX_TOKENS, Fields, Schema, Text, only

MAX_PATTERN = 65_536  # characters of a regular expression or grammar
MAX_CHOICES = 1_000

ANY_OBJECT = JsonSchema({"type": "object"})

_Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Pattern: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]
Choices: TypeAlias = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class SamplingFields(Fields):
    """Left out or null: as the model's authors recommend."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None  # 0 and -1: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    # Answer i of n is sampled with seed + i.
    seed: Annotated[int, Field(ge=0, lt=2**63 - MAX_ANSWERS)] | None = None
    stop: (
        Annotated[
            list[_Stop],
            Field(max_length=MAX_STOPS),
            BeforeValidator(_listed, json_schema_input_type=_Stop | list[_Stop]),
        ]
        | None
    ) = None
    frequency_penalty: Annotated[Any, only(0)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    logit_bias: Annotated[Any, only({})] = None

    def sampling(self, max_new_tokens: int | None) -> Sampling:
        """In nobody's dialect."""
        return Sampling(
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            max_new_tokens=max_new_tokens,
        )


class NamedSchema(Fields):
    """A schema with a name.  strict: answers keep to it here whether that is asked for or not."""

    name: Annotated[str, Field(max_length=512)] | None = None
    description: Text | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Fields):
    """OpenAI's way to ask for a form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def constraint(self) -> Constraint | None:
        """In nobody's dialect.  Raises FieldError."""
        if self.type != "json_schema":
            return ANY_OBJECT if self.type == "json_object" else None
        if self.json_schema is None:
            raise FieldError("response_format.json_schema", "is missing. Give a name and a schema.")
        return JsonSchema(self.json_schema.schema_)


class StructuredOutputs(Fields):
    """vLLM's way to ask for a form.  grammar: in Lark's notation."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None


class FormFields(Fields):
    """The form of an answer, asked for in one of the ways that clients have.

    guided_*: as vLLM called the fields of structured_outputs before.
    """

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None

    def constraint(self) -> Constraint | None:
        """In nobody's dialect.  Raises FieldError for several at once."""
        vllm = self.structured_outputs or StructuredOutputs()
        openai = None if self.response_format is None else self.response_format.constraint()
        asked = {
            "response_format": openai,
            "structured_outputs.json": _schema(vllm.json_),
            "structured_outputs.json_object": ANY_OBJECT if vllm.json_object else None,
            "structured_outputs.regex": _regex(vllm.regex),
            "structured_outputs.choice": _one_of(vllm.choice),
            "structured_outputs.grammar": _grammar(vllm.grammar),
            "guided_json": _schema(self.guided_json),
            "guided_regex": _regex(self.guided_regex),
            "guided_choice": _one_of(self.guided_choice),
            "guided_grammar": _grammar(self.guided_grammar),
        }
        given = {name: form for name, form in asked.items() if form is not None}
        if len(given) > 1:
            first, second, *_ = given
            raise FieldError(second, f"cannot be together with {first}. Ask for one form.")
        return next(iter(given.values()), None)


def _schema(schema: dict[str, Any] | None) -> Constraint | None:
    return None if schema is None else JsonSchema(schema)


def _regex(pattern: str | None) -> Constraint | None:
    return None if pattern is None else Regex(pattern)


def _grammar(lark: str | None) -> Constraint | None:
    return None if lark is None else Grammar(lark)


def _one_of(choices: list[str] | None) -> Constraint | None:
    # Lark writes texts as JSON does.
    return None if choices is None else Grammar("start: " + " | ".join(map(json.dumps, choices)))

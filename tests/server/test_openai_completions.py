"""/v1/completions as OpenAI's own client sees it."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from lowmoe.server.asking import Sampling, Text
from lowmoe.server.openai.completions_request import DEFAULT_MAX_TOKENS, MAX_PROMPTS
from tests.server.fake_service import FakeService, chosen, saying
from tests.server.openai_clients import lenient, openai_client


@pytest.fixture(scope="module")
def service() -> FakeService:
    """Says "Hello world" to everything."""
    return FakeService()


@pytest.fixture(scope="module")
def client(service: FakeService) -> Iterator[openai.OpenAI]:
    """Talks with it."""
    with openai_client(service) as client:
        yield client


def test_a_text_goes_on(client: openai.OpenAI, service: FakeService) -> None:
    made = client.completions.create(model="demo", prompt="Once", seed=1, max_tokens=2)
    assert (made.choices[0].text, made.choices[0].finish_reason) == ("Hello world", "stop")
    assert service.asks[-1].prompt == "Once"
    assert service.asks[-1].sampling == Sampling(seed=1, max_new_tokens=2)
    stream = lenient(client).completions.create(model="demo", prompt="Once", stream=True)
    assert [(c.choices[0].text, c.choices[0].finish_reason) for c in stream] == [
        ("Hello", None),
        (" world", None),
        ("", "stop"),
    ]


def test_without_a_limit_a_text_goes_on_for_as_long_as_openai_says(
    client: openai.OpenAI, service: FakeService
) -> None:
    client.completions.create(model="demo", prompt="Once")
    # Source: OpenAI's reference of this path, "max_tokens: defaults to 16".
    assert service.asks[-1].sampling.max_new_tokens == DEFAULT_MAX_TOKENS == 16


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        (["Once", "Twice"], ["Once", "Twice"]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        ("", [""]),
    ],
)
def test_prompts_are_texts_or_token_ids(
    client: openai.OpenAI, service: FakeService, prompt: Any, asked: Any
) -> None:
    made = client.completions.create(model="demo", prompt=prompt)
    assert [ask.prompt for ask in service.asks[-len(asked) :]] == asked
    assert [choice.index for choice in made.choices] == list(range(len(asked)))
    assert made.usage is not None
    assert made.usage.prompt_tokens == 7 * len(asked)


@pytest.mark.parametrize(
    "prompt", [None, 3, [], [[]], [-1], [2**31], [True], [[1], "x", 3], ["x"] * (MAX_PROMPTS + 1)]
)
def test_what_is_no_prompt_is_refused(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [("echo", True), ("suffix", "x"), ("best_of", 3), ("logprobs", 21), ("presence_penalty", 1)],
)
def test_what_is_not_supported_is_refused_by_its_name(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="Once", extra_body={field: value})
    assert caught.value.param == field


def test_several_answers_to_several_prompts_are_told_apart() -> None:
    first = [*saying("a", "b"), *saying("c", answer=1, reason="length")]
    second = [*saying("d", answer=1, n_reused=0), *saying("e", "f", "g")]
    service = FakeService([first, second, first, second])
    with openai_client(service) as client:
        made = client.completions.create(model="demo", prompt=["A", "B"], n=2)
        usage: Any = None
        texts = dict.fromkeys(range(4), "")
        ends = {}
        for chunk in lenient(client).completions.create(
            model="demo",
            prompt=["A", "B"],
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        ):
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                ends[choice.index] = choice.finish_reason
    assert [choice.text for choice in made.choices] == ["ab", "c", "efg", "d"]
    assert [choice.finish_reason for choice in made.choices] == ["stop", "length", "stop", "stop"]
    assert texts == {choice.index: choice.text for choice in made.choices}
    assert ends == {choice.index: choice.finish_reason for choice in made.choices}
    assert usage == made.usage
    assert usage.to_dict() == {
        "prompt_tokens": 14,
        "completion_tokens": 7,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 3},  # of the second prompt, one had none
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_chances_come_in_this_paths_own_way() -> None:
    tokens = [chosen("Hé", -0.5, [("Hé", -0.5), ("Ho", -1.5)]), chosen("!", -2)]
    script = [Text(0, "answer", "Hé", tokens[:1]), Text(0, "answer", "!", tokens[1:])]
    service = FakeService([[*script, saying()[0]]])
    with openai_client(service) as client:
        made = client.completions.create(model="demo", prompt="Once", logprobs=2)
        stream = list(
            lenient(client).completions.create(model="demo", prompt="Once", logprobs=2, stream=True)
        )
    assert service.asks[0].n_logprobs == 2
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.to_dict() == {
        "tokens": ["Hé", "!"],
        "token_logprobs": [-0.5, -2],
        "top_logprobs": [{"Hé": -0.5, "Ho": -1.5}, {}],
        "text_offset": [0, 2],
    }
    pieces = [one.choices[0].logprobs for one in stream]
    assert [piece and piece.text_offset for piece in pieces] == [[0], [2], None]


def test_all_of_a_text_is_told_whatever_kind_it_seems_to_be() -> None:
    with openai_client(FakeService([saying("4", thinking=["2 and 2 "])])) as client:
        made = client.completions.create(model="demo", prompt="Once")
        stream = list(lenient(client).completions.create(model="demo", prompt="Once", stream=True))
    assert made.choices[0].text == "2 and 2 4"
    assert "".join(chunk.choices[0].text for chunk in stream) == "2 and 2 4"

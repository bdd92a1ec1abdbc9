"""/v1/chat/completions as OpenAI's own client sees it."""

import pytest

from tests.server.fake_service import FakeService, calling, chosen, reading, saying
from tests.server.openai_clients import openai_client

HELLO = [{"role": "user", "content": "Hi"}]


def test_an_answer_arrives_whole() -> None:
    service = FakeService([saying("Hello", " world")])
    with openai_client(service) as client:
        made = client.chat.completions.create(model="demo", messages=HELLO)
    choice = made.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello world", "stop")
    assert made.model == "demo"
    assert made.usage is not None and made.usage.prompt_tokens_details is not None
    assert made.usage.to_dict() == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_an_answer_arrives_in_pieces() -> None:
    service = FakeService([[*reading(3, 7), *saying("Hello", " world")]])
    with openai_client(service) as client:
        for c in client.chat.completions.create(
            model="demo", messages=HELLO, stream=True, stream_options={"include_usage": True}
        ):
            print(c)

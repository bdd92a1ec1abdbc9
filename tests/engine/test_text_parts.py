"""Small files are read when they are needed, and only what needs one complains."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from lowmoe.engine.options import GenerationDefaults
from lowmoe.engine.text_parts import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TextParts,
)
from lowmoe.errors import FolderError, TextError

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def files(talking_checkpoint: Path) -> dict[str, bytes]:
    names = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
    return {name: (talking_checkpoint / name).read_bytes() for name in names}


class Read:
    """Small files that remember which of them were asked for."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files, self.asked = files, list[str]()

    def __call__(self, name: str) -> bytes | None:
        self.asked.append(name)
        return self.files.get(name)


def test_nothing_is_read_before_it_is_needed_and_nothing_twice(files: dict[str, bytes]) -> None:
    read = Read(files)
    parts = TextParts(read)
    assert read.asked == []
    parts.encode("Hi")
    parts.encode("Hi")
    assert read.asked == [TOKENIZER]
    parts.encode(MESSAGES)
    assert sorted(read.asked) == sorted([TOKENIZER, CHAT_TEMPLATE, TOKENIZER_CONFIG])


def test_messages_are_encoded_by_the_template(files: dict[str, bytes]) -> None:
    parts = TextParts(files.get)
    assert parts.encode(MESSAGES) == parts.encode("<|user|>Hi<|end|><|assistant|>")


def test_without_a_tokenizer_text_complains_and_recommendations_do_not(
    files: dict[str, bytes],
) -> None:
    del files[TOKENIZER]
    parts = TextParts({**files, GENERATION_CONFIG: b'{"temperature": 0.3}'}.get)
    assert parts.defaults.temperature == 0.3
    for prompt in ("Hi", MESSAGES):
        with pytest.raises(TextError, match=r"this model has no tokenizer\.json"):
            parts.encode(prompt)


def test_without_a_template_only_messages_complain(files: dict[str, bytes]) -> None:
    parts = TextParts({TOKENIZER: files[TOKENIZER]}.get)
    assert parts.encode("Hi")
    with pytest.raises(TextError, match="brings no chat template"):
        parts.encode(MESSAGES)


def test_without_recommendations_there_are_none() -> None:
    assert TextParts(Read({})).defaults == GenerationDefaults()


def test_damaged_recommendations_are_refused_by_name() -> None:
    with pytest.raises(FolderError, match=r"generation_config\.json is not JSON"):
        _ = TextParts({GENERATION_CONFIG: b"{"}.get).defaults

"""The style in which a model calls tools is told from its template."""

from collections.abc import Mapping

import pytest

from lowmoe.engine.text_parts import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TextParts
from lowmoe.engine.tool_calls.arg_keys import ArgKeys
from lowmoe.engine.tool_calls.bare_object import BareObject
from lowmoe.engine.tool_calls.bracketed import Bracketed
from lowmoe.engine.tool_calls.call_sections import CallSections
from lowmoe.engine.tool_calls.functions import Functions
from lowmoe.engine.tool_calls.harmony import Harmony
from lowmoe.engine.tool_calls.hermes import Hermes
from lowmoe.engine.tool_calls.invocations import Invocations
from lowmoe.engine.tool_calls.listed import Listed
from lowmoe.engine.tool_calls.object_lines import ObjectLines
from lowmoe.engine.tool_calls.pythonic import Pythonic
from lowmoe.engine.tool_calls.style import Style
from lowmoe.engine.tool_calls.styles import style_of
from lowmoe.engine.tool_calls.tool_sep import ToolSep
from tests.engine.tool_calls.sources import SOURCES
from tests.talking_mixtral import learned_tokenizer

BY_TEMPLATE: Mapping[str, type[Style]] = {
    "chatml": Hermes,
    "deepseek-r1": ToolSep,
    "deepseek-v3.1": ToolSep,
    "deepseek-v3.2": Invocations,
    "deepseek-v4": Invocations,
    "glm-4.5": ArgKeys,
    "glm-4.6": ArgKeys,
    "glm-4.7-flash": ArgKeys,
    "gpt-oss": Harmony,
    "granite-3.3": Listed,
    "granite-4.0": Hermes,
    "hunyuan-a13b": Listed,
    "kimi-k2": CallSections,
    "kimi-k2-thinking": CallSections,
    "llama-2": Hermes,
    "llama-3": Hermes,
    "llama-3.1": BareObject,
    "llama-4": Pythonic,
    "minimax-m1": ObjectLines,
    "minimax-m2": Invocations,
    "ministral-3": Bracketed,
    "mistral-nemo": Bracketed,
    "mixtral": Hermes,
    "phi-3.5": Hermes,
    "qwen2.5": Hermes,
    "qwen3": Hermes,
    "qwen3-coder": Functions,
    "qwen3.5": Functions,
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_style_is_told_from_a_template(name: str) -> None:
    assert type(style_of(SOURCES[name])) is BY_TEMPLATE[name]


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("<tool_calls>[{...}]</tool_calls>", Listed(open="<tool_calls>", close="</tool_calls>")),
        ("<|tool_call|>[...]<|/tool_call|>", Listed(close="<|/tool_call|>")),
        ("<|header_start|> {'\"parameters\": '}", BareObject()),
        ("a:tool_call> <invoke name=\"", None),
        ("", Hermes()),
    ],
)  # fmt: skip
def test_a_sign_is_enough(template: str, style: Style | None) -> None:
    found = style_of(template)
    assert type(found) is (Invocations if style is None else type(style))
    if isinstance(style, Listed):
        assert found == style


def test_a_model_without_a_template_or_a_tokenizer_calls_nothing() -> None:
    files = {
        TOKENIZER: learned_tokenizer().to_str().encode(),
        CHAT_TEMPLATE: SOURCES["qwen3"].encode(),
        TOKENIZER_CONFIG: b"{}",
    }
    assert TextParts(files.get).tool_calls is not None
    for missing in (TOKENIZER, CHAT_TEMPLATE):
        assert TextParts({**files, missing: None}.get).tool_calls is None

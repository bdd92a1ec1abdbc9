"""Templates that models come with render as in transformers, and tell how the model thinks."""

from pathlib import Path

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lowmoe.engine.chat_template import ChatTemplate
from lowmoe.engine.thinking import Thinking, thinking_of

FOLDER = Path(__file__).parent.parent / "data" / "chat_templates"
SOURCES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

SYSTEM = {"role": "system", "content": "Be <b>brief</b> & kind.\n"}
QUESTION = {"role": "user", "content": ' Grüße, "you"\n'}
ANSWER = {"role": "assistant", "content": "Ho, it's 'me'."}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHo"}
CONVERSATIONS = {
    "one question": [QUESTION],
    "a system message": [SYSTEM, QUESTION],
    "turns": [QUESTION, ANSWER, QUESTION],
    "turns after a system message": [SYSTEM, QUESTION, THOUGHT, QUESTION, ANSWER, QUESTION],
    "ends with an answer": [QUESTION, ANSWER],
}
# Those that take no system message, by their own words.
REFUSED = {("mixtral", "a system message"), ("mixtral", "turns after a system message")}


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "told"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_a_models_template_renders_as_in_transformers(
    name: str, conversation: str, asked: bool
) -> None:
    messages = CONVERSATIONS[conversation]
    template = ChatTemplate(SOURCES[name], **TOKENS)
    if (name, conversation) in REFUSED:
        with pytest.raises(jinja2.TemplateError):
            render_jinja_template(conversations=[messages], chat_template=SOURCES[name], **TOKENS)
        # The system message goes before what the user says, as in the model's later template.
        system, first, *others = messages
        text = f"{system['content']}\n\n{first['content']}"
        messages = [{"role": "user", "content": text}, *others]
    (expected,), _ = render_jinja_template(
        conversations=[messages], chat_template=SOURCES[name], add_generation_prompt=asked, **TOKENS
    )
    given = CONVERSATIONS[conversation]
    assert template.render(given, add_generation_prompt=asked) == expected


PLAIN = {
    "chatml",
    "granite-4.0",
    "kimi-k2",
    "llama-3",
    "minimax-m1",
    "ministral-3",
    "mistral-nemo",
    "mixtral",
    "phi-3.5",
    "qwen2.5",
    "qwen3-coder",
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_template_tells_how_its_model_thinks(name: str) -> None:
    found = thinking_of(SOURCES[name])
    if name in PLAIN:
        assert found is None
    else:
        assert isinstance(found, Thinking)
        assert found.channels == (name == "gpt-oss")

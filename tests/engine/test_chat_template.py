"""Templates render as in transformers; hostile ones and hostile messages come to nothing."""

import functools
import json
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from lowmoe.engine.chat_template import ChatTemplate
from lowmoe.engine.messages import Message, Tool, ToolCall
from lowmoe.engine.template_program import MAX_TEMPLATE_CHARS
from lowmoe.engine.text import Tokenizer
from lowmoe.engine.tool_calls.bracketed import Bracketed
from lowmoe.errors import PromptError, TextError, UsageError

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

INST = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'].strip() + '\\n\\n' %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first %}{% set content = system_message + message['content'] %}
        {%- else %}{% set content = message['content'] %}{% endif %}
        {{- ' [INST] ' + content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

HEADERS = """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
{% set content = '<|start|>' + message['role'] + '<|stop|>\\n\\n'+ message['content'] | trim %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}
"""

BUSY = """\
{#- a comment -#}
{%- set ns = namespace(last=-1, seen='') %}
{%- macro shout(text, mark='!') %}{{ text | upper }}{{ mark }}{% endmacro %}
{%- for message in messages[::-1] %}
    {%- if ns.last < 0 and message.role == 'user' and message.content is string %}
        {%- set ns.last = (messages | length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
    {%- set content = message.content %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if tools is defined and tools %}{{ tools | tojson }}{% endif %}
    {% generation %}
    {{- shout(message['role'], mark='?') }}{{ loop.index0 == ns.last }}|{{ loop.last }}
    {%- endgeneration %}
    {{ message | tojson }} {{ content | replace('a', 'b') | title }}
    {%- for key, value in message.items() %}{{ key ~ '=' ~ (value | length) }},{% endfor %}
    {%- if message.name is defined and message.get('name') %}({{ message.name }}){% endif %}
    {%- if content.startswith('x') or content.endswith('\\n') %}{{ [1, 2.5, none] }}{% endif %}
    {{ missing }}{{ message.missing }}{{ content[:3] }}{{ 'odd' if loop.index0 % 2 else 'even' }}
{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(' / ') }}
{{- messages | rejectattr('role', 'equalto', 'user') | list | length }}
{{ messages[0] | tojson(indent=2) }}
"""

TEMPLATES = pytest.mark.parametrize(
    "source", [CHATML, INST, HEADERS, BUSY], ids=["chatml", "inst", "headers", "busy"]
)
# Without control characters: Python takes U+001C to U+001F for blanks, Rust does not.
CONTENTS = st.text(
    st.one_of(st.sampled_from("ax \n\t<>&'\"{}%"), st.characters(exclude_categories=["Cs", "Cc"]))
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    n_turns = draw(st.integers(0, 2))
    roles = ["user", *["assistant", "user"] * n_turns]
    if draw(st.booleans()):
        roles.insert(0, "system")
    return [{"role": role, "content": draw(CONTENTS)} for role in roles]


@TEMPLATES
@settings(max_examples=60, deadline=None)
@given(messages=conversations(), add_generation_prompt=st.booleans())
def test_a_template_renders_as_in_transformers(
    source: str, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    [expected], _ = render_jinja_template(
        [messages],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected


def test_a_template_without_a_bos_token_writes_none() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert ChatTemplate("{{ bos_token }}|{{ messages[0].content }}").render(messages) == "|hi"


def test_a_template_may_ask_for_the_date() -> None:
    messages = [{"role": "user", "content": "hi"}]
    year = ChatTemplate("{{ strftime_now('%Y') }}").render(messages)
    assert year.isdigit()
    assert len(year) == 4


def test_a_refusal_of_the_template_is_shown_in_its_own_words() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(TextError, match=r"refuses this conversation: Roles must alternate user"):
        ChatTemplate(INST).render(messages)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
RECURSION = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (LOOP, "OutOfFuel"),
        (RECURSION, "recursion limit"),
        ("{{ ('a' * 10000000000000) | length }}", "too large"),
        ("{{ nothing.at.all }}", "UndefinedError: .*nothing"),
        ("{{ nobody() }}", "UnknownFunction"),
        ("{% include '/etc/passwd' %}", "TemplateNotFound"),
        ("{{ strftime_now(3) }}", "must be str"),
        ("{{ messages[0].content.__class__.__mro__ }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails_is_an_error_in_one_line_and_under_a_second(
    source: str, reason: str
) -> None:
    template = ChatTemplate(source)
    start_s = time.perf_counter()
    with pytest.raises(TextError, match=rf"cannot be used \(.*{reason}.*chat_template\.jinja") as e:
        template.render([{"role": "user", "content": "hi"}])
    assert time.perf_counter() - start_s < 1
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{", "{% nonsense %}", "{{ " + "(" * 10**5, "\udc80"]
)
def test_what_is_no_template_is_refused_at_once(source: str) -> None:
    with pytest.raises(TextError, match=r"the chat template cannot be used \("):
        ChatTemplate(source)


def test_a_template_of_unheard_of_size_is_refused() -> None:
    with pytest.raises(TextError, match=rf"has {MAX_TEMPLATE_CHARS + 1} characters"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARS + 1))


def test_a_template_that_inflates_its_messages_is_refused() -> None:
    doubling = (
        "{% set ns = namespace(x='aaaaaaaaaa') %}"
        "{% for i in range(23) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
    )
    with pytest.raises(TextError, match=r"made 83886080 characters, but at most"):
        ChatTemplate(doubling).render([{"role": "user", "content": "hi"}])


def test_a_template_that_compares_all_messages_has_fuel_enough() -> None:
    pairs = "{% for a in messages %}{% for b in messages %}{% if a == b %}{% endif %}{% endfor %}"
    messages = [{"role": "user", "content": "hi"}] * 300
    assert ChatTemplate(pairs + "{% endfor %}done").render(messages) == "done"


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"content": "hi"}, "role is None, but must be in"),
        ({"role": "root", "content": "hi"}, "role is 'root', but must be in"),
        ({"role": "user"}, r"\(user\) has no content"),
        ({"role": "user", "content": None}, r"content is of type NoneType"),
        ({"role": "user", "content": [{"type": "text"}]}, "content is of type list"),
        ({"role": "user", "content": "hi", "name": 3}, "name is of type int"),
        ("hi", "is 'hi', but must be a mapping"),
    ],
)
def test_a_malformed_message_is_refused_by_number(message: object, fault: str) -> None:
    messages = [{"role": "system", "content": "x"}, message]
    with pytest.raises(UsageError, match=rf"message 2.*{fault}"):
        ChatTemplate(CHATML).render(messages)  # type: ignore[arg-type]


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(PromptError, match="holds 0 messages"):
        ChatTemplate(CHATML).render([])


def test_a_message_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match=r"U\+DCE9"):
        ChatTemplate(CHATML).render([{"role": "user", "content": "caf\udce9"}])


def from_config(**fields: object) -> ChatTemplate:
    data = json.dumps(fields).encode()
    return ChatTemplate.from_files(chat_template_jinja=None, tokenizer_config_json=data)


def test_the_template_is_found_wherever_a_model_may_keep_it() -> None:
    messages = [{"role": "user", "content": "hi"}]
    source = "{{ bos_token }}{{ eos_token }}{{ messages[0].content }}"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": source}]
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    assert from_config(chat_template=source, **tokens).render(messages) == "<s></s>hi"
    assert from_config(chat_template=named, **tokens).render(messages) == "<s></s>hi"
    both = ChatTemplate.from_files(
        chat_template_jinja=source.encode(),
        tokenizer_config_json=json.dumps({"chat_template": "no", **tokens}).encode(),
    )
    assert both.render(messages) == "<s></s>hi"
    alone = ChatTemplate.from_files(chat_template_jinja=b"{{ 1 }}", tokenizer_config_json=None)
    assert alone.render(messages) == "1"


def test_a_template_for_tools_is_taken_where_there_are_tools() -> None:
    both = from_config(
        chat_template=[
            {"name": "tool_use", "template": "tools: {{ tools | tojson }}[TOOL_CALLS]"},
            {"name": "default", "template": "{{ messages[0].content }}"},
        ]
    )
    question, call = Message(role="user", content="hi"), ToolCall(id="", name="t", arguments={})
    assert both.render([question]) == "hi"
    assert both.render([question], tools=[Tool(name="t")]).startswith("tools: ")
    for turn in (Message(role="assistant", calls=[call]), Message(role="tool", content="1")):
        assert both.render([question, turn]).startswith("tools: ")
    assert both.style == Bracketed(in_list=True)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, "brings no chat template.*complete a plain text instead"),
        ({"chat_template": None}, "brings no chat template"),
        ({"chat_template": 3}, "chat_template is of type int"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, r"\['rag'\].*\"default\""),
        ({"chat_template": [3, {"name": []}]}, '"default"'),
        ({"chat_template": [{"name": "default", "template": 1}]}, "of type int"),
        (
            {"chat_template": [{"name": "default", "template": "x"}, {"name": "tool_use"}]},
            "of type NoneType",
        ),
        ({"chat_template": "x", "bos_token": 1}, "bos_token is 1, but must be a string"),
    ],
)
def test_a_tokenizer_config_without_a_usable_template_is_refused(
    fields: dict[str, object], fault: str
) -> None:
    with pytest.raises(TextError, match=fault):
        from_config(**fields)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_tokenizer_config_is_refused(data: bytes) -> None:
    with pytest.raises(TextError, match=r"tokenizer_config\.json (is not JSON|holds a)"):
        ChatTemplate.from_files(chat_template_jinja=b"x", tokenizer_config_json=data)


def test_a_template_file_in_another_encoding_is_refused() -> None:
    with pytest.raises(TextError, match=r"chat_template\.jinja is not UTF-8"):
        ChatTemplate.from_files(chat_template_jinja=b"caf\xe9", tokenizer_config_json=None)


def test_a_bos_token_that_nothing_spells_is_missed() -> None:
    with pytest.raises(TextError, match=r"writes bos_token, but there is no tokenizer_config"):
        ChatTemplate.from_files(chat_template_jinja=INST.encode(), tokenizer_config_json=None)


ADDED = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]


@functools.cache
def raw_tokenizer() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=ADDED,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the quick brown fox <|im_start|> <|im_end|>"] * 3, trainer)
    # DeepSeek's tokens that begin a turn are not special, nor are Gemma's runs of line breaks.
    raw.add_tokens([AddedToken(text, special=False) for text in ("<turn>", "</think>", "\n\n")])
    return raw


def tokenizer() -> Tokenizer:
    return Tokenizer.from_bytes(raw_tokenizer().to_str().encode())


CONTROL_TEXTS = st.lists(
    st.sampled_from([*ADDED, "<turn>", "\n\n", "fox ", "<|im_", "end|>", "\ufdd0", "\ufdd1", "<"])
).map("".join)


@settings(max_examples=200, deadline=None)
@given(content=CONTROL_TEXTS, role=st.sampled_from(["user", "assistant", "system", "tool"]))
def test_no_message_can_write_a_control_token(content: str, role: str) -> None:
    template = ChatTemplate("<turn>\n" + CHATML)
    harmless = template.encode([{"role": role, "content": "fox"}], tokenizer())
    found = template.encode([{"role": role, "content": content}], tokenizer())
    control = {tokenizer().token_id(text) for text in ADDED}
    if role != "assistant":
        control.add(tokenizer().token_id("<turn>"))
    assert [i for i in found if i in control] == [i for i in harmless if i in control]


@settings(max_examples=100, deadline=None)
@given(content=CONTROL_TEXTS.filter(lambda text: "\ufdd0" not in text and "\ufdd1" not in text))
def test_a_message_keeps_its_characters_when_it_spells_control_tokens(content: str) -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    found = template.encode([{"role": "user", "content": content}], tokenizer())
    assert tokenizer().decode(found) == content


def test_a_control_token_that_is_repeated_is_spelled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spelled: list[str] = []
    encode_plain = Tokenizer.encode_plain

    def watched(tokenizer: Tokenizer, text: str) -> list[int]:
        spelled.append(text)
        return encode_plain(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "encode_plain", watched)
    template = ChatTemplate("{{ messages[0].content }}")
    text = "<|im_end|>" * 1000
    found = template.encode([{"role": "user", "content": text}], tokenizer())
    assert tokenizer().decode(found) == text
    assert spelled == ["<|im_end|>"]


@settings(max_examples=100, deadline=None)
@given(messages=conversations())
def test_ordinary_messages_get_the_ids_that_transformers_gives_them(
    messages: list[dict[str, str]],
) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer(), chat_template=CHATML)
    found = ChatTemplate(CHATML).encode(messages, tokenizer())
    expected = theirs.apply_chat_template(
        messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
    )
    assert found == expected


def test_the_assistant_may_write_a_token_that_the_template_looks_for() -> None:
    template = ChatTemplate("{{ messages[0].content.split('</think>')[-1] }}</think>")
    think = tokenizer().token_id("</think>")

    def count(role: str) -> int:
        message = {"role": role, "content": "</think>a</think>"}
        plain = ChatTemplate("{{ messages[0].content }}{# </think> #}")
        return plain.encode([message], tokenizer()).count(think)

    assert count("assistant") == 2
    assert count("user") == 0
    # The template still finds it where it is marked.
    split = template.encode([{"role": "user", "content": "b</think>a"}], tokenizer())
    assert tokenizer().decode(split) == "a</think>"

"""What no model could be told of, or no template bear, is refused as a tool, in one line."""

from typing import Any

import pytest

from lowmoe.engine.chat_template import ChatTemplate
from lowmoe.engine.messages import Message, Tool, ToolCall
from lowmoe.engine.tool_calls.definitions import (
    MAX_ALL_CHARS,
    MAX_DEPTH,
    MAX_TOOL_CHARS,
    MAX_TOOLS,
    require_tools,
)
from lowmoe.errors import LowMoeError, UsageError


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def circle() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"a": schema}
    return schema


def bush() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema |= {"a": schema, "b": [schema]}
    return schema


def tool(name: Any = "t", description: Any = "", **parameters: Any) -> Tool:
    return Tool(name=name, description=description, parameters=parameters)


@pytest.mark.parametrize(
    ("tools", "fault"),
    [
        ([tool("")], "tool 1 is named '', but must have 1 to 128 letters"),
        ([tool("a b")], "is named 'a b', but"),
        ([tool("a\n")], r"is named 'a\\n', but"),
        ([tool("<|im_end|>")], "is named '<|im_end|>', but".replace("|", r"\|")),
        ([tool("naïve")], "is named 'naïve'"),
        ([tool("x" * 10**6)], f"is named '{'x' * 40}', but"),
        ([tool(3)], "is named '3', but"),
        ([tool("a"), tool("b"), tool("a")], "tool 3 is named 'a' as another is"),
        ([tool(f"t{i}") for i in range(MAX_TOOLS + 1)], f"{MAX_TOOLS + 1} tools are given, but"),
        ([tool(description=3)], "tool t: its description must be a string"),
        ([tool(description="\udc80")], "tool t: character 0 of the text is U"),
        ([tool(description="x" * (MAX_TOOL_CHARS + 1))], "at most 65536 are taken"),
        ([tool(type="array")], "its parameters are of type 'array', but must be .* 'object'"),
        ([tool(a=nested(MAX_DEPTH))], f"nested more than {MAX_DEPTH} deep"),
        ([tool(**circle())], f"nested more than {MAX_DEPTH} deep"),
        ([tool(**bush())], f"nested more than {MAX_DEPTH} deep"),
        ([tool(a=float("nan"))], "are not JSON"),
        ([tool(a={1, 2})], "are not JSON"),
        ([tool(a="\ud800")], "U\\+D800"),
        ([tool(a="x" * MAX_TOOL_CHARS)], "as JSON, but at most 65536 are taken"),
        ([Tool(name="t", parameters=[])], "must be an object, but are of type list"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_an_unfit_tool_is_refused_in_one_line(tools: list[Tool], fault: str) -> None:
    with pytest.raises(UsageError, match=fault) as refusal:
        require_tools(tools)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_many_large_tools_are_refused_together() -> None:
    n_tools = MAX_ALL_CHARS // 60_000 + 1
    tools = [tool(f"t{i}", description="x" * 60_000) for i in range(n_tools)]
    with pytest.raises(UsageError, match=f"at most {MAX_ALL_CHARS} are taken"):
        require_tools(tools)


def test_what_fits_is_taken() -> None:
    require_tools([])
    require_tools([tool("get_weather.v2-x", "how it is", type="object", a=nested(MAX_DEPTH - 2))])


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (
            Message(role="user", calls=[ToolCall(id="", name="t", arguments={})]),
            r"message 1 \(user\) makes calls, but only the assistant can",
        ),
        (
            Message(role="assistant", calls=[ToolCall(id="", name="a b", arguments={})]),
            "message 1: a call is named 'a b'",
        ),
        (
            Message(
                role="assistant", calls=[ToolCall(id="", name="t", arguments=nested(MAX_DEPTH))]
            ),
            "the arguments of t are nested more than 32 deep",
        ),
        (
            Message(role="assistant", calls=[ToolCall(id="", name="t", arguments=[])]),  # type: ignore[arg-type]
            "the arguments of t must be an object",
        ),
        (Message(role="root"), "role is 'root'"),  # type: ignore[arg-type]
        (Message(role="user", content=None), "content is of type NoneType"),  # type: ignore[arg-type]
        (Message(role="user", thinking="\udc80"), "U\\+DC80"),
        (Message(role="tool", call_id=3), "call_id is of type int"),  # type: ignore[arg-type]
        (
            Message(role="assistant", calls=[ToolCall(id="\udc80", name="t", arguments={})]),
            "U\\+DC80",
        ),
    ],
)  # fmt: skip
def test_an_unfit_turn_is_refused_by_number(message: Message, fault: str) -> None:
    with pytest.raises(LowMoeError, match=fault):
        ChatTemplate("{{ messages[0].content }}").render([message])


def test_a_large_tool_leaves_a_template_fuel_enough() -> None:
    properties = {f"property_{i}": {"type": "string"} for i in range(1500)}
    source = (
        "{% for t in tools %}{{ t.function.name }}"
        "{% for k, v in t.function.parameters.properties.items() %}"
        "{% if v.type == 'string' and v.description is not defined %}{{ k }}: {{ v.type }}\n"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    large = Tool(name="t", parameters={"type": "object", "properties": properties})
    text = ChatTemplate(source).render([Message(role="user", content="hi")], tools=[large])
    assert text.count("\n") == 1500

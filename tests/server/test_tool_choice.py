"""Tools and what is said of calling them must agree."""

import time

import pytest

from lowmoe.engine.messages import Tool, ToolChoice
from lowmoe.server.errors import FieldError
from lowmoe.server.tool_choice import require_agreeing


def test_a_name_that_is_there_twice_is_found_in_time() -> None:
    # As many as a request's namespaces can hold; comparing each with each took seconds, in which
    # nobody else was answered, and looking each up takes some ms.
    tools = [Tool(name=f"tool_{i}") for i in range(128 * 128)] + [Tool(name="tool_16000")]
    began = time.thread_time()
    with pytest.raises(FieldError, match="tools: two are called tool_16000"):
        require_agreeing(tools, ToolChoice())
    assert time.thread_time() - began < 0.5

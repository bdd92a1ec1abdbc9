"""`<｜DSML｜invoke name="..."><｜DSML｜parameter name="..." string="true">`: DeepSeek since V3.2.

Knows:        these tags.
Ignorant of:  other styles.

Source: https://huggingface.co/deepseek-ai/DeepSeek-V3.2/blob/main/encoding/README.md
"""

from lowmoe.engine.tool_calls.invocations import Invocations
from lowmoe.engine.tool_calls.parameters import ParameterTags

_MARK = "｜DSML｜"


def dsml(template: str) -> Invocations:
    """The style of a template: V3.2 writes `function_calls` around calls, V4 `tool_calls`."""
    block = "tool_calls" if "tool_calls>" in template else "function_calls"
    parameters = ParameterTags(
        open=f'<{_MARK}parameter name="',
        typed=('" string="true">', '" string="false">'),
        close=f"</{_MARK}parameter>",
        end=f"</{_MARK}invoke>",
    )
    return Invocations(
        open=f"<{_MARK}{block}>",
        close=f"</{_MARK}{block}>",
        invoke=f'<{_MARK}invoke name="',
        after_name='">\n',
        parameters=parameters,
    )

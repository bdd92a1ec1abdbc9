"""`<minimax:tool_call><invoke name="..."><parameter name="...">value</parameter>...`: MiniMax-M2.

Knows:        these tags; the first has a name before the colon that a template tells.
Ignorant of:  other styles.

Source: https://huggingface.co/MiniMaxAI/MiniMax-M2/blob/main/docs/tool_calling_guide.md
"""

import re

from lowmoe.engine.tool_calls.invocations import Invocations
from lowmoe.engine.tool_calls.parameters import ParameterTags

SIGNS = (":tool_call>", '<invoke name="')

_BLOCK = re.compile(r"(\w*:tool_call)>")


def invoke(template: str) -> Invocations:
    """The style of a template in which these signs stand."""
    [block, *_] = _BLOCK.findall(template)
    parameters = ParameterTags(
        open='<parameter name="', named='">', close="</parameter>", end="</invoke>"
    )
    return Invocations(
        open=f"<{block}>",
        close=f"</{block}>",
        invoke='<invoke name="',
        after_name='">\n',
        parameters=parameters,
    )

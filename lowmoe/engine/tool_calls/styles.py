"""Which style of calls a model has, told from its chat template.

Knows:        what of a template gives each style away.
Ignorant of:  what the styles do.
"""

from collections.abc import Callable

from lowmoe.engine.tool_calls import tool_sep
from lowmoe.engine.tool_calls.arg_keys import ArgKeys
from lowmoe.engine.tool_calls.bare_object import BareObject
from lowmoe.engine.tool_calls.bracketed import Bracketed
from lowmoe.engine.tool_calls.call_sections import CallSections
from lowmoe.engine.tool_calls.dsml import dsml
from lowmoe.engine.tool_calls.functions import Functions
from lowmoe.engine.tool_calls.harmony import Harmony
from lowmoe.engine.tool_calls.hermes import Hermes
from lowmoe.engine.tool_calls.invoke import SIGNS as INVOKE_SIGNS
from lowmoe.engine.tool_calls.invoke import invoke
from lowmoe.engine.tool_calls.listed import Listed
from lowmoe.engine.tool_calls.object_lines import ObjectLines
from lowmoe.engine.tool_calls.pythonic import Pythonic
from lowmoe.engine.tool_calls.style import Style
from lowmoe.engine.tool_calls.tool_sep import ToolSep

# The first whose signs are all in a template: a sign may be part of another style too.
_STYLES: tuple[tuple[tuple[str, ...], Callable[[str], Style]], ...] = (
    (("<|channel|>", "<|message|>"), lambda template: Harmony()),
    (("｜DSML｜",), dsml),
    ((tool_sep.OPEN,), lambda template: ToolSep(fenced="```json" in template)),
    (("<|tool_calls_section_begin|>",), lambda template: CallSections()),
    (INVOKE_SIGNS, invoke),
    (("</arg_key><arg_value>",), lambda template: ArgKeys(line="")),
    (("<arg_key>", "<arg_value>"), lambda template: ArgKeys()),
    (("<tool_call>", "<function=", "<parameter="), lambda template: Functions()),
    (("[TOOL_CALLS]",), lambda template: Bracketed(in_list="[ARGS]" not in template)),
    (("<tool_calls>[{",), lambda template: Listed(open="<tool_calls>", close="</tool_calls>")),
    (("<tool_calls>",), lambda template: ObjectLines()),
    (("<|/tool_call|>",), lambda template: Listed(close="<|/tool_call|>")),
    (("<|tool_call|>",), lambda template: Listed()),
    (("<|start_header_id|>", '"parameters": '), lambda template: BareObject()),
    (("[func_name1(",), lambda template: Pythonic()),
    (("<|header_start|>", '"parameters": '), lambda template: BareObject()),
)


def style_of(template: str) -> Style:
    """The style that a template writes or asks for; Hermes, the commonest, if it knows no other."""
    return next(
        (style(template) for signs, style in _STYLES if all(sign in template for sign in signs)),
        Hermes(),
    )

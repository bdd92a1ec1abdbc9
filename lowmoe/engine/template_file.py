"""Which of a model's small files its chat template is in.

Knows:        where templates are kept, which file goes first.
Ignorant of:  what a template says; where small files are kept.
"""

import json
from collections.abc import Callable

from lowmoe.engine.text_parts import CHAT_TEMPLATE, TOKENIZER_CONFIG


def template_file(read: Callable[[str], bytes | None]) -> str | None:
    """Its name; None for a model without a template, which goes on with texts only.

    read: the content of a small file, or None if there is none of that name.
    """
    if read(CHAT_TEMPLATE) is not None:
        return CHAT_TEMPLATE
    try:
        config = json.loads(read(TOKENIZER_CONFIG) or b"{}")
    except (ValueError, RecursionError):
        return None  # whoever reads the template says what is wrong
    return TOKENIZER_CONFIG if isinstance(config, dict) and config.get("chat_template") else None

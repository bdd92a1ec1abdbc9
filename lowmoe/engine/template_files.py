"""Finds a model's chat template and the tokens it writes in the model's files.

Knows:        which files and keys hold them.
Ignorant of:  what a template does.
"""

import json
import re
from dataclasses import dataclass

from lowmoe.errors import TextError


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTemplate:
    """tool_use: the template for conversations with tools, None where source is for these too."""

    source: str
    tool_use: str | None
    bos_token: str | None
    eos_token: str | None


def template_in_files(
    chat_template_jinja: bytes | None, tokenizer_config_json: bytes | None
) -> FoundTemplate:
    """chat_template.jinja goes before tokenizer_config.json's "chat_template", which is a template
    or a list of named ones, of which "default" is taken, and "tool_use" if there is one.

    Raises TextError if there is no template.
    """
    config = _json_object(tokenizer_config_json)
    if chat_template_jinja is not None:
        source, tool_use = _utf8(chat_template_jinja), None
    else:
        source, tool_use = _templates_in(config)
    for name in ("bos_token", "eos_token"):
        if tokenizer_config_json is None and re.search(rf"\b{name}\b", source):
            raise TextError(
                f"the chat template writes {name}, but there is no tokenizer_config.json that "
                "spells it; download that file beside chat_template.jinja"
            )
    return FoundTemplate(
        source=source,
        tool_use=tool_use,
        bos_token=_token_in(config, "bos_token"),
        eos_token=_token_in(config, "eos_token"),
    )


def _json_object(data: bytes | None) -> dict[str, object]:
    if data is None:
        return {}
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TextError(
            f"tokenizer_config.json is not JSON ({error}); download the file again"
        ) from error
    if not isinstance(fields, dict):
        raise TextError(
            f"tokenizer_config.json holds a {type(fields).__name__}, but must hold an object; "
            "download the file again"
        )
    return fields


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TextError(
            f"chat_template.jinja is not UTF-8 ({error}); download the file again"
        ) from error


def _templates_in(config: dict[str, object]) -> tuple[str, str | None]:
    """The template, and that for tools."""
    found, tool_use = config.get("chat_template"), None
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        names = [entry.get("name") for entry in entries]
        if "default" not in names:
            raise TextError(
                f"tokenizer_config.json names the chat templates {names}, but none of them "
                '"default"; put the right one into chat_template.jinja'
            )
        found = entries[names.index("default")].get("template")
        if "tool_use" in names:
            tool_use = _string(entries[names.index("tool_use")].get("template"))
    if found is None:
        raise TextError(
            "this model brings no chat template, which chat messages need; complete a plain text "
            "instead, or put a template into chat_template.jinja in its folder"
        )
    return _string(found), tool_use


def _string(found: object) -> str:
    if not isinstance(found, str):
        raise TextError(
            f"tokenizer_config.json: chat_template is of type {type(found).__name__}, but must be "
            "a string or a list of named strings; download the file again"
        )
    return found


def _token_in(config: dict[str, object], key: str) -> str | None:
    found = config.get(key)
    # Older files write the token with its matching rules.
    token = found.get("content") if isinstance(found, dict) else found
    if token is not None and not isinstance(token, str):
        raise TextError(
            f"tokenizer_config.json: {key} is {found!r}, but must be a string or null; "
            "download the file again"
        )
    return token

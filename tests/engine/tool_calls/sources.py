"""The chat templates that tools are put into.

Knows:        where they are; one that is not free, in its own words.
Ignorant of:  what is tested with them.
"""

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
SOURCES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
# Llama 3.1's own is not free; this writes calls as it does.
SOURCES["bare"] = """\
{%- for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' }}
{%- if loop.first and tools %}{{ tools | tojson }}{% endif %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{%- else %}{{ m.content }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}
"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

"""The chat templates that tools are put into.

Knows:        where they are.
Ignorant of:  what is tested with them.
"""

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
SOURCES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

"""The command that would run a model as it was planned.

Knows:        how `lowmoe run` spells what a plan was asked for.
Ignorant of:  plans.
"""

import shlex
from collections.abc import Mapping

# Of LoadOptions, but those that `lowmoe run` has no word for.
OPTIONS = ("gpu", "ram", "vram", "threads", "context", "kv", "misses", "miss_planes")


def run_line(model: str, bits: int, options: Mapping[str, object]) -> str:
    """options: by their names in LoadOptions; None, "auto" and what is not among OPTIONS are left
    out.
    """
    said = {name: options.get(name) for name in OPTIONS}
    words = [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in said.items()
        if value not in (None, "auto")
    ]
    return " ".join(["lowmoe run", shlex.quote(model), f"--bits {bits}", *words])

"""What GGUF files are called, those of a model that was split among them.

Knows:        names.
Ignorant of:  what is in the files.
"""

import re
from pathlib import Path

from lowmoe.errors import CheckpointError

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def split_paths(path: Path) -> list[Path]:
    """All files of a model, by the name of its first.  Raises CheckpointError for one missing."""
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    if int(found["number"]) != 1:
        raise CheckpointError(
            f"{path}: is part {int(found['number'])} of {count}. Give the first: "
            f"{found['stem']}-00001-of-{count:05}.gguf"
        )
    paths = [path]
    for number in range(2, count + 1):
        paths.append(path.with_name(f"{found['stem']}-{number:05}-of-{count:05}.gguf"))
        if not paths[-1].is_file():
            raise CheckpointError(
                f"{paths[-1]}: missing, but the model has {count} parts. Download it too."
            )
    return paths

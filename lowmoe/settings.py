"""Every environment variable that lowmoe reads, in one place.

LOWMOE_HOME      where pulled and quantized models live; default: the user's cache folder
LOWMOE_ISA       the instruction set that native code uses, or torch to use none; default: the best
LOWMOE_API_KEY   what clients of `lowmoe serve` must send; default: nothing
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE belong to huggingface-hub, which reads them itself.

Knows:        names and defaults of environment variables.
Ignorant of:  what is done with them.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment asked for.

    home: the folder of all models; isa: None for the best; api_key: of a server, None for none.
    """

    home: Path
    isa: str | None = None
    api_key: str | None = None


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of this environment, by default the process's."""
    values = os.environ if environment is None else environment
    home = values.get("LOWMOE_HOME")
    return Settings(
        home=Path(home).expanduser() if home else _cache_folder(values) / "lowmoe",
        isa=values.get("LOWMOE_ISA") or None,
        api_key=values.get("LOWMOE_API_KEY") or None,
    )


def inherited() -> dict[str, str]:
    """All variables, as a program sees them that is started from here."""
    return dict(os.environ)


def _cache_folder(values: Mapping[str, str]) -> Path:
    if sys.platform == "win32":
        return Path(values.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(values.get("XDG_CACHE_HOME") or Path.home() / ".cache")

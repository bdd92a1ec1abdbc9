"""Mixture-of-Experts language models of 100B+ parameters on one consumer GPU, or on none.

Names are loaded when they are first used, so that `import lowmoe` costs nothing.
"""

from typing import TYPE_CHECKING

from lowmoe.errors import LowMoeError

if TYPE_CHECKING:
    from lowmoe.api import Model, load, quantize
    from lowmoe.engine.answer import Token
    from lowmoe.engine.constraint import Grammar, JsonSchema, Regex

__all__ = [
    "Grammar",
    "JsonSchema",
    "LowMoeError",
    "Model",
    "Regex",
    "Token",
    "__version__",
    "load",
    "quantize",
]


def __getattr__(name: str) -> object:
    import importlib
    import importlib.metadata

    if name in ("Model", "load", "quantize"):
        return getattr(importlib.import_module("lowmoe.api"), name)
    if name == "Token":
        return importlib.import_module("lowmoe.engine.answer").Token
    if name in ("Grammar", "JsonSchema", "Regex"):
        return getattr(importlib.import_module("lowmoe.engine.constraint"), name)
    if name == "__version__":
        return importlib.metadata.version("lowmoe")
    raise AttributeError(f"module 'lowmoe' has no attribute {name!r}")

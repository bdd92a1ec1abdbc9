"""The models on this machine: what a name stands for, and making a model folder out of it.

    LOWMOE_HOME/models/NAME      model folders, finished or not
    LOWMOE_HOME/work/NAME        what a pull has under way

`names` finds, lists, checks and removes; `making` makes, by `options`, what fits by `budgets`, on
the text of `calibration`, of GGUF files that `gguf_pulls` fetches too.
"""

from lowmoe.library.calibration import section_tokens
from lowmoe.library.making import (
    made_folder,
    prepare,
    pull,
    quantize_checkpoint,
    recipe_words,
    require_recipe,
)
from lowmoe.library.names import (
    HubModel,
    Installed,
    LocalCheckpoint,
    LocalFolder,
    Located,
    demo_folder,
    find_installed,
    installed,
    locate,
    models_home,
    remove,
    verify,
)
from lowmoe.library.options import MakeOptions

__all__ = [
    "HubModel",
    "Installed",
    "LocalCheckpoint",
    "LocalFolder",
    "Located",
    "MakeOptions",
    "demo_folder",
    "find_installed",
    "installed",
    "locate",
    "made_folder",
    "models_home",
    "prepare",
    "pull",
    "quantize_checkpoint",
    "recipe_words",
    "remove",
    "require_recipe",
    "section_tokens",
    "verify",
]

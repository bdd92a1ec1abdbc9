"""Every exception a user may catch, drawn as a tree.

LowMoeError                    exit code 1: the world was wrong
├── UsageError                 exit code 2: the command or the call was wrong
│   ├── UnknownModelError      no alias, no folder and no hub repository of that name
│   └── PromptError            empty, or not of this vocabulary
│       └── ContextError       longer than the context
├── CheckpointError            a checkpoint's files contradict themselves or each other
│   └── UnsupportedModelError  the files are fine, nobody here implemented that model
├── FolderError                a model folder is damaged, unfinished or too new
├── TextError                  tokenizer or chat template missing or unusable
├── MemoryBudgetError          a budget, of RAM or of a GPU, cannot hold what must be there
├── GpuError                   a GPU that was asked for by name and cannot do it
├── DiskSpaceError             not enough room, said before anything is written
└── DownloadError              the hub did not give what was asked for

Knows:        what went wrong in which part of the outside world.
Ignorant of:  how it is shown; `cli` turns each into one line on stderr.
"""


class LowMoeError(Exception):
    """What was found, what was expected, what to do: one line, ready to be shown."""

    exit_code = 1


class UsageError(LowMoeError):
    """An option or argument that cannot be honoured."""

    exit_code = 2


class UnknownModelError(UsageError):
    """No alias, folder or hub repository goes by this name."""


class PromptError(UsageError):
    """A prompt that is empty or that nothing can follow."""


class ContextError(PromptError):
    """A prompt that does not fit the context; a shorter one might."""


class CheckpointError(LowMoeError):
    """A checkpoint whose files contradict themselves or each other."""


class UnsupportedModelError(CheckpointError):
    """A sound checkpoint of a model, or with a feature, that is not implemented."""


class FolderError(LowMoeError):
    """A model folder that is damaged, unfinished or made by a newer version."""


class TextError(LowMoeError):
    """A tokenizer or chat template that is missing or cannot be used."""


class MemoryBudgetError(LowMoeError):
    """A memory budget that cannot hold what must be in memory at once."""


class GpuError(LowMoeError):
    """A GPU that was asked for by name and cannot compute this model, or anything."""


class DiskSpaceError(LowMoeError):
    """Too little free disk for what is about to be written."""


class DownloadError(LowMoeError):
    """The hub could not be reached, refused, or sent something else than promised."""

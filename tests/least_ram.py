"""The least RAM that a model can be loaded with.

Knows:        that a refusal says how much more is needed.
Ignorant of:  which model, how it is loaded.
"""

from collections.abc import Callable

import pytest

from lowmoe.errors import MemoryBudgetError

TOO_LITTLE = 1000


def least_ram(load: Callable[[int], object]) -> int:
    """Bytes with which two experts fit.  load: with so many bytes of RAM."""
    with pytest.raises(MemoryBudgetError, match="Give at least") as refused:
        load(TOO_LITTLE)
    return TOO_LITTLE + int(str(refused.value).split("Give at least ")[1].split()[0])

"""What is asked of whoever has a model's experts, wherever they are.

Knows:        the questions.
Ignorant of:  how experts are lent: that is between a lender and the computation made for it.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeAlias

from lowmoe.experts.ledger import Traffic
from lowmoe.experts.policy import Key
from lowmoe.experts.uses import Uses

Tier: TypeAlias = Literal["gpu", "ram"]


class NoLongerWanted(Exception):
    """Nobody waits for a pass any more; it ends between two of its layers."""


class Lender(Protocol):
    """Lends experts to one computation."""

    @property
    def tier(self) -> Tier:
        """Where experts are when they are computed with."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert there."""

    @property
    def is_complete(self) -> bool:
        """Whether every expert is there for good."""

    def read_rest(self, n_experts: Sequence[int]) -> None:
        """Go on reading those that are not there yet.  n_experts: of each layer."""

    def while_wanted(self, is_wanted: Callable[[], bool]) -> AbstractContextManager[None]:
        """A block with a pass that raises NoLongerWanted at its next layer once it is not wanted,
        if reading experts may take it long.
        """

    def give_back(self) -> bool:
        """Leave some of a GPU's memory to other work; False if there is none to leave."""

    def residents(self) -> dict[int, list[int]]:
        """The experts that are there now, by layer."""

    @property
    def uses(self) -> Uses | None:
        """How often each was used, where somebody counts."""

    def in_memory(self) -> dict[Tier, Collection[Key]]:
        """The experts that each tier holds, those in several only with the uppermost."""

    def traffic(self) -> Traffic:
        """What was lent and read so far."""

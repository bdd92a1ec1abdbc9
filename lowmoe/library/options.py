"""What whoever makes a model folder says.

Knows:        which bits and formats there are.
Ignorant of:  how folders are made.
"""

from dataclasses import dataclass
from pathlib import Path

from lowmoe.checkpoint.layout import FORMATS, Recipe
from lowmoe.errors import UsageError
from quant.layout import SYMBOL_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeOptions:
    """How to make a model folder.

    bits: of experts, 2, 4 or 6; format: "trellis", or "nf4", "bf16", "fp16", "fp32", which have
    widths of their own; calibration: a text file, None for the text that comes with lowmoe;
    calibrate: False codes all channels alike; threads: of the encoder, None for all cores.
    """

    bits: int = 4
    format: str = "trellis"
    calibration: Path | None = None
    calibrate: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 6):
            raise UsageError(f"bits is {self.bits}, but must be 2, 4 or 6.")
        if self.format not in FORMATS:
            raise UsageError(f"format is {self.format!r}, but must be one of {', '.join(FORMATS)}.")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads is {self.threads}, but must be at least 1.")
        if self.calibration is not None and not self.calibrate:
            raise UsageError(
                f"calibration is {self.calibration}, but calibrating is switched off. "
                "Leave one of them out."
            )

    def recipe(self) -> Recipe:
        """The same in terms of planes."""
        return Recipe(format=self.format, expert_planes=self.bits // SYMBOL_BITS)

    @property
    def calibrates(self) -> bool:
        """Whether a text is run through the model; formats without codes need none."""
        return self.calibrate and self.recipe().dense_dtype is None

"""A strict reader of config.json: every key has a type, a range or a refusal.

Knows:        how Hugging Face spells numbers, choices and their absence.
Ignorant of:  what a key means to a model.
"""

import sys
from collections.abc import Mapping
from typing import Any

from lowmoe.errors import CheckpointError, UnsupportedModelError


class HfConfig:
    """One object of a Hugging Face config.json."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, *, default: int | None = None, maximum: int = 2**31) -> int:
        """A whole number from 1 to maximum; absent or null gives the default, if there is one."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise CheckpointError(
                f"config.json: {key} is {value!r}, but must be a whole number from 1 to {maximum}."
            )
        return value

    def optional_integer(self, key: str, *, absent: int | None = None) -> int | None:
        """A whole number from 1, None where the key is null, `absent` where it is not there."""
        return None if self.values.get(key, absent) is None else self.integer(key, default=absent)

    def number(self, key: str, *, default: float | None = None) -> float:
        """A finite number above 0; absent or null gives the default, if there is one."""
        return self._positive(key, self._value(key, default))

    def boolean(self, key: str, *, default: bool) -> bool:
        """true or false; absent gives the default."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} is {value!r}, but must be true or false.")
        return value

    def require(self, key: str, *wanted: object) -> None:
        """Refuse every value but those implemented; None among them allows a missing key."""
        value = self.values.get(key)
        if value not in wanted:
            raise UnsupportedModelError(
                f"config.json: {key} is {value!r}, but only {' or '.join(map(repr, wanted))} is "
                "implemented. This model cannot run here yet."
            )

    def rope_theta(self, *, default: float) -> float:
        """The base of plain rotary positions, in either of the spellings transformers wrote."""
        self.require("rope_scaling", None)
        parameters = self.values.get("rope_parameters")
        if parameters is None:
            return self.number("rope_theta", default=default)
        if not isinstance(parameters, dict) or parameters.get("rope_type") != "default":
            raise UnsupportedModelError(
                f"config.json: rope_parameters is {parameters!r}, but only rope_type 'default' is "
                "implemented. This model cannot run here yet."
            )
        return self._positive("rope_theta", parameters.get("rope_theta", default))

    def end_ids(self) -> tuple[int, ...]:
        """The token ids that end a text: eos_token_id, one, several or none."""
        value = self.values.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(f"config.json: eos_token_id is {value!r}, but must be token ids.")
        return tuple(ids)

    def _value(self, key: str, default: float | None) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise CheckpointError(
                f"config.json: {key} is missing. The file is incomplete; download it again."
            )
        return default if value is None else value

    @staticmethod
    def _positive(key: str, value: object) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value <= sys.float_info.max  # JSON's whole numbers can be longer
        ):
            raise CheckpointError(f"config.json: {key} is {value!r}, but must be a number above 0.")
        return float(value)

"""A strict reader of what a GGUF file says of its model.

Knows:        that most keys begin with the architecture's name, that a number may be a list.
Ignorant of:  files; which architecture has which keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lowmoe.errors import CheckpointError, UnsupportedModelError

ARCHITECTURE = "general.architecture"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
MAX_EXPERTS = 4096  # eight times as many as any model has
_NOTHING: Final = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """values: of the header, by key; shapes: of all tensors, rows first; vector: reads one; asked:
    which keys of the architecture's were looked for.
    """

    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    vector: Callable[[str], Sequence[float]]
    asked: set[str] = field(default_factory=set)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        found = self.values.get(ARCHITECTURE)
        if not isinstance(found, str):
            raise CheckpointError(
                f"GGUF: {ARCHITECTURE} is {str(found)[:40]}, but must name a family. "
                "The file is damaged; download it again."
            )
        return found

    def key(self, name: str) -> str:
        """A key of the architecture's."""
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        """Whether a key of the architecture's is there."""
        self.asked.add(name)
        return self.key(name) in self.values

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number from 0; one for each layer must be the same for all."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise self._wrong(name, value, "a whole number from 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        return float(value)

    def truth(self, name: str, *, default: bool) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def flags(self, name: str) -> list[bool] | None:
        """A list of true and false; None where it is absent."""
        self.asked.add(name)
        value = self.values.get(self.key(name))
        if value is None:
            return None
        found = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(found, list) or not all(type(flag) is bool for flag in found):
            raise self._wrong(name, value, "a list of true and false")
        return found

    def text(self, name: str, default: str) -> str:
        """A word."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a word")
        return value

    def token_ids(self, *names: str) -> list[int]:
        """The ids that the tokenizer's keys name, those of them that are there."""
        found = [self.values.get(f"tokenizer.ggml.{name}_token_id") for name in names]
        return [i for i in found if type(i) is int]

    def n_layers(self) -> int:
        """Without those behind the model that guess further tokens."""
        count = self.integer("block_count") - self.integer("nextn_predict_layers", 0)
        if f"blk.{count - 1}.attn_norm.weight" not in self.shapes:
            raise CheckpointError(
                f"GGUF: {self.key('block_count')} promises {count} layers, but the last of them "
                "has no tensor attn_norm.weight. The file is incomplete; download it again."
            )
        return count

    def n_experts(self) -> int:
        """Of each layer that has some."""
        count = self.integer("expert_count")
        if not 1 <= count <= MAX_EXPERTS:
            raise CheckpointError(
                f"GGUF: {self.key('expert_count')} is {count}, but must be from 1 to "
                f"{MAX_EXPERTS}. The file is damaged; download it again."
            )
        return count

    def columns(self, name: str) -> int:
        """How many columns the tensors of a name have, in whichever layer there is one."""
        for tensor, shape in self.shapes.items():
            if tensor.endswith(f".{name}.weight"):
                return shape[-1]
        raise CheckpointError(
            f"GGUF: no layer has a tensor {name}.weight, which a {self.architecture} needs. "
            "The file is incomplete; download it again."
        )

    def require_neutral(self, neutral: Mapping[str, Sequence[float]]) -> None:
        """Refuse keys that change what a model computes and that nobody looked for.

        neutral: the values of each that change nothing.
        """
        for name in neutral.keys() - self.asked:
            found = self.values.get(self.key(name), _NOTHING)
            if found is _NOTHING or (isinstance(found, int | float) and found in neutral[name]):
                continue
            raise UnsupportedModelError(
                f"GGUF: {self.key(name)} is {str(found)[:40]}, which is not implemented for a "
                f"{self.architecture}. This model cannot run here yet."
            )

    def _value(self, name: str, default: object) -> object:
        self.asked.add(name)
        value = self.values.get(self.key(name), _NOTHING)
        if value is _NOTHING:
            if default is None:
                raise CheckpointError(
                    f"GGUF: {self.key(name)} is missing. The file is incomplete; download it again."
                )
            return default
        if hasattr(value, "tolist") and len(value):  # an array, with a value for each layer
            if (value != value[0]).any():
                raise UnsupportedModelError(
                    f"GGUF: {self.key(name)} differs from layer to layer, but only layers that are "
                    "alike are implemented. This model cannot run here yet."
                )
            return value[0].item()
        return value

    def _wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"GGUF: {self.key(name)} is {str(value)[:80]!r}, but must be {wanted}. "
            "The file is damaged; download it again."
        )

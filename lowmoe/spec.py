"""What a model is, in kinds and numbers, with no family's name and no tensor in it.

Letters in shape comments, everywhere in this house:

    T tokens        S tokens in the cache    V vocabulary    L layers
    H hidden        I inner, of one expert   E experts       K experts of a token
    A heads         B key-value heads        D head size     G groups per row

Knows:        the kinds of attention, router and feed-forward, and every shape that follows.
Ignorant of:  files, devices, how anything is computed.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowmoe.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions over the whole head, halves rotated against each other."""

    theta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQueryAttention:
    """n_heads query heads in groups that share n_kv_heads key-value heads.

    window: how many of the latest tokens, itself included, a token sees; None for all.
    """

    n_heads: int
    n_kv_heads: int
    head_size: int
    rope: Rope
    window: int | None

    @property
    def q_size(self) -> int:
        return self.n_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.n_kv_heads * self.head_size


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxRouter:
    """Softmax over all experts, of which the n_active likeliest are used.

    renormalize: whether their weights are made to add up to 1.
    """

    n_active: int
    renormalize: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsFeedForward:
    """n_experts SwiGLU experts of n_inner channels, of which a router picks some for each token."""

    n_experts: int
    n_inner: int
    router: SoftmaxRouter


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer: x += attention(norm(x)); x += feed_forward(norm(x))."""

    attention: GroupedQueryAttention
    feed_forward: ExpertsFeedForward


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole model, unrolled layer by layer."""

    model_type: str
    n_vocab: int
    n_hidden: int
    context_length: int
    norm_epsilon: float
    tied_head: bool
    layers: tuple[LayerSpec, ...]
    end_ids: tuple[int, ...]

    @property
    def n_experts_total(self) -> int:
        return sum(layer.feed_forward.n_experts for layer in self.layers)

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in checkpoint_tensors(self))

    @property
    def n_active_parameters(self) -> int:
        """Parameters one token meets: everything but the experts it is not routed to."""
        idle = sum(
            (f.n_experts - f.router.n_active) * 3 * f.n_inner * self.n_hidden
            for f in (layer.feed_forward for layer in self.layers)
        )
        return self.n_parameters - idle

    def uniform_experts(self) -> ExpertsFeedForward:
        """The feed-forward all layers share; slots of the store have one size."""
        kinds = {(f.n_inner, f.router) for f in (layer.feed_forward for layer in self.layers)}
        assert len(kinds) == 1, "layers with experts of different sizes"
        return self.layers[0].feed_forward


@dataclass(frozen=True, slots=True)
class Role:
    """What a checkpoint's tensor is for; a family's table gives its name there."""

    name: str
    layer_id: int | None = None
    expert_id: int | None = None


def checkpoint_tensors(spec: ModelSpec) -> Iterator[tuple[Role, tuple[int, ...]]]:
    """Every tensor a checkpoint of this model must have, with its shape [rows out, columns in]."""
    yield Role("embedding"), (spec.n_vocab, spec.n_hidden)
    for layer_id, layer in enumerate(spec.layers):
        yield from _layer_tensors(layer_id, layer, spec.n_hidden)
    yield Role("final_norm"), (spec.n_hidden,)
    if not spec.tied_head:
        yield Role("head"), (spec.n_vocab, spec.n_hidden)


def _layer_tensors(
    layer_id: int, layer: LayerSpec, n_hidden: int
) -> Iterator[tuple[Role, tuple[int, ...]]]:
    attention, experts = layer.attention, layer.feed_forward
    yield Role("attention_norm", layer_id), (n_hidden,)
    yield Role("q", layer_id), (attention.q_size, n_hidden)
    yield Role("k", layer_id), (attention.kv_size, n_hidden)
    yield Role("v", layer_id), (attention.kv_size, n_hidden)
    yield Role("attention_out", layer_id), (n_hidden, attention.q_size)
    yield Role("experts_norm", layer_id), (n_hidden,)
    yield Role("router", layer_id), (experts.n_experts, n_hidden)
    for expert_id in range(experts.n_experts):
        yield Role("gate", layer_id, expert_id), (experts.n_inner, n_hidden)
        yield Role("up", layer_id, expert_id), (experts.n_inner, n_hidden)
        yield Role("down", layer_id, expert_id), (n_hidden, experts.n_inner)


class HfConfig:
    """Strict reader of a Hugging Face config.json: every key has a type, a range or a refusal."""

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

    def optional_integer(self, key: str) -> int | None:
        """A whole number from 1, or None where the key is absent or null."""
        return None if self.values.get(key) is None else self.integer(key)

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

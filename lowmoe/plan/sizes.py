"""How many bytes a model takes, from its shape and the recipe alone.

Knows:        which bytes every token reads, which only those of an expert that is used.
Ignorant of:  machines, where bytes lie, how fast anything is.
"""

import math
from dataclasses import dataclass

from lowmoe.checkpoint.files import ALIGNMENT
from lowmoe.checkpoint.layout import Recipe, dense_tensors
from lowmoe.decoder.abilities import lacking
from lowmoe.decoder.native import ABLE
from lowmoe.decoder.state_cache import state_bytes, states_bytes
from lowmoe.kernels import cpu
from lowmoe.spec import GatedDeltaNet, LightningAttention, ModelSpec
from quant.layout import round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """One model at one number of planes.

    n_active: experts a token uses, of all layers; most_experts: of any layer; dense_bytes:
    everything but experts; dense_bytes_per_token: of it, what every token reads; expert_bytes: one
    expert, on disk as in RAM; kv_bytes_per_token: of one position in all layers; state_bytes: of
    those layers that keep states, which every token reads and writes; states_bytes: the most that a
    conversation keeps of them; active_weights: numbers that one token is multiplied by; n_vocab:
    scores of a token; is_native: whether the CPU's kernels compute it.
    """

    n_planes: int
    n_layers: int
    n_experts: int
    n_active: int
    most_experts: int
    dense_bytes: int
    dense_bytes_per_token: int
    expert_bytes: int
    kv_bytes_per_token: int
    state_bytes: int
    states_bytes: int
    active_weights: int
    n_vocab: int
    is_native: bool

    @property
    def disk_bytes(self) -> int:
        """The spans of the folder; its headers and small files are a few MB on top."""
        return self.dense_bytes + self.n_experts * self.expert_bytes

    @property
    def experts_bytes(self) -> int:
        """All experts."""
        return self.n_experts * self.expert_bytes

    @property
    def active_expert_bytes(self) -> int:
        """Of the experts that one token uses."""
        return self.n_active * self.expert_bytes

    @property
    def bytes_per_token(self) -> int:
        """What a token reads, but for the cache."""
        return self.dense_bytes_per_token + self.active_expert_bytes


def model_sizes(
    spec: ModelSpec, recipe: Recipe, kv: cpu.KvFormat, *, n_planes: int | None = None
) -> ModelSizes:
    """Of the folder that a recipe makes.  n_planes: of experts, fewer than are in it."""
    dense = embedding = 0
    for name, dtype, shape in dense_tensors(spec, recipe):
        n_bytes = math.prod(shape) * dtype.itemsize
        dense += n_bytes
        if name.split(".")[0] == "embedding" and not spec.tied_head:
            embedding += n_bytes  # a token reads one row of it
    parts = recipe.expert_format(spec, n_planes=n_planes).part_bytes
    feed_forwards = [layer.feed_forward for layer in spec.layers]
    return ModelSizes(
        n_planes=len(parts),
        n_layers=len(spec.layers),
        n_experts=spec.n_experts_total,
        n_active=sum(f.router.n_active for f in feed_forwards if f.n_experts),
        most_experts=max(spec.n_experts_by_layer),
        dense_bytes=dense,
        dense_bytes_per_token=dense - embedding,
        expert_bytes=sum(round_up(part, ALIGNMENT) for part in parts),
        kv_bytes_per_token=sum(_kv_bytes(spec, i, kv) for i in range(len(spec.layers))),
        state_bytes=state_bytes(spec),
        states_bytes=states_bytes(spec),
        active_weights=spec.n_active_parameters - (0 if spec.tied_head else _embedding(spec)),
        n_vocab=spec.n_vocab,
        is_native=not lacking(spec, ABLE),
    )


def _kv_bytes(spec: ModelSpec, layer_id: int, kv: cpu.KvFormat) -> int:
    """Of one position in one layer."""
    attention = spec.layers[layer_id].attention
    if isinstance(attention, GatedDeltaNet | LightningAttention):
        return 0
    return sum(n_heads * cpu.kv_head_bytes(kv, size) for n_heads, size in attention.kept_shapes)


def _embedding(spec: ModelSpec) -> int:
    return spec.n_vocab * spec.n_hidden

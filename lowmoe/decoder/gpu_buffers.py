"""What operations on a GPU write into: made once for the longest pass, cut for shorter ones.

Knows:        shapes and dtypes of what goes from operation to operation.
Ignorant of:  what they compute, in which order.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from cuda_ext.launches import attention, products, routing, vectors
from cuda_ext.ops import MOST_DECODED
from lowmoe.decoder import prompt_attention
from lowmoe.decoder.abilities import lacking
from lowmoe.kernels.gpu import Gpu, GpuSizes
from lowmoe.spec import (
    ExpertsFeedForward,
    LayerSpec,
    ModelSpec,
    SigmoidRouter,
    SoftmaxRouter,
    grouped,
)
from quant.activations import SCALE_COLUMNS
from quant.layout import BLOCK_COLUMNS, round_up

# What operations compute beyond a plain decoder, see lowmoe/decoder/abilities.py.
ABLE = frozenset(
    {
        "a bias behind attention",
        "another activation",
        "another scale of scores",
        "attention sinks",
        "biases of experts",
        "biases of queries, keys and values",
        "biases of routers",
        "biases of the choice",
        "clamped queries, keys and values",
        "experts without a choice",
        "layers without experts",
        "norms after rope",
        "norms of all heads together",
        "norms of single heads",
        "norms without weights",
        "rope of a part of a head",
        "rope that lengthens",
        "routers by sigmoid",
        "scaled embeddings",
        "scaled layers",
        "scaled logits",
        "shared experts",
    }
)
SCORES_TOKENS = 128  # of which scores are kept at once: a vocabulary is wide
_NOWHERE = torch.device("meta")  # where tensors have sizes and take no memory
_OF_PLACES = ("order", "inner_codes", "inner_scales")
_OF_ALL = ("first", "active", "workspace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """For a pass of n_tokens; what they hold, cuda_ext/ops.py says.

    x, normed: [T, H]; qkv: [T, heads of q, k and v]; attended: [T, q size]; *_codes, *_scales:
    rounded tokens; weights, experts: [T, K]; order, inner_*: of T * K places; first, active:
    [E + 1]; shared_in_*: [T, H], gate_up, shared_*: of the widest shared expert; scores: [T, V], of
    SCORES_TOKENS at most.
    """

    n_tokens: int
    ids: Tensor
    positions: Tensor
    sequences: Tensor
    x: Tensor
    normed: Tensor
    normed_codes: Tensor
    normed_scales: Tensor
    qkv: Tensor
    attended: Tensor
    attended_codes: Tensor
    attended_scales: Tensor
    weights: Tensor
    experts: Tensor
    order: Tensor
    inner_codes: Tensor
    inner_scales: Tensor
    first: Tensor
    active: Tensor
    shared_in_codes: Tensor
    shared_in_scales: Tensor
    gate_up: Tensor
    shared_codes: Tensor
    shared_scales: Tensor
    scores: Tensor
    workspace: Tensor

    def shared(self, n_inner: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate_up, shared_codes and shared_scales of a shared expert of n_inner channels."""
        widths = (2 * n_inner, round_up(n_inner, BLOCK_COLUMNS), -(-n_inner // SCALE_COLUMNS))
        gate_up, codes, scales = (
            tensor.flatten()[: self.n_tokens * width].view(self.n_tokens, width)
            for tensor, width in zip(
                (self.gate_up, self.shared_codes, self.shared_scales), widths, strict=True
            )
        )
        return gate_up, codes, scales

    @staticmethod
    def make(spec: ModelSpec, gpu: Gpu, n_tokens: int) -> "Buffers":
        """For passes of up to n_tokens through layers that all have the sizes of the first."""
        return _make(spec, gpu.n_multiprocessors, n_tokens, gpu.place)

    @staticmethod
    def working_bytes(spec: ModelSpec, gpu: GpuSizes, n_tokens: int, n_context: int) -> int:
        """All of it, what comes out of a pass, and what torch takes for a prompt's attention."""
        b = _make(spec, gpu.n_multiprocessors, n_tokens, _NOWHERE)
        kept = sum(tensor.nbytes for tensor in b._tensors().values()) + b.x.nbytes
        if n_tokens <= MOST_DECODED:
            return kept
        of = grouped(spec.layers[0].attention)
        return kept + prompt_attention.working_bytes(n_tokens, n_context, of)

    def of(self, n_tokens: int) -> "Buffers":
        """The same memory for fewer tokens."""
        n_places = n_tokens * self.weights.shape[1]
        few = {
            name: tensor[: n_places if name in _OF_PLACES else n_tokens]
            for name, tensor in self._tensors().items()
            if name not in _OF_ALL
        }
        return replace(self, n_tokens=n_tokens, **few)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "n_tokens"}


def why_not_shape(spec: ModelSpec) -> str | None:
    """What kernels cannot do of a model's kinds and shape; None if they can do all of it."""
    if lacks := lacking(spec, ABLE):
        return f"GPU kernels have no {', '.join(lacks)} yet"
    heads, experts = grouped(spec.layers[0].attention), spec.uniform_experts()
    turning = {grouped(layer.attention).rope for layer in spec.layers}
    rope_sizes = {rope.size or heads.head_size for rope in turning if rope is not None}
    size, group = heads.head_size, heads.n_heads // heads.n_kv_heads
    most_group = attention.MOST_TILES * attention.TILE_QUERIES
    most_hidden = vectors.MOST_WARPS * vectors.GROUPS_OF_WARP * vectors.GROUP_COLUMNS
    limits = [
        (size % 8 == 0 and size <= attention.MOST_HEAD, f"heads of {size} channels"),
        (
            all(n % attention.ROPE_MULTIPLE == 0 for n in rope_sizes),
            f"heads of which {min(rope_sizes, default=0)} channels turn",
        ),
        (group <= most_group, f"{group} query heads to a key-value head"),
        (spec.n_hidden <= most_hidden, f"{spec.n_hidden} hidden channels"),
        (experts.n_experts <= routing.MOST_EXPERTS, f"{experts.n_experts} experts in a layer"),
        (experts.router.n_active <= routing.MOST_ACTIVE, f"{experts.router.n_active} of a token"),
        (_n_groups(experts) <= routing.MOST_GROUPS, f"{_n_groups(experts)} groups of experts"),
    ]
    beyond = [what for can, what in limits if not can]
    return f"GPU kernels cannot do {', '.join(beyond)}" if beyond else None


def can_prefer(layer: LayerSpec) -> bool:
    """Whether kernels choose a layer's experts anew where those that are there are preferred."""
    router = layer.feed_forward.router
    if layer.feed_forward.n_experts == 0:
        return True  # and none is chosen
    return isinstance(router, SoftmaxRouter) and not router.bias and not router.choice_bias


def _n_groups(experts: ExpertsFeedForward) -> int:
    return experts.router.n_groups if isinstance(experts.router, SigmoidRouter) else 1


def _make(spec: ModelSpec, n_multiprocessors: int, n_tokens: int, place: torch.device) -> Buffers:
    of_heads, experts = grouped(spec.layers[0].attention), spec.uniform_experts()
    n_places = n_tokens * experts.router.n_active
    shared = [layer.feed_forward.shared for layer in spec.layers]
    n_shared = max((s.n_inner for s in shared if s is not None), default=0)

    def floats(*shape: int) -> Tensor:
        return torch.zeros(shape, device=place)

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=place)

    def codes(n_rows: int, n_columns: int) -> Tensor:
        n_columns = round_up(n_columns, BLOCK_COLUMNS)
        return torch.zeros(n_rows, n_columns, dtype=torch.int8, device=place)

    def scales(n_rows: int, n_columns: int) -> Tensor:
        return floats(n_rows, -(-n_columns // SCALE_COLUMNS))

    sizes = (experts.n_inner, experts.router.n_active)
    n_bytes = max(
        products.workspace_bytes(n_multiprocessors, n_tokens, spec.n_hidden, *sizes),
        routing.workspace_bytes(n_tokens, experts.n_experts),
        attention.workspace_bytes(
            n_multiprocessors,
            min(n_tokens, MOST_DECODED),
            of_heads.n_heads,
            of_heads.n_kv_heads,
            of_heads.head_size,
        ),
    )
    return Buffers(
        n_tokens=n_tokens,
        ids=integers(n_tokens),
        positions=integers(n_tokens),
        sequences=integers(n_tokens),
        x=floats(n_tokens, spec.n_hidden),
        normed=floats(n_tokens, spec.n_hidden),
        normed_codes=codes(n_tokens, spec.n_hidden),
        normed_scales=scales(n_tokens, spec.n_hidden),
        qkv=floats(n_tokens, of_heads.q_size + 2 * of_heads.kv_size),
        attended=floats(n_tokens, of_heads.q_size),
        attended_codes=codes(n_tokens, of_heads.q_size),
        attended_scales=scales(n_tokens, of_heads.q_size),
        weights=floats(n_tokens, experts.router.n_active),
        experts=integers(n_tokens, experts.router.n_active),
        order=integers(n_places),
        inner_codes=codes(n_places, experts.n_inner),
        inner_scales=scales(n_places, experts.n_inner),
        first=integers(experts.n_experts + 1),
        active=integers(experts.n_experts + 1),
        shared_in_codes=codes(n_tokens, spec.n_hidden if n_shared else 0),
        shared_in_scales=scales(n_tokens, spec.n_hidden if n_shared else 0),
        gate_up=floats(n_tokens, 2 * n_shared),
        shared_codes=codes(n_tokens, n_shared),
        shared_scales=scales(n_tokens, n_shared),
        scores=floats(min(n_tokens, SCORES_TOKENS), spec.n_vocab),
        workspace=torch.zeros(n_bytes, dtype=torch.uint8, device=place),
    )

"""Tiny models of random trellis planes, to be computed natively and in torch.

Knows:        how both computations are put over the same weights.
Ignorant of:  what is compared.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import with_router
from torch import Tensor
from trellis_shapes import CONTEXT, MIXTRAL, Shape

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import Recipe
from lowmoe.decoder.computation import Cache, Computation
from lowmoe.decoder.computation import layer_by_layer as pass_by_layers
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.in_torch import TorchComputation
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.native import NativeComputation
from lowmoe.decoder.weights import DenseWeights, LayerWeights, from_folder
from lowmoe.experts.source import FolderExperts
from lowmoe.experts.store import ExpertStore
from lowmoe.families import read_config
from lowmoe.kernels import cpu
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.loader.synthetic import write_synthetic
from lowmoe.spec import ModelSpec
from quant.matrix import TrellisMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class TrellisModel:
    """A folder, its dense weights in RAM, and what is to be computed with them."""

    folder: ModelFolder
    spec: ModelSpec
    weights: DenseWeights

    @property
    def recipe(self) -> Recipe:
        return self.folder.recipe

    def in_torch(self) -> TorchComputation:
        return TorchComputation(
            spec=self.spec,
            weights=self.weights,
            format=self.recipe.expert_format(self.spec),
            kernels=ReferenceKernels(),
            dtype=torch.float32,
            max_tokens=256,
            n_context=CONTEXT,
        )

    def native(
        self,
        *,
        isa: str | None = None,
        n_threads: int = 1,
        kv: cpu.KvFormat = "float16",
        max_tokens: int = 256,
        spec: ModelSpec | None = None,
        n_sequences: int = 1,
    ) -> NativeComputation:
        """isa: None for the best; spec: computes as if the folder had said this."""
        return NativeComputation(
            spec or self.spec,
            self.weights,
            self.recipe.code,
            cpu.Pool(n_threads, []),
            isa=cpu.isas()[0] if isa is None else isa,
            kv=kv,
            max_tokens=max_tokens,
            n_context=CONTEXT,
            n_sequences=n_sequences,
        )

    @contextmanager
    def decoder(self, computation: Computation, *, n_slots: int = 1000) -> Iterator[Decoder]:
        """With RAM for n_slots experts."""
        format = self.recipe.expert_format(self.spec)
        source = FolderExperts(self.folder, self.recipe.part_names, format.part_bytes)
        budget, total = n_slots * sum(source.buffer_bytes), self.spec.n_experts_total
        with ExpertStore(source, ram_budget_bytes=budget, n_experts_total=total) as store:
            yield Decoder(spec=self.spec, store=store, computation=computation)


@contextmanager
def trellis_model(folder: Path, shape: Shape) -> Iterator[TrellisModel]:
    """Write a model of this shape, or open it where it was written before."""
    config = MIXTRAL | shape.config
    family = read_config(config)
    write_synthetic(
        folder, config, family, shape.recipe, name="tiny", progress=lambda done, total: None
    )
    spec = family.spec
    if shape.renormalize is not None:
        spec = with_router(spec, renormalize=shape.renormalize)
    with ModelFolder(folder) as opened:
        weights = from_folder(opened, spec)
        enliven(weights)
        yield TrellisModel(folder=opened, spec=spec, weights=weights)


def enliven(weights: DenseWeights) -> None:
    """Vectors that show when they are left out or swapped: synthetic ones are all ones."""
    generator = torch.Generator().manual_seed(3)

    def transform(d: Tensor) -> None:
        loudness = torch.empty(d.shape).uniform_(0.7, 1.4, generator=generator)
        d.copy_(torch.where(torch.rand(d.shape, generator=generator) < 0.5, -loudness, loudness))

    def norm(weight: Tensor) -> None:
        weight.uniform_(0.5, 1.5, generator=generator)

    norm(weights.final_norm)
    for bias in (weights.final_norm_bias, weights.head_bias):
        if bias is not None:
            bias.uniform_(-0.2, 0.2, generator=generator)
    if weights.positions is not None:
        weights.positions.normal_(0, 0.15, generator=generator)  # beside embeddings of 1 / 8
    for matrix in {id(m): m for m in (weights.embedding, weights.head)}.values():
        assert isinstance(matrix, TrellisMatrix)
        transform(matrix.d)
    for layer in weights.layers:
        _enliven_layer(layer, transform, norm, generator)


def _enliven_layer(
    layer: LayerWeights,
    transform: Callable[[Tensor], None],
    norm: Callable[[Tensor], None],
    generator: torch.Generator,
) -> None:
    vectors = {name: part for name, part in layer.parts.items() if isinstance(part, Tensor)}
    for name in sorted(vectors):
        if name.endswith("norm"):
            norm(vectors[name])
        if name in ("q_norm", "k_norm"):
            vectors[name].mul_(1.5)  # scores that choose, so that they are seen in what comes out
    for name in sorted(layer.parts.keys() - vectors.keys(), reverse=True):
        matrix = layer.parts[name]
        assert isinstance(matrix, TrellisMatrix)
        transform(matrix.d)
    if layer.transforms.d_in.stride(0):  # not ones that stand for all, of a layer without experts
        transform(layer.transforms.d_in)
        transform(layer.transforms.d_inner)
    for name in sorted(vectors):
        if name.endswith("router"):
            # Scores of deviation 2: routers that choose, but not one expert alone.
            vectors[name].mul_(2 * vectors[name].shape[1] ** -0.5)
        elif name in ("delta_taps", "delta_log_decay", "delta_decay_bias"):
            vectors[name].uniform_(-2, 2, generator=generator)  # heads that keep little, and much
        elif name == "sinks":
            vectors[name].uniform_(1, 3, generator=generator)  # beside scores of about 0
        elif not name.endswith("norm"):
            vectors[name].uniform_(-0.2, 0.2, generator=generator)


@dataclass(frozen=True, slots=True)
class Answer:
    """Logits [T, V] of a text, and where each layer sent its tokens, [T, K] each."""

    logits: Tensor
    routings: list[Routing]


class Recording:
    """A computation that remembers its routings."""

    def __init__(self, computation: Any, n_layers: int) -> None:
        self._computation = computation
        self.passes: list[list[Routing]] = [[] for _ in range(n_layers)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._computation, name)

    def run_layers(self, x: Tensor, cache: Cache, store: ExpertStore) -> Tensor:
        return pass_by_layers(self, len(self.passes), x, cache, store)

    def route(self, x: Tensor, layer_id: int) -> Routing:
        routing = self._computation.route(x, layer_id)
        self.passes[layer_id].append(routing)
        return routing

    def routings(self) -> list[Routing]:
        return [
            Routing(torch.cat([r.weights for r in of]), torch.cat([r.expert_ids for r in of]))
            for of in self.passes
        ]


class Guided:
    """A computation whose tokens go to the experts that another one chose for them.

    Where two experts score almost alike, rounding decides which is taken, and the answers differ
    without either being wrong. Weights are its own wherever it would have chosen the same.

    agreed: of each token of each layer, whether it would have.
    """

    def __init__(self, computation: Any, routings: list[Routing]) -> None:
        self._computation, self._routings = computation, routings
        self._first = 0
        self.agreed: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._computation, name)

    def run_layers(self, x: Tensor, cache: Cache, store: ExpertStore) -> Tensor:
        return pass_by_layers(self, len(self._routings), x, cache, store)

    def attend(self, x: Tensor, layer_id: int, cache: Cache) -> Tensor:
        self._first = cache.n_tokens
        return self._computation.attend(x, layer_id, cache)

    def route(self, x: Tensor, layer_id: int) -> Routing:
        own, at = self._computation.route(x, layer_id), self._routings[layer_id]
        these = slice(self._first, self._first + x.shape[0])
        wanted, weights = at.expert_ids[these], at.weights[these]
        same = (own.expert_ids == wanted).all(1)
        self.agreed += (own.expert_ids.sort(1).values == wanted.sort(1).values).all(1).tolist()
        return Routing(
            torch.where(same[:, None], own.weights, weights).contiguous(), wanted.contiguous()
        )


def layer_by_layer(spec: ModelSpec, layer_id: int, **changes: Any) -> ModelSpec:
    """The same model with another attention in one layer."""
    layers = list(spec.layers)
    layer = layers[layer_id]
    layers[layer_id] = replace(layer, attention=replace(layer.attention, **changes))
    return replace(spec, layers=tuple(layers))


def fill(store: ExpertStore, spec: ModelSpec) -> None:
    """Have every expert read."""
    for layer_id, layer in enumerate(spec.layers):
        store.want(layer_id, range(layer.feed_forward.n_experts))
        for group in store.portions():
            with store.borrow(layer_id, group):
                pass

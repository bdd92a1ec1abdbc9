"""Tiny models of random trellis planes, to be computed natively and in torch.

Knows:        shapes worth a test, how both computations are put over the same weights.
Ignorant of:  what is compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import with_router
from torch import Tensor

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import Recipe
from lowmoe.decoder.computation import Cache, Computation
from lowmoe.decoder.computation import layer_by_layer as pass_by_layers
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.in_torch import TorchComputation
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.native import NativeComputation
from lowmoe.decoder.weights import DenseWeights, from_folder
from lowmoe.experts.source import FolderExperts
from lowmoe.experts.store import ExpertStore
from lowmoe.families import read_config
from lowmoe.kernels import cpu
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.loader.synthetic import write_synthetic
from lowmoe.spec import ModelSpec
from quant.matrix import TrellisMatrix

LAYERS = 3
CONTEXT = 4096
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 1e4,
    # Large enough to show: embeddings begin with a mean square of 1 / hidden_size.
    "rms_norm_eps": 1e-3,
}


TWO_PLANES = Recipe()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What sets a model apart.  config: keys beside or instead of those in MIXTRAL."""

    config: dict[str, Any]
    recipe: Recipe = TWO_PLANES
    renormalize: bool = True


def planes(count: int) -> Recipe:
    return Recipe(expert_planes=count)


SHAPES = {
    "4 heads of 16 over 2": Shape(config={}),
    "hidden 48, inner 40": Shape(
        config={"hidden_size": 48, "intermediate_size": 40, "head_dim": 16}, recipe=planes(3)
    ),
    "2 heads of 128 over 1": Shape(
        config={"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
        recipe=planes(1),
    ),
    "3 heads of 64 of their own, hidden 192, inner 200": Shape(
        config={
            "hidden_size": 192,
            "intermediate_size": 200,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 64,
        }
    ),
    "8 heads of 32 over 1, hidden 256, inner 384": Shape(
        config={
            "vocab_size": 300,
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
        },
        recipe=planes(3),
    ),
    "5 heads of 10, odd sizes": Shape(
        config={
            "hidden_size": 50,
            "intermediate_size": 33,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
        }
    ),
    "window of 7": Shape(config={"sliding_window": 7}, recipe=planes(3)),
    "top 1": Shape(config={"num_experts_per_tok": 1}, recipe=planes(1)),
    "top 4 of 8": Shape(config={"num_experts_per_tok": 4, "num_local_experts": 8}),
    "top 3 of 9, not renormalized": Shape(
        config={"num_experts_per_tok": 3, "num_local_experts": 9}, renormalize=False
    ),
    "tied head, 2 dense planes": Shape(
        config={"tie_word_embeddings": True}, recipe=Recipe(dense_planes=2, expert_planes=1)
    ),
}


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
    spec = with_router(family.spec, renormalize=shape.renormalize)
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
    for matrix in {id(m): m for m in (weights.embedding, weights.head)}.values():
        assert isinstance(matrix, TrellisMatrix)
        transform(matrix.d)
    for layer in weights.layers:
        assert isinstance(layer.qkv, TrellisMatrix)
        assert isinstance(layer.attention_out, TrellisMatrix)
        norm(layer.attention_norm)
        norm(layer.experts_norm)
        for d in (layer.qkv.d, layer.attention_out.d):
            transform(d)
        transform(layer.transforms.d_in)
        transform(layer.transforms.d_inner)
        # Scores of deviation 2: routers that choose, but not one expert alone.
        layer.router.mul_(2 * layer.router.shape[1] ** -0.5)


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

"""Tiny random checkpoints that transformers itself saves, and decoders over them."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.in_torch import TorchComputation
from lowmoe.decoder.weights import CheckpointTensors, from_checkpoint
from lowmoe.experts.source import CheckpointExperts
from lowmoe.experts.store import ExpertStore
from lowmoe.families import Family, read_config
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.spec import ModelSpec

VOCABULARY = 97
LAYERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """What sets a checkpoint apart.

    config: keys of config.json, beside or instead of those in MIXTRAL; old_spelling: as
    transformers 4 wrote that file.
    """

    config: dict[str, Any]
    saved_dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"
    old_spelling: bool = False

    def save(self, folder: Path) -> None:
        """Make the checkpoint."""
        torch.manual_seed(7)
        model: Any = MixtralForCausalLM(MixtralConfig(**(MIXTRAL | self.config)))
        _weigh_norms(model)
        model.to(self.saved_dtype).save_pretrained(folder, max_shard_size=self.shard_size)
        if self.old_spelling:
            _spell_as_before(folder / "config.json")


MIXTRAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    # Large enough for logits that differ and routers that choose, small enough that a rounding at
    # the first layer is not ten roundings at the last.
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


@torch.no_grad()
def _weigh_norms(model: torch.nn.Module) -> None:
    """Norms with weights that show when they are left out; transformers begins with ones."""
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.uniform_(0.5, 1.5)


def _spell_as_before(path: Path) -> None:
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.36.0"
    path.write_text(json.dumps(config))


# Of each family, what its checkpoints can differ in.
GOLDENS: dict[str, dict[str, TinyModel]] = {
    "mixtral": {
        "4 experts, top 2": TinyModel(config={}),
        "4 experts, top 1": TinyModel(config={"num_experts_per_tok": 1}),
        "4 experts, top 3": TinyModel(config={"num_experts_per_tok": 3}),
        "8 experts, top 2": TinyModel(config={"num_local_experts": 8}),
        "8 experts, top 3, fp16, shards": TinyModel(
            config={"num_local_experts": 8, "num_experts_per_tok": 3},
            saved_dtype=torch.float16,
            shard_size="20KB",
        ),
        "tied head": TinyModel(config={"tie_word_embeddings": True}),
        "tied head, bf16, shards": TinyModel(
            config={"tie_word_embeddings": True}, saved_dtype=torch.bfloat16, shard_size="30KB"
        ),
        "3 heads of 10 over 1": TinyModel(
            config={"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}
        ),
        "6 heads over 3": TinyModel(config={"num_attention_heads": 6, "num_key_value_heads": 3}),
        "5 heads of their own, odd sizes": TinyModel(
            config={
                "hidden_size": 50,
                "intermediate_size": 33,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
            }
        ),
        "sliding window": TinyModel(config={"sliding_window": 7}),
        "old spelling, bf16": TinyModel(
            config={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            saved_dtype=torch.bfloat16,
            old_spelling=True,
        ),
        "old spelling, window, shards": TinyModel(
            config={"sliding_window": 16}, shard_size="50KB", old_spelling=True
        ),
    },
}


def reference(folder: Path) -> Any:
    """The same checkpoint in transformers, computing in float32, experts in the plainest way."""
    return MixtralForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )


@torch.no_grad()
def reference_logits(model: Any, ids: Tensor) -> Tensor:
    """[T, V], all tokens at once and without a cache."""
    logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


@contextlib.contextmanager
def decoder_over(
    folder: Path, *, n_slots: int = 1000, spec: ModelSpec | None = None
) -> Iterator[Decoder]:
    """A float32 decoder over a checkpoint, with RAM for n_slots experts.

    spec: computes as if the config had said this; the shapes must be the same.
    """
    checkpoint = Checkpoint(folder)
    family = read_config(checkpoint.config)
    source = CheckpointExperts(checkpoint, family, torch.float32)
    weights = from_checkpoint(CheckpointTensors(checkpoint, family), torch.float32)
    budget = n_slots * sum(source.buffer_bytes)
    total = family.spec.n_experts_total
    with ExpertStore(source, ram_budget_bytes=budget, n_experts_total=total) as store:
        computation = TorchComputation(
            spec=spec or family.spec,
            weights=weights,
            format=source.format,
            kernels=ReferenceKernels(),
            dtype=torch.float32,
            max_tokens=512,
            n_context=family.spec.context_length,
        )
        yield Decoder(spec=computation.spec, store=store, computation=computation)


def spec_of(folder: Path) -> ModelSpec:
    """What the config says."""
    family: Family = read_config(Checkpoint(folder).config)
    return family.spec


def with_attention(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """The same model with another attention in all layers."""
    layers = (replace(x, attention=replace(x.attention, **changes)) for x in spec.layers)
    return replace(spec, layers=tuple(layers))


def with_router(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """The same model with another router in all layers."""

    def changed(experts: Any) -> Any:
        return replace(experts, router=replace(experts.router, **changes))

    layers = (replace(x, feed_forward=changed(x.feed_forward)) for x in spec.layers)
    return replace(spec, layers=tuple(layers))


def in_chunks(decoder: Decoder, ids: Tensor, sizes: list[int]) -> Tensor:
    """The logits of all tokens, computed so many at a time; the last size is repeated."""
    cache = decoder.new_cache(ids.shape[0])
    logits: list[Tensor] = []
    while cache.n_tokens < ids.shape[0]:
        size = sizes[min(len(logits), len(sizes) - 1)]
        chunk = ids[cache.n_tokens : cache.n_tokens + size]
        logits.append(decoder.logits(decoder.forward(chunk, cache)))
    return torch.cat(logits)

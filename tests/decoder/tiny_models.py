"""Tiny random checkpoints that transformers itself saves, and decoders over them."""

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from grok_reference import Grok
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.in_torch import TorchComputation
from lowmoe.decoder.open_checkpoint import open_checkpoint
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

    config: keys of config.json, beside or instead of those of FAMILY_CONFIGS; old_spelling: as
    transformers 4 wrote that file.
    """

    config: dict[str, Any]
    saved_dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"
    old_spelling: bool = False

    def save(self, folder: Path, family: str = "mixtral") -> None:
        """Make the checkpoint."""
        torch.manual_seed(7)
        model_type = SAME_MODEL.get(family, family)
        # transformers writes into the tables it is given.
        keys = copy.deepcopy(FAMILY_CONFIGS[family] | self.config)
        if family == GROK:
            self._save_grok(folder, keys)
            return
        config = AutoConfig.for_model(model_type, **keys)
        model: Any = AutoModelForCausalLM.from_config(config)
        _weigh_vectors(model)
        model.to(self.saved_dtype).save_pretrained(folder, max_shard_size=self.shard_size)
        if self.old_spelling:
            _spell_as_before(folder / "config.json")

    def _save_grok(self, folder: Path, keys: dict[str, Any]) -> None:
        model = Grok(keys)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=keys["initializer_range"])
        _weigh_vectors(model)
        model.to(self.saved_dtype).save(folder, self.shard_size)


GROK = "grok-1"
USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large enough for logits that differ and routers that choose, small enough that a rounding at
    # the first layer is not ten roundings at the last.
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MIXTRAL: dict[str, Any] = {**USUAL, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
DELTA = {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_value_head_dim": 12,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 32,
    "full_attention_interval": 2,
    # Where a head of eight channels reads almost nothing, its norm makes its rounding large.
    "rms_norm_eps": 1e-5,
}
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 48,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 128,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 5e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3},
    },
    "deepseek_v2": {**USUAL, **ROUTED, **LATENT, "norm_topk_prob": False, "n_shared_experts": 2},
    "deepseek_v3": {**USUAL, **ROUTED, **LATENT, "n_group": 4, "topk_group": 2},
    "dots1": {
        **USUAL,
        **ROUTED,
        "head_dim": 16,
        "sliding_window": None,
        "routed_scaling_factor": 2.5,
    },
    "ernie4_5_moe": {
        **USUAL,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 24,
    },
    "glm4_moe": {**USUAL, **ROUTED, "head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    "glm4_moe_lite": {**USUAL, **ROUTED, **LATENT},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 48,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_oss": {**USUAL, **LOCAL, "head_dim": 16, "sliding_window": 7},
    "granitemoe": {
        **USUAL,
        **LOCAL,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
        "logits_scaling": 0.7,
    },
    GROK: {
        **USUAL,
        "model_type": GROK,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        # Norms behind the experts divide the sum of their weights out again, but for this.
        "rms_norm_eps": 0.05,
        "embedding_multiplier_scale": 5.0,
        "output_multiplier_scale": 0.7,
        "attn_output_multiplier": 0.4,
        "max_attn_value": 2.0,
    },
    "hunyuan_v1_moe": {**USUAL, "num_experts": 6, "moe_topk": 2, "head_dim": 16},
    "llama": USUAL,
    "llama4": {
        **USUAL,
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 32,
        "floor_scale": 8,
        "attn_scale": 0.5,
    },
    "minimax": {
        **USUAL,
        **LOCAL,
        "head_dim": 16,
        "block_size": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_attn_alpha_factor": 1.7,
        "linear_attn_beta_factor": 0.8,
        "full_attn_alpha_factor": 1.4,
        "full_attn_beta_factor": 1.1,
        "mlp_alpha_factor": 1.9,
        "mlp_beta_factor": 0.7,
    },
    "minimax_m2": {**USUAL, **LOCAL, "head_dim": 16, "rotary_dim": 8},
    "mistral": {**USUAL, "sliding_window": None},
    "mixtral": MIXTRAL,
    "olmoe": {**USUAL, "num_experts": 6, "num_experts_per_tok": 2},
    "phimoe": {**USUAL, **LOCAL, "attention_bias": True, "lm_head_bias": True},
    "qwen2": USUAL,
    "qwen2_moe": {**USUAL, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_moe_text": {**USUAL, **EXPERTS, **DELTA},
    "qwen3_moe": {**USUAL, **EXPERTS, "head_dim": 16, "norm_topk_prob": True},
    "qwen3_next": {**USUAL, **EXPERTS, **DELTA},
}
FAMILY_CONFIGS["llama4_text"] = FAMILY_CONFIGS["llama4"]
FAMILY_CONFIGS["kimi_k2"] = FAMILY_CONFIGS["deepseek_v3"] | {"n_group": 1, "topk_group": 1}
FAMILY_CONFIGS["deepseek_v32"] = FAMILY_CONFIGS["deepseek_v3"] | {
    "index_topk": 64,
    "index_n_heads": 2,
    "index_head_dim": 12,
}
FAMILY_CONFIGS["skywork"] = MIXTRAL | {
    "num_local_experts": 6,
    "num_key_value_heads": 4,
    "moe_use_skywork_gating": False,
    "moe_2layer_gate": False,
    "moe_use_logits_norm": True,
    "moe_gate_norm_std": 1.0,
    "moe_feature_no_mul_topk": True,
}
FAMILY_CONFIGS["skywork_moe"] = FAMILY_CONFIGS["skywork"]
FAMILY_CONFIGS["minimax_m1"] = FAMILY_CONFIGS["minimax_text_01"] = FAMILY_CONFIGS["minimax"]
FAMILY_CONFIGS["qwen3_5_moe"] = FAMILY_CONFIGS["qwen3_5_moe_text"]
FAMILY_CONFIGS["qwen"] = {**USUAL, "num_key_value_heads": 4}
# What transformers calls the class that computes the same.
SAME_MODEL = {
    "kimi_k2": "deepseek_v3",
    "llama4": "llama4_text",
    "minimax_m1": "minimax",
    "minimax_text_01": "minimax",
    "qwen": "qwen2",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "skywork": "mixtral",
    "skywork_moe": "mixtral",
}


@torch.no_grad()
def _weigh_vectors(model: torch.nn.Module) -> None:
    """Norms, biases and sinks that show when they are left out; transformers begins with ones and
    zeros. And routers that choose where it begins with zeros.
    """
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            weight.uniform_(-0.15, 0.15)  # more would choose the same experts for all tokens
        elif name.endswith("A_log"):
            weight.uniform_(-4, 0.5)  # states that last for many tokens, and for few
        elif name.endswith(("bias", "sinks")):
            weight.uniform_(-0.5, 0.5)
        elif name.endswith(("weight", "scale")) and weight.dim() == 1:
            middle = float(weight.any())  # some keep their weights less 1
            weight.uniform_(middle - 0.5, middle + 0.5)
        elif weight.dim() > 1 and not weight.any():
            weight.normal_(0, 0.15)


def _spell_as_before(path: Path) -> None:
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.36.0"
    path.write_text(json.dumps(config))


def reference(folder: Path) -> Any:
    """The same checkpoint in transformers, computing in float32, experts in the plainest way; or in
    a reference of our own where that has no class for it.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == GROK:
        return Grok.load(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    if config.get("moe_use_logits_norm"):
        for layer in model.model.layers:
            layer.mlp.gate.forward = _SpreadRouter(layer.mlp.gate, config["moe_gate_norm_std"])
    return model


@dataclass(frozen=True, slots=True)
class _SpreadRouter:
    """A Mixtral's router as SkyworkAI/vllm's skywork_moe.py has it."""

    router: Any
    spread: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = F.linear(x.reshape(-1, x.shape[-1]), self.router.weight)
        deviations = scores - scores.mean(dim=1, keepdim=True)
        variance = deviations.square().sum(dim=1, keepdim=True) / (scores.shape[1] - 1)
        scores = scores * self.spread / variance.sqrt()
        best, ids = scores.topk(2, dim=1)
        return scores, torch.softmax(best, dim=1), ids


@torch.no_grad()
def reference_logits(model: Any, ids: Tensor) -> Tensor:
    """[T, V], all tokens at once and without a cache."""
    logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


@contextlib.contextmanager
def decoder_over(
    folder: Path, *, n_slots: int = 1000, spec: ModelSpec | None = None
) -> Iterator[Decoder]:
    """A float32 decoder over a checkpoint, a folder or a GGUF file, with RAM for n_slots experts.

    spec: computes as if the config had said this; the shapes must be the same.
    """
    checkpoint = open_checkpoint(folder)
    files, family = checkpoint.files, checkpoint.family
    source = CheckpointExperts(files, family, torch.float32)
    weights = from_checkpoint(CheckpointTensors(files, family), torch.float32)
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

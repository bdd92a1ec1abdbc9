"""Grok-1 in plain float32 torch, which transformers has no class for.

Written from xai-org/grok-1's model.py, one token at a time and one head at a time; tensors have the
names of its port hpcai-tech/grok-1.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn


class _Norm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.scale, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x / ((x * x).mean(-1, keepdim=True) + self.epsilon).sqrt())


def _turned(head: Tensor, position: int) -> Tensor:
    """head: [D]; its halves turn against each other."""
    half = head.shape[0] // 2
    angles = position / 10_000 ** (torch.arange(0, half).float() / half)
    first, second = head[:half], head[half:]
    return torch.cat(
        [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ]
    )


class _Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.n_heads = config["hidden_size"], config["num_attention_heads"]
        self.n_kv, self.size = config["num_key_value_heads"], hidden // self.n_heads
        self.multiplier, self.cap = config["attn_output_multiplier"], config["max_attn_value"]
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, self.n_kv * self.size, bias=False)
        self.v_proj = nn.Linear(hidden, self.n_kv * self.size, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).view(x.shape[0], -1, self.size) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        rows = []
        for t in range(x.shape[0]):
            heads = []
            for h in range(self.n_heads):
                of = h // (self.n_heads // self.n_kv)
                keys = torch.stack([_turned(k[s, of], s) for s in range(t + 1)])
                scores = keys @ _turned(q[t, h], t) * self.multiplier
                scores = self.cap * torch.tanh(scores / self.cap)
                heads.append(torch.softmax(scores, 0) @ v[: t + 1, of])
            rows.append(torch.cat(heads))
        return self.o_proj(torch.stack(rows))


class _Expert(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, inner, bias=False)
        self.linear_v = nn.Linear(hidden, inner, bias=False)
        self.linear_1 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # jax.nn.gelu's default is the approximation.
        y = self.linear(x)
        gelu = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return self.linear_1(gelu * self.linear_v(x))


class _Experts(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.n_active, n_experts = config["num_experts_per_tok"], config["num_experts"]
        sizes = config["hidden_size"], config["intermediate_size"]
        self.gate = nn.Linear(sizes[0], n_experts, bias=False)
        self.experts = nn.ModuleList(_Expert(*sizes) for _ in range(n_experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for token in x:
            chances = torch.softmax(self.gate(token), 0)
            best = sorted(range(len(self.experts)), key=lambda e: -float(chances[e]))
            rows.append(sum(chances[e] * self.experts[e](token) for e in best[: self.n_active]))
        return torch.stack(rows)


class _Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.attn, self.moe_block = _Attention(config), _Experts(config)
        for name in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            setattr(self, name, _Norm(config["hidden_size"], config["rms_norm_eps"]))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.post_attn_norm(self.attn(self.pre_attn_norm(x)))
        return x + self.post_moe_norm(self.moe_block(self.pre_moe_norm(x)))


class Grok(nn.Module):
    """Answers as far as tests ask like a model of transformers."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(
            _Layer(config) for _ in range(config["num_hidden_layers"])
        )
        self.model.norm = _Norm(config["hidden_size"], config["rms_norm_eps"])
        if not config["tie_word_embeddings"]:
            self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, ids: Tensor, use_cache: bool = False) -> Any:
        assert not use_cache
        x = self.model.embed_tokens(ids[0]) * self.config["embedding_multiplier_scale"]
        for layer in self.model.layers:
            x = layer(x)
        tied = self.config["tie_word_embeddings"]
        head = (self.model.embed_tokens if tied else self.lm_head).weight
        logits = self.model.norm(x) @ head.T * self.config["output_multiplier_scale"]
        return SimpleNamespace(logits=logits[None])

    @torch.no_grad()
    def generate(self, ids: Tensor, *, max_new_tokens: int, **rest: Any) -> Tensor:
        """The likeliest tokens."""
        assert rest["do_sample"] is False
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self(ids).logits[:, -1:].argmax(-1)], 1)
        return ids

    def save(self, folder: Path, shard_size: str) -> None:
        """As a checkpoint."""
        save_torch_state_dict(self.state_dict(), folder, max_shard_size=shard_size)
        (folder / "config.json").write_text(json.dumps(self.config))

    @classmethod
    def load(cls, folder: Path) -> "Grok":
        """What was saved, in float32."""
        model = cls(json.loads((folder / "config.json").read_text()))
        tensors: dict[str, Tensor] = {}
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return model

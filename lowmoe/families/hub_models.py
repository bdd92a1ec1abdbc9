"""Models that people run: their repositories, and what their config.json say that decides shapes.

Keys that decide nothing of a synthetic model's speed, such as long lists of rope's factors, are
left out.
"""

from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]


def _decoder(
    model_type: str, *, layers: int, hidden: int, inner: int, heads: tuple[int, int, int],
    vocab: int, context: int, theta: float, epsilon: float = 1e-5, tied: bool = False,
    **others: Any,
) -> Config:  # fmt: skip
    """heads: query heads, key-value heads, head size."""
    return {
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": context,
        "num_attention_heads": heads[0],
        "num_hidden_layers": layers,
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "rms_norm_eps": epsilon,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
        **others,
    }


def _mixtral(**keys: Any) -> Config:
    return {**_decoder("mixtral", **keys), "num_experts_per_tok": 2}


_8X7B = _mixtral(
    layers=32, hidden=4096, inner=14336, heads=(32, 8, 128), vocab=32000, context=32768, theta=1e6,
    num_local_experts=8,
)  # fmt: skip
_8X22B = _mixtral(
    layers=56, hidden=6144, inner=16384, heads=(48, 8, 128), vocab=32000, context=65536, theta=1e6,
    num_local_experts=8,
)  # fmt: skip
_APUS = _mixtral(
    layers=60, hidden=7168, inner=20480, heads=(56, 8, 128), vocab=64000, context=32768, theta=1e7,
    num_local_experts=4,
)  # fmt: skip


def _qwen3(*, experts: int = 128, expert: int, **keys: Any) -> Config:
    return _decoder(
        "qwen3_moe", vocab=151936, epsilon=1e-6, num_experts=experts, num_experts_per_tok=8,
        moe_intermediate_size=expert, norm_topk_prob=True, **keys,
    )  # fmt: skip


_QWEN3_30B = _qwen3(
    layers=48, hidden=2048, inner=6144, heads=(32, 4, 128), context=40960, theta=1e6, expert=768
)  # fmt: skip
_QWEN3_235B = _qwen3(
    layers=94, hidden=4096, inner=12288, heads=(64, 4, 128), context=40960, theta=1e6, expert=1536
)  # fmt: skip
_QWEN3_CODER = _qwen3(
    layers=62, hidden=6144, inner=8192, heads=(96, 8, 128), context=262144, theta=1e7, expert=2560,
    experts=160,
)  # fmt: skip
_QWEN_MOE = _decoder(
    "qwen2_moe", layers=24, hidden=2048, inner=5632, heads=(16, 16, 128), vocab=151936,
    context=8192, theta=1e6, epsilon=1e-6, num_experts=60, num_experts_per_tok=4,
    moe_intermediate_size=1408, shared_expert_intermediate_size=5632, norm_topk_prob=False,
)  # fmt: skip
_QWEN15_72B = _decoder(
    "qwen2", layers=80, hidden=8192, inner=24576, heads=(64, 64, 128), vocab=152064, context=32768,
    theta=1e6, epsilon=1e-6,
)  # fmt: skip
_QWEN2_72B = _decoder(
    "qwen2", layers=80, hidden=8192, inner=29568, heads=(64, 8, 128), vocab=152064, context=131072,
    theta=1e6,
)  # fmt: skip
_QWEN_72B: Config = {
    "model_type": "qwen",
    "hidden_size": 8192,
    "intermediate_size": 49152,  # gate and up together
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 1e6,
    "seq_length": 32768,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA31_405B = _decoder(
    "llama", layers=126, hidden=16384, inner=53248, heads=(128, 8, 128), vocab=128256,
    context=131072, theta=5e5, rope_scaling=_LLAMA31_ROPE,
)  # fmt: skip
_LLAMA31_8B = _decoder(
    "llama", layers=32, hidden=4096, inner=14336, heads=(32, 8, 128), vocab=128256,
    context=131072, theta=5e5, rope_scaling=_LLAMA31_ROPE,
)  # fmt: skip
_LLAMA2_70B = _decoder(
    "llama", layers=80, hidden=8192, inner=28672, heads=(64, 8, 128), vocab=32000, context=4096,
    theta=1e4,
)  # fmt: skip
_MISTRAL_7B = _decoder(
    "mistral", layers=32, hidden=4096, inner=14336, heads=(32, 8, 128), vocab=32768, context=32768,
    theta=1e6, sliding_window=None,
)  # fmt: skip
_OLMOE = _decoder(
    "olmoe", layers=16, hidden=2048, inner=1024, heads=(16, 16, 128), vocab=50304, context=4096,
    theta=1e4, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False,
)  # fmt: skip
_GRANITE_3B = _decoder(
    "granitemoe", layers=32, hidden=1536, inner=512, heads=(24, 8, 64), vocab=49155, context=131072,
    theta=1e4, epsilon=1e-6, tied=True, num_local_experts=40, num_experts_per_tok=8,
    embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625,
    logits_scaling=6.0,
)  # fmt: skip
_PHI35 = _decoder(
    "phimoe", layers=32, hidden=4096, inner=6400, heads=(32, 8, 128), vocab=32064, context=131072,
    theta=1e4, num_local_experts=16, attention_bias=True, lm_head_bias=True,
    router_jitter_noise=0.01,
)  # fmt: skip
_DBRX: Config = {
    "model_type": "dbrx",
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "max_seq_len": 32768,
    "vocab_size": 100352,
    "tie_word_embeddings": False,
    "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
}


def _gpt_oss(layers: int, experts: int) -> Config:
    return _decoder(
        "gpt_oss", layers=layers, hidden=2880, inner=2880, heads=(64, 8, 64), vocab=201088,
        context=131072, theta=150000, num_local_experts=experts, num_experts_per_tok=4,
        sliding_window=128, attention_bias=True, swiglu_limit=7.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    )  # fmt: skip


def _glm(*, context: int = 131072, **keys: Any) -> Config:
    return _decoder(
        "glm4_moe", vocab=151552, context=context, theta=1e6, num_experts_per_tok=8,
        n_shared_experts=1, partial_rotary_factor=0.5, attention_bias=True, norm_topk_prob=True,
        n_group=1, topk_group=1, heads=(96, 8, 128), **keys,
    )  # fmt: skip


_GLM: Config = {
    "layers": 92, "hidden": 5120, "inner": 12288, "n_routed_experts": 160, "use_qk_norm": True,
    "moe_intermediate_size": 1536, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5,
}  # fmt: skip
_GLM_AIR = _glm(
    layers=46, hidden=4096, inner=10944, n_routed_experts=128, moe_intermediate_size=1408,
    first_k_dense_replace=1, routed_scaling_factor=1.0, use_qk_norm=False,
)  # fmt: skip
_DOTS = _decoder(
    "dots1", layers=62, hidden=4096, inner=10944, heads=(32, 32, 128), vocab=152064, context=32768,
    theta=1e7, n_routed_experts=128, num_experts_per_tok=6, n_shared_experts=2,
    moe_intermediate_size=1408, first_k_dense_replace=1, routed_scaling_factor=2.5,
    norm_topk_prob=True,
)  # fmt: skip


def _ernie(**keys: Any) -> Config:
    return _decoder(
        "ernie4_5_moe", vocab=103424, context=131072, theta=5e5, tied=True, moe_num_experts=64,
        **keys,
    )  # fmt: skip


_ERNIE_300B = _ernie(
    layers=54, hidden=8192, inner=28672, heads=(64, 8, 128), moe_intermediate_size=3584, moe_k=8,
    moe_num_shared_experts=0, moe_layer_start_index=3,
)  # fmt: skip
_ERNIE_21B = _ernie(
    layers=28, hidden=2560, inner=12288, heads=(20, 4, 128), moe_intermediate_size=1536, moe_k=6,
    moe_num_shared_experts=2, moe_layer_start_index=1,
)  # fmt: skip
_HUNYUAN = _decoder(
    "hunyuan_v1_moe", layers=32, hidden=4096, inner=3072, heads=(32, 8, 128), vocab=128167,
    context=32768, theta=1e4, tied=True, num_experts=64, moe_topk=8,
    rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
)  # fmt: skip
_MINIMAX_M2 = _decoder(
    "minimax_m2", layers=62, hidden=3072, inner=1536, heads=(48, 8, 128), vocab=200064,
    context=196608, theta=5e6, epsilon=1e-6, num_local_experts=256, num_experts_per_tok=8,
    rotary_dim=64,
)  # fmt: skip


def _minimax(model_type: str, **keys: Any) -> Config:
    return _decoder(
        model_type, layers=80, hidden=6144, inner=9216, heads=(64, 8, 128), vocab=200064,
        context=10240000, theta=1e7, num_local_experts=32, num_experts_per_tok=2, rotary_dim=64,
        **keys,
    )  # fmt: skip


_ALPHA = 3.5565588200778455
_MINIMAX_OWN: Config = {
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "postnorm": True,
    "layernorm_full_attention_alpha": _ALPHA,
    "layernorm_linear_attention_alpha": _ALPHA,
    "layernorm_mlp_alpha": _ALPHA,
}
_MINIMAX_HF: Config = {
    "layer_types": [*["linear_attention"] * 7, "full_attention"] * 10,
    "full_attn_alpha_factor": _ALPHA,
    "linear_attn_alpha_factor": _ALPHA,
    "mlp_alpha_factor": _ALPHA,
}
_DELTA: Config = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
}
_QWEN3_NEXT = _decoder(
    "qwen3_next", layers=48, hidden=2048, inner=5120, heads=(16, 2, 256), vocab=151936,
    context=262144, theta=1e7, epsilon=1e-6, num_experts=512, num_experts_per_tok=10,
    moe_intermediate_size=512, shared_expert_intermediate_size=512, linear_num_value_heads=32,
    norm_topk_prob=True, **_DELTA,
)  # fmt: skip


def _qwen35(*, expert: int, experts: int = 256, active: int = 8, values: int = 64, **keys: Any,
) -> Config:  # fmt: skip
    """values: heads of the delta nets."""
    text = _decoder(
        "qwen3_5_moe_text", inner=expert, vocab=248320, context=262144, theta=1e7, epsilon=1e-6,
        num_experts=experts, num_experts_per_tok=active, moe_intermediate_size=expert,
        shared_expert_intermediate_size=expert, linear_num_value_heads=values, **_DELTA, **keys,
    )  # fmt: skip
    return {"model_type": "qwen3_5_moe", "text_config": text}


_QWEN35_35B = _qwen35(layers=40, hidden=2048, heads=(16, 2, 256), expert=512, values=32)
_QWEN35_122B = _qwen35(layers=48, hidden=3072, heads=(32, 2, 256), expert=1024)
_QWEN35_397B = _qwen35(
    layers=60, hidden=4096, heads=(32, 2, 256), expert=1024, experts=512, active=10
)  # fmt: skip


def _llama4(*, experts: int, step: int, normed: bool, context: int) -> Config:
    text = _decoder(
        "llama4_text", layers=48, hidden=5120, inner=8192, heads=(40, 8, 128), vocab=202048,
        context=context, theta=5e5, num_local_experts=experts, num_experts_per_tok=1,
        intermediate_size_mlp=16384, interleave_moe_layer_step=step, use_qk_norm=normed,
        attention_chunk_size=8192,
    )  # fmt: skip
    return {"model_type": "llama4", "text_config": text}


_SCOUT = _llama4(experts=16, step=1, normed=True, context=10485760)
_MAVERICK = _llama4(experts=128, step=2, normed=False, context=1048576)


def _latent(model_type: str, *, ranks: tuple[int | None, int], head: tuple[int, int, int],
    heads: int, shared: int = 1, **keys: Any,
) -> Config:  # fmt: skip
    """ranks: of queries and of keys and values; head: channels that stay, that turn, of values."""
    return _decoder(
        model_type, heads=(heads, heads, head[1]), q_lora_rank=ranks[0], kv_lora_rank=ranks[1],
        qk_nope_head_dim=head[0], qk_rope_head_dim=head[1], v_head_dim=head[2],
        n_shared_experts=shared, norm_topk_prob=model_type != "deepseek_v2", **keys,
    )  # fmt: skip


def _yarn(factor: float, fast: float, share: float = 1.0) -> Config:
    return {
        "type": "yarn",
        "factor": factor,
        "beta_fast": fast,
        "beta_slow": 1,
        "mscale": share,
        "mscale_all_dim": share,
        "original_max_position_embeddings": 4096,
    }


_DEEPSEEK = _latent(
    "deepseek_v3", layers=61, hidden=7168, inner=18432, heads=128, ranks=(1536, 512),
    head=(128, 64, 128), vocab=129280, context=163840, theta=1e4, epsilon=1e-6,
    moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8, n_group=8,
    topk_group=4, first_k_dense_replace=3, routed_scaling_factor=2.5, rope_scaling=_yarn(40, 32),
)  # fmt: skip
_DEEPSEEK_V2 = _latent(
    "deepseek_v2", layers=60, hidden=5120, inner=12288, heads=128, ranks=(1536, 512),
    head=(128, 64, 128), vocab=102400, context=163840, theta=1e4, epsilon=1e-6, shared=2,
    moe_intermediate_size=1536, n_routed_experts=160, num_experts_per_tok=6, n_group=8,
    topk_group=3, first_k_dense_replace=1, routed_scaling_factor=16.0,
    topk_method="group_limited_greedy", rope_scaling=_yarn(40, 32),
)  # fmt: skip
_DEEPSEEK_V2_LITE = _latent(
    "deepseek_v2", layers=27, hidden=2048, inner=10944, heads=16, ranks=(None, 512),
    head=(128, 64, 128), vocab=102400, context=163840, theta=1e4, epsilon=1e-6, shared=2,
    moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6, n_group=1,
    topk_group=1, first_k_dense_replace=1, routed_scaling_factor=1.0, topk_method="greedy",
    rope_scaling=_yarn(40, 32, 0.707),
)  # fmt: skip
_DEEPSEEK_V32: Config = {**_DEEPSEEK, "model_type": "deepseek_v32", "index_topk": 2048}
_KIMI = _latent(
    "kimi_k2", layers=61, hidden=7168, inner=18432, heads=64, ranks=(1536, 512),
    head=(128, 64, 128), vocab=163840, context=131072, theta=5e4, epsilon=1e-6,
    moe_intermediate_size=2048, n_routed_experts=384, num_experts_per_tok=8, n_group=1,
    topk_group=1, first_k_dense_replace=1, routed_scaling_factor=2.827, rope_scaling=_yarn(32, 1),
)  # fmt: skip
_GLM_FLASH = _latent(
    "glm4_moe_lite", layers=47, hidden=2048, inner=10240, heads=20, ranks=(768, 512),
    head=(192, 64, 256), vocab=154880, context=202752, theta=1e6,
    moe_intermediate_size=1536, n_routed_experts=64, num_experts_per_tok=4, n_group=1,
    topk_group=1, first_k_dense_replace=1, routed_scaling_factor=1.8,
)  # fmt: skip


def _gpt2(layers: int, hidden: int, heads: int) -> Config:
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "vocab_size": 50257,
    }


_GROK = {
    **_decoder(
        "grok-1", layers=64, hidden=6144, inner=32768, heads=(48, 8, 128), vocab=131072,
        context=8192, theta=1e4, tied=True, num_experts=8, num_experts_per_tok=2,
        attn_output_multiplier=0.08838834764831845, max_attn_value=30.0,
        embedding_multiplier_scale=78.38367176906169, output_multiplier_scale=0.5773502691896257,
    ),
    "hidden_act": "gelu",
}  # fmt: skip
_SKYWORK = _decoder(
    "skywork", layers=52, hidden=4608, inner=12288, heads=(36, 36, 128), vocab=65532, context=8192,
    theta=1e4, epsilon=1e-6, num_experts=[16], moe_2layer_gate=False, moe_use_logits_norm=True,
    moe_gate_norm_std=1.0, moe_feature_no_mul_topk=True,
)  # fmt: skip

HUB_MODELS: Mapping[str, tuple[str, Config]] = {
    "apus-xdan-4.0": ("xDAN2099/APUS-xDAN-4.0-MoE-v2", _APUS),
    "apus-xdan-4.0-gguf": ("xDAN-AI/APUS-xDAN-4.0-MOE", _APUS),
    "dbrx": ("databricks/dbrx-instruct", _DBRX),
    "deepseek-r1": ("deepseek-ai/DeepSeek-R1", _DEEPSEEK),
    "deepseek-v2-lite": ("deepseek-ai/DeepSeek-V2-Lite-Chat", _DEEPSEEK_V2_LITE),
    "deepseek-v2.5": ("deepseek-ai/DeepSeek-V2.5", _DEEPSEEK_V2),
    "deepseek-v3": ("deepseek-ai/DeepSeek-V3-0324", _DEEPSEEK),
    "deepseek-v3.2": ("deepseek-ai/DeepSeek-V3.2", _DEEPSEEK_V32),
    "dots.llm1": ("rednote-hilab/dots.llm1.inst", _DOTS),
    "ernie-4.5-21b-a3b": ("baidu/ERNIE-4.5-21B-A3B-PT", _ERNIE_21B),
    "ernie-4.5-300b-a47b": ("baidu/ERNIE-4.5-300B-A47B-PT", _ERNIE_300B),
    "glm-4.5": ("zai-org/GLM-4.5", _glm(**_GLM)),
    "glm-4.5-air": ("zai-org/GLM-4.5-Air", _GLM_AIR),
    "glm-4.6": ("zai-org/GLM-4.6", _glm(**_GLM, context=202752)),
    "glm-4.7": ("zai-org/GLM-4.7", _glm(**_GLM, context=202752)),
    "glm-4.7-flash": ("zai-org/GLM-4.7-Flash", _GLM_FLASH),
    "gpt-oss-120b": ("openai/gpt-oss-120b", _gpt_oss(36, 128)),
    "gpt-oss-20b": ("openai/gpt-oss-20b", _gpt_oss(24, 32)),
    "gpt2": ("openai-community/gpt2", _gpt2(12, 768, 12)),
    "gpt2-large": ("openai-community/gpt2-large", _gpt2(36, 1280, 20)),
    "gpt2-medium": ("openai-community/gpt2-medium", _gpt2(24, 1024, 16)),
    "gpt2-xl": ("openai-community/gpt2-xl", _gpt2(48, 1600, 25)),
    "granite-3.1-3b-a800m": ("ibm-granite/granite-3.1-3b-a800m-instruct", _GRANITE_3B),
    "grok-1": ("hpcai-tech/grok-1", _GROK),
    "hunyuan-a13b": ("tencent/Hunyuan-A13B-Instruct", _HUNYUAN),
    "kimi-k2": ("moonshotai/Kimi-K2-Instruct-0905", _KIMI),
    "llama-2-70b": ("meta-llama/Llama-2-70b-chat-hf", _LLAMA2_70B),
    "llama-3.1-405b": ("meta-llama/Llama-3.1-405B-Instruct", _LLAMA31_405B),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", _LLAMA31_8B),
    "llama-4-maverick": ("meta-llama/Llama-4-Maverick-17B-128E-Instruct", _MAVERICK),
    "llama-4-scout": ("meta-llama/Llama-4-Scout-17B-16E-Instruct", _SCOUT),
    "minimax-m1": ("MiniMaxAI/MiniMax-M1-80k", _minimax("minimax_m1", **_MINIMAX_OWN)),
    "minimax-m2": ("MiniMaxAI/MiniMax-M2", _MINIMAX_M2),
    "minimax-text-01": (
        "MiniMaxAI/MiniMax-Text-01",
        _minimax("minimax_text_01", **_MINIMAX_OWN),
    ),
    "minimax-text-01-hf": ("MiniMaxAI/MiniMax-Text-01-hf", _minimax("minimax", **_MINIMAX_HF)),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.3", _MISTRAL_7B),
    "mixtral-8x22b": ("mistralai/Mixtral-8x22B-Instruct-v0.1", {**_8X22B, "vocab_size": 32768}),
    "mixtral-8x22b-base": ("mistralai/Mixtral-8x22B-v0.1", _8X22B),
    "mixtral-8x7b": ("mistralai/Mixtral-8x7B-Instruct-v0.1", _8X7B),
    "mixtral-8x7b-base": ("mistralai/Mixtral-8x7B-v0.1", _8X7B),
    "olmoe-1b-7b": ("allenai/OLMoE-1B-7B-0924-Instruct", _OLMOE),
    "phi-3.5-moe": ("microsoft/Phi-3.5-MoE-instruct", _PHI35),
    "qwen-72b": ("Qwen/Qwen-72B-Chat", _QWEN_72B),
    "qwen1.5-72b": ("Qwen/Qwen1.5-72B-Chat", _QWEN15_72B),
    "qwen1.5-moe-a2.7b": ("Qwen/Qwen1.5-MoE-A2.7B-Chat", _QWEN_MOE),
    "qwen2-72b": ("Qwen/Qwen2-72B-Instruct", _QWEN2_72B),
    "qwen3-235b-a22b": ("Qwen/Qwen3-235B-A22B", _QWEN3_235B),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", _QWEN3_30B),
    "qwen3-coder-480b-a35b": ("Qwen/Qwen3-Coder-480B-A35B-Instruct", _QWEN3_CODER),
    "qwen3-coder-next": ("Qwen/Qwen3-Coder-Next", _QWEN3_NEXT),
    "qwen3-next-80b-a3b": ("Qwen/Qwen3-Next-80B-A3B-Instruct", _QWEN3_NEXT),
    "qwen3.5-122b-a10b": ("Qwen/Qwen3.5-122B-A10B", _QWEN35_122B),
    "qwen3.5-35b-a3b": ("Qwen/Qwen3.5-35B-A3B", _QWEN35_35B),
    "qwen3.5-397b-a17b": ("Qwen/Qwen3.5-397B-A17B", _QWEN35_397B),
    "qwen3.6-35b-a3b": ("Qwen/Qwen3.6-35B-A3B", _QWEN35_35B),
    "skywork-moe": ("Skywork/Skywork-MoE-Base", _SKYWORK),
    "skywork-moe-fp8": (
        "Skywork/Skywork-MoE-Base-FP8",
        {**_SKYWORK, "model_type": "skywork_moe"},
    ),
}

"""A GGUF file's header, as llama.cpp's converter writes it from a config.json."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import gguf

Config = Mapping[str, Any]
Writer = gguf.GGUFWriter


def rope_of(config: Config) -> Config:
    found: Config = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 1e4)}
    return found


def head_size(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def describe(writer: Writer, config: Config) -> None:
    """The architecture's keys."""
    writer.add_tokenizer_model("no_vocab")
    if whole := _WHOLE.get(config["model_type"]):
        whole(writer, config)
        return
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config.get("max_position_embeddings", config.get("seq_length")))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config.get("intermediate_size_mlp", config["intermediate_size"]))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", config.get("layer_norm_epsilon")))
    writer.add_vocab_size(config["vocab_size"])
    _describe_rope(writer, config)
    for key, add in _OPTIONAL.items():
        # Latents are one head of keys and values to llama.cpp.
        value = 1 if key == "num_key_value_heads" and "kv_lora_rank" in config else config.get(key)
        if value is not None:
            add(writer, value)
    if config["model_type"] in _OF_FAMILIES:
        _OF_FAMILIES[config["model_type"]](writer, config)


def _describe_rope(writer: Writer, config: Config) -> None:
    rope = rope_of(config)
    theta = rope.get("rope_theta", config.get("rotary_emb_base", 1e4))
    if rope.get("alpha"):
        size = head_size(config)
        theta *= rope["alpha"] ** (size / (size - 2))
    writer.add_rope_freq_base(theta)
    if config["model_type"] in ("llama", "mistral", "mixtral", "granitemoe", "llama4_text"):
        writer.add_rope_dimension_count(head_size(config))
    kind = rope.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if kind == "longrope":
        whole = config["max_position_embeddings"] / rope["original_max_position_embeddings"]
        log = math.log(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(whole) / log))
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _same(value: Any) -> Any:
    """Of a value that some configs have for each layer."""
    return value[0] if isinstance(value, list) else value


_OPTIONAL: Mapping[str, Callable[[Writer, Any], None]] = {
    "num_key_value_heads": lambda w, v: w.add_head_count_kv(v),
    "head_dim": lambda w, v: (w.add_key_length(v), w.add_value_length(v)),
    "num_experts": lambda w, v: w.add_expert_count(_same(v)),
    "num_local_experts": lambda w, v: w.add_expert_count(v),
    "n_routed_experts": lambda w, v: w.add_expert_count(v),
    "num_experts_per_tok": lambda w, v: w.add_expert_used_count(v),
    "moe_topk": lambda w, v: w.add_expert_used_count(_same(v)),
    "moe_intermediate_size": lambda w, v: w.add_expert_feed_forward_length(_same(v)),
    "shared_expert_intermediate_size": lambda w, v: w.add_expert_shared_feed_forward_length(v),
    "n_group": lambda w, v: w.add_expert_group_count(v),
    "topk_group": lambda w, v: w.add_expert_group_used_count(v),
    "n_shared_experts": lambda w, v: w.add_expert_shared_count(v),
    "first_k_dense_replace": lambda w, v: w.add_leading_dense_block_count(v),
    "routed_scaling_factor": lambda w, v: w.add_expert_weights_scale(v),
}


def _describe_latent(writer: Writer, config: Config) -> None:
    rank, turning = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + turning)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + turning)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(turning)
    softmax = config["model_type"] == "deepseek_v2"  # whose older files do not say so
    if not softmax:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _describe_grouped(writer: Writer, config: Config) -> None:
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config["model_type"] == "glm4_moe":
        writer.add_rope_dimension_count(head_size(config) // 2)


def _describe_ernie(writer: Writer, config: Config) -> None:
    writer.add_expert_count(config["moe_num_experts"])
    writer.add_expert_used_count(config["moe_k"])
    writer.add_expert_shared_count(config["moe_num_shared_experts"])
    writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
    writer.add_leading_dense_block_count(config["moe_layer_start_index"])
    shared = config["moe_num_shared_experts"] * config["moe_intermediate_size"]
    writer.add_expert_shared_feed_forward_length(shared)


def _describe_hunyuan(writer: Writer, config: Config) -> None:
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["intermediate_size"])


def _describe_granite(writer: Writer, config: Config) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _describe_gpt_oss(writer: Writer, config: Config) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def _describe_llama4(writer: Writer, config: Config) -> None:
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def _describe_minimax(writer: Writer, config: Config) -> None:
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["rotary_dim"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _describe_phi(writer: Writer, config: Config) -> None:
    writer.add_sliding_window(config.get("sliding_window") or 0)
    writer.add_rope_dimension_count(head_size(config))


def _describe_dbrx(writer: Writer, config: Config) -> None:
    attention, feed_forward = config["attn_config"], config["ffn_config"]
    writer.add_block_count(config["n_layers"])
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(feed_forward["ffn_hidden_size"])
    writer.add_head_count(config["n_heads"])
    writer.add_head_count_kv(attention["kv_n_heads"])
    writer.add_rope_freq_base(attention["rope_theta"])
    writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_expert_count(feed_forward["moe_num_experts"])
    writer.add_expert_used_count(feed_forward["moe_top_k"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config["vocab_size"])


def _describe_gpt2(writer: Writer, config: Config) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])


def _describe_grok(writer: Writer, config: Config) -> None:
    writer.add_attn_logit_softcapping(config["max_attn_value"])
    writer.add_router_logit_softcapping(30.0)
    writer.add_attn_output_scale(config["attn_output_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier_scale"])
    writer.add_logit_scale(config["output_multiplier_scale"])


def _describe_delta(writer: Writer, config: Config) -> None:
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    values = config["linear_value_head_dim"] * config["linear_num_value_heads"]
    writer.add_ssm_inner_size(values)
    _describe_states(writer, config)
    writer.add_full_attention_interval(config.get("full_attention_interval", 4))
    share = rope_of(config).get("partial_rotary_factor", 0.25)
    size = int(head_size(config) * share)
    writer.add_rope_dimension_count(size)
    if config["model_type"] == "qwen3_5_moe_text":
        # Frequencies of three positions in turn, which for a text's tokens are the same one.
        sections = [(size // 2 - i + 2) // 3 for i in range(3)]
        writer.add_rope_dimension_sections([*sections, 0])


def _describe_states(writer: Writer, config: Config) -> None:
    """Which layers keep one; llama.cpp reads it of MiniMax's too, where every eighth has none."""
    kinds = [kind == "linear_attention" for kind in config.get("layer_types") or []]
    kinds = kinds or [kind == 0 for kind in config.get("attn_type_list") or []]
    if kinds:
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", kinds)


def _describe_lightning(writer: Writer, config: Config) -> None:
    _describe_states(writer, config)
    own = config.get("layernorm_full_attention_alpha")
    writer.add_residual_scale(config["full_attn_alpha_factor"] if own is None else own)
    writer.add_rope_dimension_count(config.get("rotary_dim", head_size(config)))


def _describe_indexer(writer: Writer, config: Config) -> None:
    _describe_latent(writer, config)
    writer.add_indexer_head_count(config["index_n_heads"])
    writer.add_indexer_key_length(config["index_head_dim"])
    writer.add_indexer_top_k(config["index_topk"])


_WHOLE: Mapping[str, Callable[[Writer, Config], None]] = {
    "dbrx": _describe_dbrx,
    "gpt2": _describe_gpt2,
}
_OF_FAMILIES: Mapping[str, Callable[[Writer, Config], None]] = {
    "deepseek_v2": _describe_latent,
    "deepseek_v3": _describe_latent,
    "deepseek_v32": _describe_indexer,
    "dots1": _describe_grouped,
    "ernie4_5_moe": _describe_ernie,
    "glm4_moe": _describe_grouped,
    "glm4_moe_lite": _describe_latent,
    "gpt_oss": _describe_gpt_oss,
    "granitemoe": _describe_granite,
    "grok-1": _describe_grok,
    "hunyuan_v1_moe": _describe_hunyuan,
    "kimi_k2": _describe_latent,
    "llama4_text": _describe_llama4,
    "minimax": _describe_lightning,
    "minimax_m1": _describe_lightning,
    "minimax_m2": _describe_minimax,
    "minimax_text_01": _describe_lightning,
    "phimoe": _describe_phi,
    "qwen3_5_moe_text": _describe_delta,
    "qwen3_next": _describe_delta,
}

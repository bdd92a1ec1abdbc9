"""gpt-oss: attention sinks, every second layer with a window, biases everywhere, clamped SwiGLU.

Source: openai/gpt-oss; transformers' GptOssForCausalLM. Published with experts in MXFP4, which are
read as the tensors named here.
"""

from dataclasses import replace

from lowmoe.families.names import decoder_names
from lowmoe.families.reading import (
    epsilon,
    n_layers,
    read_attention,
    read_model,
    require_plain,
    windows,
)
from lowmoe.families.rope import rope_values
from lowmoe.spec import (
    Activation,
    ExpertsFeedForward,
    HfConfig,
    ModelSpec,
    SoftmaxRouter,
    Stored,
)

_MLP = "model.layers.{layer}.mlp."
_EXPERTS = _MLP + "experts."
_GATE_UP = Stored(
    name=_EXPERTS + "gate_up_proj",
    holds=("gate", "up"),
    interleaved=True,
    experts="axis",
    transposed=True,
)
_BIASES = Stored(
    name=_EXPERTS + "gate_up_proj_bias",
    holds=("gate_bias", "up_bias"),
    interleaved=True,
    experts="axis",
)

# Where the config does not say.
_WINDOW = 128
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

NAMES = {
    **decoder_names(),
    "router": _MLP + "router.weight",
    "router_bias": _MLP + "router.bias",
    **dict.fromkeys(_GATE_UP.holds, _GATE_UP),
    **dict.fromkeys(_BIASES.holds, _BIASES),
    "down": Stored(name=_EXPERTS + "down_proj", experts="axis", transposed=True),
    "down_bias": Stored(name=_EXPERTS + "down_proj_bias", experts="axis"),
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a gpt-oss's config.json describes."""
    require_plain(hf)
    if not rope_values(hf):
        hf = HfConfig({**hf.values, "rope_parameters": _ROPE})
    bias = hf.boolean("attention_bias", default=True)
    attention = replace(
        read_attention(hf, theta=150_000.0, head_size=64, qkv_bias=bias, out_bias=bias),
        sinks=True,
    )
    window = hf.integer("sliding_window", default=_WINDOW)
    by_turns = [window if i % 2 == 0 else None for i in range(n_layers(hf))]
    n_experts = hf.integer("num_local_experts")
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("intermediate_size"),
        # A softmax over the highest scores is that over all, made to add up to 1.
        router=SoftmaxRouter(
            n_active=hf.integer("num_experts_per_tok", maximum=n_experts),
            renormalize=True,
            bias=True,
        ),
        activation=Activation(
            steepness=hf.number("swiglu_alpha", default=1.702),
            shift=1.0,
            limit=hf.number("swiglu_limit", default=7.0),
        ),
        bias=True,
    )
    layers = [replace(attention, window=w) for w in windows(hf, by_turns, size=_WINDOW)]
    return read_model(hf, layers, experts, norm_epsilon=epsilon(hf, default=1e-5))

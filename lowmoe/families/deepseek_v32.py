"""DeepSeek-V3.2: DeepSeek-V3 that chooses whom to attend to once a text is longer than index_topk.

Up to that length it attends to all, which is what is implemented: its context ends there.
Source: deepseek-ai/DeepSeek-V3.2-Exp; transformers' DeepseekV32ForCausalLM.
"""

from dataclasses import replace

from lowmoe.families import deepseek_v3
from lowmoe.spec import HfConfig, ModelSpec

NAMES = deepseek_v3.NAMES


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a DeepSeek-V3.2's config.json describes, as long as it sees all tokens."""
    whole = deepseek_v3.spec(hf)
    n_seen = hf.integer("index_topk", default=2048)
    return replace(whole, context_length=min(n_seen, whole.context_length))

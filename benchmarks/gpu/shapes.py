"""Expert layers of published models, as GPU kernels see them.

Knows:        sizes.
Ignorant of:  attention, everything else of the models.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """n_experts of a layer, n_active of a token, each gate and up [n_inner, n_hidden] and down."""

    n_hidden: int
    n_inner: int
    n_experts: int
    n_active: int

    @property
    def weights_of_an_expert(self) -> int:
        return 3 * self.n_hidden * self.n_inner


# Each from the config.json of the hub repository named.
SHAPES = {
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": ExpertShape(n_hidden=4096, n_inner=14336, n_experts=8, n_active=2),
    # mistralai/Mixtral-8x22B-v0.1
    "mixtral-8x22b": ExpertShape(n_hidden=6144, n_inner=16384, n_experts=8, n_active=2),
    # Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": ExpertShape(n_hidden=2048, n_inner=768, n_experts=128, n_active=8),
    # deepseek-ai/DeepSeek-V3
    "deepseek-v3": ExpertShape(n_hidden=7168, n_inner=2048, n_experts=256, n_active=8),
}

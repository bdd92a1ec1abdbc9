"""The text of Qwen3.5 and 3.6 MoE by itself, as transformers saves it: Qwen3-Next with its tensors
divided otherwise.
"""

from lowmoe.families.qwen3_next import NAMES_OF_3_5, spec_of_3_5
from lowmoe.spec import Stored

_EXPERTS = "model.layers.{layer}.mlp.experts."
_GATE_UP = Stored(name=_EXPERTS + "gate_up_proj", holds=("gate", "up"), experts="axis")

NAMES = NAMES_OF_3_5
# As they were published: all experts of a layer in one.
OTHER_NAMES = {
    **dict.fromkeys(_GATE_UP.holds, _GATE_UP),
    "down": Stored(name=_EXPERTS + "down_proj", experts="axis"),
}
spec = spec_of_3_5

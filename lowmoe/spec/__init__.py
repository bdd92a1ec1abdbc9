"""What a model is, in kinds and numbers, with no family's name and no tensor in it.

Letters in shape comments, everywhere in this house:

    T tokens        S tokens in the cache    V vocabulary    L layers
    H hidden        I inner, of one expert   E experts       K experts of a token
    A heads         B key-value heads        D head size     G groups per row

`attention` and `feed_forward` have the kinds that layers are made of, `parts` says which tensors
they need, `model` puts them together, `stored` says how a checkpoint may keep tensors, `hf_config`
reads config.json.

Knows:        the kinds of attention, router and feed-forward, and every shape that follows.
Ignorant of:  files, devices, how anything is computed.
"""

from lowmoe.spec.attention import (
    Attention,
    GroupedQueryAttention,
    HeadNorm,
    LatentAttention,
    LinearScaling,
    LongScaling,
    QueryTemperature,
    Rope,
    RopeScaling,
    WavelengthScaling,
    YarnScaling,
    grouped,
)
from lowmoe.spec.feed_forward import (
    GELU_TANH,
    SILU,
    Activation,
    EveryToken,
    ExpertsFeedForward,
    Router,
    SharedExpert,
    SigmoidRouter,
    SoftmaxRouter,
    SparseMixerRouter,
)
from lowmoe.spec.hf_config import HfConfig
from lowmoe.spec.model import (
    LayerSpec,
    ModelSpec,
    NormedResidual,
    NormKind,
    checkpoint_tensors,
    end_parts,
    layer_parts,
)
from lowmoe.spec.parts import Part, Role, expert_shapes
from lowmoe.spec.recurrent import GatedDeltaNet, LightningAttention, Recurrent
from lowmoe.spec.stored import Piece, Stored

__all__ = [
    "GELU_TANH",
    "SILU",
    "Activation",
    "Attention",
    "EveryToken",
    "ExpertsFeedForward",
    "GatedDeltaNet",
    "GroupedQueryAttention",
    "HeadNorm",
    "HfConfig",
    "LatentAttention",
    "LayerSpec",
    "LightningAttention",
    "LinearScaling",
    "LongScaling",
    "ModelSpec",
    "NormKind",
    "NormedResidual",
    "Part",
    "Piece",
    "QueryTemperature",
    "Recurrent",
    "Role",
    "Rope",
    "RopeScaling",
    "Router",
    "SharedExpert",
    "SigmoidRouter",
    "SoftmaxRouter",
    "SparseMixerRouter",
    "Stored",
    "WavelengthScaling",
    "YarnScaling",
    "checkpoint_tensors",
    "end_parts",
    "expert_shapes",
    "grouped",
    "layer_parts",
]

"""The kinds of feed-forward, and of the routers that choose among experts."""

import math
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxRouter:
    """Softmax over all experts, of which the n_active likeliest are used.

    renormalize: whether their weights are made to add up to 1, which is a softmax over them alone;
    bias: whether scores have one; choice_bias: one that is added to what the softmax gives, for the
    choice only; spread: the standard deviation, of E - 1 degrees of freedom, that a token's scores
    are brought to before, None to leave them as they are, arXiv 2406.06563; scale: of the weights.
    Of n_groups groups of experts, the choice is among those n_groups_active whose likeliest is
    likeliest, arXiv 2405.04434, section 2.2.2.
    """

    n_active: int
    renormalize: bool
    bias: bool = False
    choice_bias: bool = False
    spread: float | None = None
    n_groups: int = 1
    n_groups_active: int = 1
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmoidRouter:
    """Each expert's sigmoid by itself; the n_active highest are used, times scale.

    Of n_groups groups of experts, the choice is among those n_groups_active whose two highest add
    up to most.  choice_bias: as in SoftmaxRouter.  Source: arXiv 2412.19437, section 2.1.2.
    """

    n_active: int
    renormalize: bool
    choice_bias: bool = False
    n_groups: int = 1
    n_groups_active: int = 1
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseMixerRouter:
    """The two highest, one after the other, each weighed by a softmax over those that are left and
    closer to it than 2 * jitter, relatively.  Source: arXiv 2409.12136.
    """

    jitter: float

    @property
    def n_active(self) -> int:
        return 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryToken:
    """No choice: every token is given to all n_active experts, with weight 1."""

    n_active: int


Router: TypeAlias = SoftmaxRouter | SigmoidRouter | SparseMixerRouter | EveryToken


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What is between gate and up, and down: curve(gate) * (up + shift), or of an expert without
    a gate curve(up), where curve(x) = x * sigmoid(steepness * (x + cubic * x^3)).

    limit: gate is kept under it and up within +-limit before; None for no limit.
    """

    steepness: float = 1.0
    cubic: float = 0.0
    shift: float = 0.0
    limit: float | None = None


SILU = Activation()
# arXiv 1606.08415 as it is approximated with tanh: (1 + tanh(x)) / 2 is sigmoid(2 x).
GELU_TANH = Activation(steepness=2 * (2 / math.pi) ** 0.5, cubic=0.044715)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExpert:
    """An expert that every token uses.  weighed: by a sigmoid of its own score; else by 1."""

    n_inner: int
    weighed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsFeedForward:
    """n_experts experts of n_inner channels, of which a router picks some for each token.

    n_experts: 0 where the layer has its shared expert only, which is then a plain feed-forward of
    a model whose other layers have experts; where no layer has more than one, each pages as one.
    gated: whether an expert has a gate beside up and down; the shared one always has.
    shared: beside the others, always in RAM; bias: whether experts' linear maps have one;
    weigh_input: whether weights multiply what experts are given, not what they return.
    """

    n_experts: int
    n_inner: int
    router: Router
    activation: Activation = SILU
    shared: SharedExpert | None = None
    bias: bool = False
    weigh_input: bool = False
    gated: bool = True

    @property
    def n_matrices(self) -> int:
        """Of an expert."""
        return 3 if self.gated else 2

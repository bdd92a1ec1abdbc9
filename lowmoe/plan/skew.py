"""How often a token finds its experts in a tier that holds some of them.

    experts   share held: hit rate                   source
    8         .25: .27-.36  .5: .53-.62  .75: .77-.83   Mixtral-8x7B, fitted to arXiv 2401.04088
    128       .4: .90-.95                               Qwen3-30B-A3B, kekzl/imp#1359
    512       .125: .67  .25: .81                       Qwen3.8-Flash-Next, llama.cpp#27861
    128       .03: .085                                 gpt-oss-120b, BigMoeOnEdge#33

A power of the share held runs through each of these: few experts near the first, many between .2
and .75, where text and model decide. Uniform routing, as of random weights, is the power 1.

Knows:        powers.
Ignorant of:  bytes, speeds, policies; what was counted of a model, see experts/policy.py.
"""

from dataclasses import dataclass

UNIFORM = 1.0
FEW_EXPERTS = 16  # of a layer: with more, a text returns to some of them far more often
# The power for a text that returns to its experts much, and little.
POWERS_OF_FEW, POWERS_OF_MANY = (0.70, 0.93), (0.20, 0.75)


@dataclass(frozen=True, slots=True)
class Skew:
    """power: the hit rate of a tier with a share s of all experts is s ** power."""

    power: float

    def hit_rate(self, share: float) -> float:
        """Share of requests that find their expert there.  share: of experts held, 0 to 1."""
        return float(min(max(share, 0.0), 1.0) ** self.power)


def expected(n_experts: int) -> tuple[Skew, Skew]:
    """Of models with so many experts a layer: the least and the most even text.

    Of one, which is what dense layers count as, every token uses all that there is.
    """
    if n_experts <= 1:
        return Skew(UNIFORM), Skew(UNIFORM)
    powers = POWERS_OF_FEW if n_experts <= FEW_EXPERTS else POWERS_OF_MANY
    return Skew(powers[0]), Skew(powers[1])

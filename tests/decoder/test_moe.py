from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.decoder.moe import Routing, mix_experts
from lowmoe.decoder.weights import LayerWeights, no_transforms
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.spec import EveryToken, ExpertsFeedForward, SoftmaxRouter
from quant.expert import PlainFormat

T, H, I, E = 9, 16, 12, 5  # noqa: E741 - the house's letters
FORMAT = PlainFormat(H, I, torch.float32)
SPEC = ExpertsFeedForward(n_experts=E, n_inner=I, router=EveryToken(n_active=E))


class RandomExperts:
    """A source of E random experts."""

    buffer_bytes = FORMAT.part_bytes

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.gate, self.up = torch.randn(2, E, I, H, generator=generator)
        self.down = torch.randn(E, H, I, generator=generator)

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        matrices = (m[expert_id] for m in (self.gate, self.up, self.down))
        FORMAT.fill(buffers[0], matrices)
        return sum(self.buffer_bytes)


@pytest.fixture
def source() -> RandomExperts:
    return RandomExperts()


@pytest.fixture
def mixed(source: RandomExperts) -> Iterator[Callable[[Tensor, Routing], Tensor]]:
    budget = 2 * sum(source.buffer_bytes)
    with ExpertStore(source, ram_budget_bytes=budget, n_experts_total=E) as store:

        def mix(x: Tensor, routing: Routing) -> Tensor:
            store.want(0, routing.wanted())
            return mix_experts(
                replace(routing, given=x),
                0,
                SPEC,
                store=store,
                format=FORMAT,
                weights=LayerWeights(parts={}, transforms=no_transforms(H, E, I)),
                kernels=ReferenceKernels(),
            )

        yield mix


def test_every_token_gets_the_weighted_sum_of_its_own_experts(
    source: RandomExperts, mixed: Callable[[Tensor, Routing], Tensor]
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, router = torch.randn(T, H, generator=generator), torch.randn(E, H, generator=generator)
    weights = LayerWeights(parts={"router": router}, transforms=no_transforms(H, E, I))
    routing = Routing.of(x, weights, SoftmaxRouter(n_active=3, renormalize=True))
    inner = F.silu(torch.einsum("th,eih->tei", x, source.gate))  # [T, E, I]
    inner = inner * torch.einsum("th,eih->tei", x, source.up)
    outputs = torch.einsum("tei,ehi->teh", inner, source.down)  # [T, E, H]: all experts of all
    heard = torch.zeros(T, E).scatter(1, routing.expert_ids, routing.weights)
    # Sums of 16, 12 and 3 products of size up to 300, in another order.
    wanted = torch.einsum("teh,te->th", outputs, heard)
    torch.testing.assert_close(mixed(x, routing), wanted, rtol=1e-5, atol=1e-3)


def test_a_token_alone_gets_what_it_gets_among_others(
    mixed: Callable[[Tensor, Routing], Tensor],
) -> None:
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(1))
    expert_ids = torch.arange(T)[:, None] % E  # two tokens at most share an expert
    whole = mixed(x, Routing(torch.ones(T, 1), expert_ids))
    for t in range(T):
        alone = mixed(x[t : t + 1], Routing(torch.ones(1, 1), expert_ids[t : t + 1]))
        torch.testing.assert_close(alone[0], whole[t], rtol=1e-5, atol=1e-3)


def test_the_output_has_the_dtype_of_the_tokens(
    mixed: Callable[[Tensor, Routing], Tensor],
) -> None:
    routing = Routing(torch.tensor([[0.7, 0.3]]), torch.tensor([[4, 1]]))
    assert mixed(torch.randn(1, H).bfloat16(), routing).dtype == torch.bfloat16


def test_wanted_are_all_experts_of_any_token_and_the_heaviest_come_first() -> None:
    weights = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
    routing = Routing(weights, torch.tensor([[4, 0], [2, 4], [0, 2]]))
    assert routing.wanted() == [0, 2, 4]
    assert routing.by_weight() == [4, 0, 2]  # 1.3, 0.9, 0.8

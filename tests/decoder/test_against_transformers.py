"""Every family against transformers, which made the checkpoints.

Tolerances: float32 rounds at 2**-24 = 6e-8 of a number. From the embedding to a logit lie some 20
products of about 48 terms each; their roundings add up like a random walk to about
sqrt(20 * 48) * 6e-8 = 2e-6 of the largest logit, which is about 4.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    GOLDENS,
    LAYERS,
    VOCABULARY,
    decoder_over,
    in_chunks,
    reference,
    reference_logits,
    spec_of,
    with_attention,
    with_router,
)
from torch import Tensor

from lowmoe.families import FAMILIES
from lowmoe.spec import ModelSpec, Rope

TOLERANCE = 1e-4  # ten times the above, whatever order transformers adds in
N_TOKENS = 40
CASES = [(family, name) for family, goldens in GOLDENS.items() for name in goldens]


@dataclass(frozen=True, slots=True)
class Golden:
    """A saved checkpoint, the model in transformers, a text and its logits [T, V]."""

    folder: Path
    model: Any
    ids: Tensor
    logits: Tensor


def some_ids(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=CASES, ids=[f"{f}: {name}" for f, name in CASES])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    family, name = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    GOLDENS[family][name].save(folder)
    model = reference(folder)
    ids = some_ids(N_TOKENS)
    return Golden(folder, model, ids, reference_logits(model, ids))


def assert_same_but_for_rounding(found: Tensor, wanted: Tensor) -> None:
    # One machine, one order of layers, only the shapes of the products differ: 1e-5 of the largest
    # logit is five times the random walk above.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_every_family_has_a_golden() -> None:
    assert set(GOLDENS) == set(FAMILIES)


def test_logits_are_those_of_transformers(golden: Golden) -> None:
    with decoder_over(golden.folder) as decoder:
        found = in_chunks(decoder, golden.ids, [N_TOKENS])
    assert found.shape == (N_TOKENS, VOCABULARY)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, golden.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sizes", [[1], [3, 1, 7, 2, 12], [39, 1], [1, 39]], ids=str)
def test_any_chunks_give_what_the_whole_gives(golden: Golden, sizes: list[int]) -> None:
    with decoder_over(golden.folder) as decoder:
        whole = in_chunks(decoder, golden.ids, [N_TOKENS])
        assert_same_but_for_rounding(in_chunks(decoder, golden.ids, sizes), whole)


def test_twenty_greedy_tokens_are_those_of_transformers(golden: Golden) -> None:
    ids = golden.ids[:10]
    wanted = golden.model.generate(
        ids[None],
        attention_mask=torch.ones_like(ids)[None],
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    with decoder_over(golden.folder, n_slots=3) as decoder:
        cache = decoder.new_cache(30)
        found = [*ids.tolist()]
        new = ids
        for _ in range(20):
            new = decoder.logits(decoder.forward(new, cache)[-1:]).argmax(-1)
            found += new.tolist()
    assert found == wanted[0].tolist()


@torch.no_grad()
def test_the_goldens_can_fail(golden: Golden) -> None:
    assert golden.logits.std() >= 1
    outputs = golden.model(golden.ids[None], output_router_logits=True)
    assert len(outputs.router_logits) == LAYERS
    for scores in outputs.router_logits:
        n_experts = scores.shape[1]
        n_active = golden.model.config.num_experts_per_tok
        chosen = scores.topk(n_active).indices
        assert chosen.unique().numel() > n_experts // 2, "most tokens go to the same experts"
        # A uniform router would make it n_active / n_experts of the softmax.
        mass = scores.softmax(-1).gather(1, chosen).sum(1).mean()
        assert mass > 1.15 * n_active / n_experts


def _seen(spec: ModelSpec) -> int:
    window = spec.layers[0].attention.window
    return N_TOKENS if window is None else window


BREAKS: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "router not renormalized": lambda spec: with_router(spec, renormalize=False),
    "one expert too many": lambda spec: with_router(
        spec, n_active=spec.uniform_experts().router.n_active + 1
    ),
    "rope with another theta": lambda spec: with_attention(spec, rope=Rope(theta=30_000.0)),
    "a token less in sight": lambda spec: with_attention(spec, window=_seen(spec) - 1),
    "norm with another epsilon": lambda spec: replace(spec, norm_epsilon=2e-5),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_slightly_different_model_is_told_apart(golden: Golden, name: str) -> None:
    broken = BREAKS[name](spec_of(golden.folder))
    with decoder_over(golden.folder, spec=broken) as decoder:
        found = in_chunks(decoder, golden.ids, [N_TOKENS])
    assert (found - golden.logits).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("n_slots", [2, 3, 5, 9])
def test_logits_are_the_same_bits_whatever_the_budget(golden: Golden, n_slots: int) -> None:
    with decoder_over(golden.folder) as decoder:
        wanted = in_chunks(decoder, golden.ids, [11, 1, 1, 1, 20, 1])
    with decoder_over(golden.folder, n_slots=n_slots) as decoder:
        assert decoder.store.n_slots == n_slots
        for _ in range(2):  # with a cold store, then with a warm one
            assert torch.equal(in_chunks(decoder, golden.ids, [11, 1, 1, 1, 20, 1]), wanted)
        assert decoder.store.traffic().disk_requests > 0

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
from goldens import GOLDENS, spell_as_the_family_does
from tiny_models import (
    VOCABULARY,
    decoder_over,
    in_chunks,
    reference,
    reference_logits,
    spec_of,
)
from torch import Tensor

from lowmoe.families import FAMILIES, read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.spec import (
    Activation,
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    LayerSpec,
    LightningAttention,
    ModelSpec,
    SoftmaxRouter,
    layer_parts,
)

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
    GOLDENS[family][name].save(folder, family)
    model = reference(folder)
    spell_as_the_family_does(folder, family)
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


def test_texts_decoded_together_have_the_logits_of_transformers(golden: Golden) -> None:
    begins = (1, 8, 30)  # of the same text, so that what one knows would help another
    with decoder_over(golden.folder) as decoder:
        caches = [decoder.new_cache(N_TOKENS) for _ in begins]
        for begin, cache in zip(begins, caches, strict=True):
            decoder.forward(golden.ids[:begin], cache)
        for step in range(4):
            at = torch.tensor(begins) + step
            found = decoder.logits(decoder.step(golden.ids[at], caches))
            torch.testing.assert_close(found, golden.logits[at], rtol=0, atol=TOLERANCE)


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


def test_the_goldens_can_fail(golden: Golden) -> None:
    # Logits that hardly differ would be told apart by nothing.
    assert golden.logits.std() >= 0.5
    assert golden.logits.argmax(-1).unique().numel() > 3


@torch.no_grad()
def test_routers_of_the_goldens_choose(golden: Golden) -> None:
    spec = spec_of(golden.folder)
    routed = [x.feed_forward for x in spec.layers if x.feed_forward.n_experts > 1]
    if not routed:
        pytest.skip("a model without a choice")
    taken = _experts_taken(golden.folder)
    assert len(taken) == len(routed)
    for ids, experts in zip(taken, routed, strict=True):
        assert ids.unique().numel() > experts.router.n_active, "all tokens go to the same experts"


def _experts_taken(folder: Path) -> list[Tensor]:
    """The experts of some tokens in each layer that has several."""
    taken: list[Tensor] = []
    with decoder_over(folder) as decoder:
        computation: Any = decoder.computation
        route = type(computation).route

        def listening(self: Any, x: Tensor, layer_id: int) -> Any:
            routing = route(self, x, layer_id)
            if self.spec.layers[layer_id].feed_forward.n_experts > 1:
                taken.append(routing.expert_ids)
            return routing

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(computation), "route", listening)
            patch.setattr(type(computation), "foresee", route)
            in_chunks(decoder, some_ids(N_TOKENS), [N_TOKENS])
    return taken


def _each(spec: ModelSpec, change: Callable[[LayerSpec], LayerSpec]) -> ModelSpec | None:
    """The model with every layer changed; None if that changes nothing."""
    changed = replace(spec, layers=tuple(map(change, spec.layers)))
    return None if changed == spec else changed


def _attention(change: Callable[[Any], Any]) -> Callable[[ModelSpec], ModelSpec | None]:
    def layer(x: LayerSpec) -> LayerSpec:
        grouped = isinstance(x.attention, GroupedQueryAttention)
        return replace(x, attention=change(x.attention)) if grouped else x

    return lambda spec: _each(spec, layer)


def _latent(change: Callable[[Any], Any]) -> Callable[[ModelSpec], ModelSpec | None]:
    def layer(x: LayerSpec) -> LayerSpec:
        latent = isinstance(x.attention, LatentAttention)
        return replace(x, attention=change(x.attention)) if latent else x

    return lambda spec: _each(spec, layer)


def _of(kind: type, change: Callable[[Any], Any]) -> Callable[[ModelSpec], ModelSpec | None]:
    def layer(x: LayerSpec) -> LayerSpec:
        return replace(x, attention=change(x.attention)) if isinstance(x.attention, kind) else x

    return lambda spec: _each(spec, layer)


def _router(change: Callable[[Any], Any]) -> Callable[[ModelSpec], ModelSpec | None]:
    def layer(x: LayerSpec) -> LayerSpec:
        feed = x.feed_forward
        if feed.n_experts < 2:
            return x
        return replace(x, feed_forward=replace(feed, router=change(feed.router)))

    return lambda spec: _each(spec, layer)


def _feed(change: Callable[[Any], Any]) -> Callable[[ModelSpec], ModelSpec | None]:
    return lambda spec: _each(spec, lambda x: replace(x, feed_forward=change(x.feed_forward)))


def _shorter_sight(attention: GroupedQueryAttention) -> GroupedQueryAttention:
    return replace(attention, window=(attention.window or N_TOKENS) - 1)


def _other_theta(attention: Any) -> Any:
    rope = attention.rope
    return attention if rope is None else replace(attention, rope=replace(rope, theta=30_000.0))


def _unscaled(attention: Any) -> Any:
    rope = attention.rope
    return attention if rope is None else replace(attention, rope=replace(rope, scaling=None))


def _all_turning(attention: GroupedQueryAttention) -> GroupedQueryAttention:
    rope = attention.rope
    return attention if rope is None else replace(attention, rope=replace(rope, size=None))


def _fields(of: Any, **values: Any) -> Any:
    """A kind with some fields changed, those that it has."""
    return replace(of, **{k: v for k, v in values.items() if k in of.__dataclass_fields__})


def _normed_elsewhere(attention: GroupedQueryAttention) -> GroupedQueryAttention:
    found = attention.norm
    # Turning a head changes none of its length, so norms without weights stand on either side.
    if found is None or found.over == "all" or not found.weighted:
        return attention
    return replace(attention, norm=replace(found, after_rope=not found.after_rope))


def _weighed_elsewhere(feed: Any) -> Any:
    always_one = isinstance(feed.router, SoftmaxRouter) and feed.router.n_active == 1
    if feed.n_experts < 2 or (always_one and feed.router.renormalize):
        return feed
    return replace(feed, weigh_input=not feed.weigh_input)


def _residuals(name: str, **changes: float) -> Callable[[ModelSpec], ModelSpec | None]:
    """Of the layers whose sums are of norms, where norms themselves count for more than nothing."""

    def layer(x: LayerSpec) -> LayerSpec:
        found = getattr(x, name)
        return x if found is None else replace(x, **{name: replace(found, **changes)})

    return lambda spec: _each(spec, layer)


def _of_sums(change: Callable[[ModelSpec], ModelSpec]) -> Callable[[ModelSpec], ModelSpec | None]:
    """What says nothing of layers that add to their norms, in whatever size x comes to them."""
    return lambda spec: None if spec.layers[0].attention_residual else change(spec)


BREAKS: dict[str, Callable[[ModelSpec], ModelSpec | None]] = {
    "router renormalized or not": _router(
        lambda r: _fields(r, renormalize=not getattr(r, "renormalize", False))
    ),
    "one expert too many": _router(lambda r: _fields(r, n_active=r.n_active + 1)),
    "no groups": _router(lambda r: _fields(r, n_groups=1, n_groups_active=1)),
    "other weights": _router(lambda r: _fields(r, scale=1.5)),
    "scores as they are": _router(
        lambda r: _fields(r, spread=None) if getattr(r, "spread", None) else r
    ),
    "no jitter": _router(lambda r: _fields(r, jitter=r.jitter / 10) if hasattr(r, "jitter") else r),
    "weights elsewhere": _feed(_weighed_elsewhere),
    "no shared experts": _feed(lambda f: replace(f, shared=None)),
    "another activation": _feed(lambda f: replace(f, activation=Activation(shift=0.1))),
    "rope with another theta": _attention(_other_theta),
    "rope without scaling": _attention(_unscaled),
    "rope of the whole head": _attention(_all_turning),
    "a token less in sight": _attention(_shorter_sight),
    "no chunks": _attention(lambda a: replace(a, chunk=None)),
    "no temperature": _attention(lambda a: replace(a, temperature=None)),
    "no norms of heads": _attention(lambda a: replace(a, norm=None)),
    "norms of heads elsewhere": _attention(_normed_elsewhere),
    "latents with another theta": _latent(_other_theta),
    "latents without scaling": _latent(_unscaled),
    "latents with other scores": _latent(lambda a: replace(a, score_scale=a.score_scale * 1.1)),
    "latents with another epsilon": _latent(lambda a: replace(a, norm_epsilon=5e-2)),
    "nets with another epsilon": _of(GatedDeltaNet, lambda a: replace(a, norm_epsilon=5e-2)),
    "lightning that decays more": _of(
        LightningAttention, lambda a: replace(a, slopes=tuple(1.1 * s for s in a.slopes))
    ),
    "lightning with another epsilon": _of(
        LightningAttention, lambda a: replace(a, norm_epsilon=5e-2)
    ),
    "norms kept more behind attention": _residuals("attention_residual", kept=1.2),
    "less added by attention": _residuals("attention_residual", added=0.5),
    "norms kept more behind experts": _residuals("feed_forward_residual", kept=1.2),
    "less added by experts": _residuals("feed_forward_residual", added=0.5),
    "no clamp": _attention(lambda a: replace(a, clamp=None)),
    "other scores": _attention(lambda a: replace(a, score_scale=a.head_size**-0.5 * 1.1)),
    "norm with another epsilon": lambda spec: replace(spec, norm_epsilon=5e-3),
    "another norm": lambda spec: replace(spec, norm="layer" if spec.norm == "rms" else "rms"),
    "embeddings of another size": _of_sums(lambda spec: replace(spec, embedding_scale=1.5)),
    "layers that add more": _of_sums(lambda spec: replace(spec, residual_scale=1.1)),
    "scores without a cap": _attention(lambda a: replace(a, score_cap=None)),
    "no positions": lambda spec: replace(spec, learned_positions=False),
    "no norms behind": lambda spec: replace(spec, norm_after=False),
    "logits of another size": lambda spec: replace(spec, logit_scale=1.1),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_slightly_different_model_is_told_apart(golden: Golden, name: str) -> None:
    spec = spec_of(golden.folder)
    broken = BREAKS[name](spec)
    if broken is None or broken == spec:
        pytest.skip("this model has none")
    with decoder_over(golden.folder, spec=broken) as decoder:
        found = in_chunks(decoder, golden.ids, [N_TOKENS])
    assert (found - golden.logits).abs().max() > 10 * TOLERANCE


VECTORS = [
    "attention_norm",
    "attention_norm_bias",
    "attention_out_bias",
    "attention_out_norm",
    "choice_bias",
    "delta_decay_bias",
    "delta_log_decay",
    "delta_norm",
    "delta_rates",
    "delta_taps",
    "down_bias",
    "experts_norm",
    "experts_norm_bias",
    "experts_out_norm",
    "gate_up_bias",
    "k_norm",
    "kv_latent_norm",
    "lightning_norm",
    "q_latent_norm",
    "q_norm",
    "qkv_bias",
    "router_bias",
    "shared_router",
    "sinks",
]


@pytest.mark.parametrize("name", VECTORS)
def test_every_vector_of_every_layer_counts(golden: Golden, name: str) -> None:
    spec = spec_of(golden.folder)
    having = [i for i, x in enumerate(spec.layers) if name in _part_names(x, spec)]
    if not having:
        pytest.skip("this model has none")
    for layer_id in having:
        with decoder_over(golden.folder) as decoder:
            computation: Any = decoder.computation
            vector = computation.weights.layers[layer_id].parts[name]
            vector.copy_(vector.roll(1, -1))
            found = in_chunks(decoder, golden.ids, [N_TOKENS])
        assert (found - golden.logits).abs().max() > 10 * TOLERANCE, layer_id


def _part_names(layer: LayerSpec, spec: ModelSpec) -> set[str]:
    return {part.name for part in layer_parts(layer, spec)}


def test_no_kind_of_vector_is_left_untested() -> None:
    specs = (read_config(alias.config).spec for alias in ALIASES.values())
    found = {
        part.name for spec in specs for x in spec.layers for part in layer_parts(x, spec)
        if not part.coded
    }  # fmt: skip
    assert found - {"router"} == set(VECTORS)


@pytest.mark.parametrize("n_slots", [2, 3, 5, 9])
def test_logits_are_the_same_bits_whatever_the_budget(golden: Golden, n_slots: int) -> None:
    with decoder_over(golden.folder) as decoder:
        wanted = in_chunks(decoder, golden.ids, [11, 1, 1, 1, 20, 1])
    with decoder_over(golden.folder, n_slots=n_slots) as decoder:
        assert decoder.store.n_slots == min(n_slots, spec_of(golden.folder).n_experts_total)
        for _ in range(2):  # with a cold store, then with a warm one
            assert torch.equal(in_chunks(decoder, golden.ids, [11, 1, 1, 1, 20, 1]), wanted)
        assert decoder.store.traffic().disk_bytes > 0

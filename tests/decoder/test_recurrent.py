"""Layers that keep states: what they compute, and how far a conversation can be taken back."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from conversations import interrupted, session_over
from goldens import GOLDENS
from hypothesis import given, settings
from tiny_models import TinyModel, decoder_over, in_chunks, reference, reference_logits, spec_of
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from lowmoe.decoder.kv_cache import KvCache, cache_bytes
from lowmoe.decoder.linear_attention import CHUNK, attend_state
from lowmoe.decoder.state_cache import (
    DECODE_TOKENS,
    MAX_MARKS,
    MIN_MARKS,
    TAIL_TOKENS,
    Marks,
    StateCache,
    n_marks,
    state_bytes,
    states_bytes,
    stops,
)
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from tests.live_bytes import LiveBytes

FAMILIES = ["minimax", "qwen3_5_moe_text", "qwen3_next"]
N_TOKENS = 3 * CHUNK + 7


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    family: str = request.param
    config = next(iter(GOLDENS[family].values())).config
    TinyModel(config={**config, "max_position_embeddings": 1024}).save(folder, family)
    return folder


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 97, (N_TOKENS,), generator=torch.Generator().manual_seed(3))


def assert_same_but_for_rounding(found: Tensor, wanted: Tensor) -> None:
    # As in test_against_transformers.py: five times the random walk of roundings.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


# --- what is computed


def test_a_text_of_several_chunks_gives_transformers_logits(folder: Path, ids: Tensor) -> None:
    with decoder_over(folder) as decoder:
        whole = in_chunks(decoder, ids, [N_TOKENS])
        assert_same_but_for_rounding(in_chunks(decoder, ids, [CHUNK + 1, 1, 1, 50]), whole)
    torch.testing.assert_close(whole, reference_logits(reference(folder), ids), rtol=0, atol=1e-4)


@given(
    n_tokens=st.integers(1, 3 * CHUNK + 1),
    first=st.integers(0, 3 * CHUNK),
    steep=st.sampled_from([0.01, 1.0, 20.0]),
    corrected=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=40)
def test_many_tokens_at_once_read_what_they_read_one_after_the_other(
    n_tokens: int, first: int, steep: float, corrected: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator)

    queries, keys = (torch.nn.functional.normalize(random(n_tokens, 8), dim=-1) for _ in range(2))
    values, state = random(n_tokens, 5), random(8, 5)
    decay = -steep * torch.rand(3, n_tokens, generator=generator)
    correction = torch.rand(3, n_tokens, generator=generator) if corrected else None
    found, last = attend_state(queries, keys, values, decay, state, correction)
    split = min(first, n_tokens)  # in two calls, wherever they meet
    wanted, wanted_last = _one_by_one(queries, keys, values, decay, state, correction)
    parts: list[Tensor] = []
    for some in (slice(0, split), slice(split, None)):
        if keys[:, some].shape[1]:
            part = None if correction is None else correction[:, some]
            out, state = attend_state(
                queries[:, some], keys[:, some], values[:, some], decay[:, some], state, part
            )
            parts.append(out)
    # A state is a sum of at most some 200 terms of size 1, each rounded to 6e-8, which a triangle
    # of equations doubles a few times over.
    for a, b in ((found, wanted), (last, wanted_last), (torch.cat(parts, 1), wanted)):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4)


def _one_by_one(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    decay: Tensor,
    state: Tensor,
    correction: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """In float64: with a correction what transformers' loop says, without it the definition."""
    if correction is None:
        state, read = state.double(), []
        for t in range(queries.shape[1]):
            added = keys[:, t, :, None].double() * values[:, t, None].double()
            state = decay[:, t].double().exp()[:, None, None] * state + added
            read.append((queries[:, t, None].double() @ state)[:, 0])
        return torch.stack(read, 1), state
    scaled = queries * queries.shape[-1] ** 0.5  # which that loop divides them by
    out, last = torch_recurrent_gated_delta_rule(
        *(x.transpose(0, 1)[None] for x in (scaled, keys, values, decay, correction)),
        initial_state=state[None],
        output_final_state=True,
    )
    return out[0].transpose(0, 1).double(), last[0].double()


# --- how far a conversation can be taken back


@pytest.mark.parametrize("n_kept", [0, 1, 15, 50, 83, 84, 99, 100, 130])
def test_a_conversation_taken_back_goes_on_from_the_last_kept_position(
    folder: Path, ids: Tensor, n_kept: int
) -> None:
    with decoder_over(folder) as decoder:
        wanted = in_chunks(decoder, ids, [N_TOKENS])
        cache = decoder.new_cache(N_TOKENS)
        decoder.forward(ids[:100], cache)
        decoder.forward(torch.full((40,), 5), cache)
        found = cache.keep(n_kept)
        assert found == max(p for p in (0, 100 - TAIL_TOKENS, 100, 124) if p <= n_kept)
        assert cache.n_tokens == found
        if found <= 100:
            rest = decoder.logits(decoder.forward(ids[found:], cache))
            assert_same_but_for_rounding(rest, wanted[found:])


def test_what_was_forgotten_does_not_come_back(folder: Path, ids: Tensor) -> None:
    with decoder_over(folder) as decoder:
        cache = decoder.new_cache(N_TOKENS)
        decoder.forward(ids[:100], cache)
        assert cache.keep(90) == 84
        decoder.forward(ids[84:90], cache)
        assert cache.keep(90) == 90
        assert cache.keep(89) == 84


def test_an_answer_can_be_taken_back_to_where_its_prompt_ended(folder: Path, ids: Tensor) -> None:
    with decoder_over(folder) as decoder:
        cache = decoder.new_cache(N_TOKENS)
        decoder.forward(ids[:50], cache)
        for token in ids[50:90].tolist():
            decoder.forward(torch.tensor([token]), cache)
        assert cache.keep(90) == 90  # all of it
        assert cache.keep(89) == 50
        assert cache.keep(49) == 50 - TAIL_TOKENS


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 30])
def test_an_interrupted_pass_leaves_what_was_there(
    folder: Path, ids: Tensor, at: int, count: int
) -> None:
    with decoder_over(folder) as decoder:
        wanted = in_chunks(decoder, ids, [70, N_TOKENS - 70])
        cache = decoder.new_cache(N_TOKENS)
        assert isinstance(cache, KvCache)
        interrupted(decoder, at)(torch.full((count,), 5), cache)  # of an empty conversation
        decoder.forward(ids[:70], cache)
        interrupted(decoder, at)(torch.full((count,), 6), cache)
        assert cache.n_tokens == 70
        rest = decoder.logits(decoder.forward(ids[70:], cache))
        assert torch.equal(rest, wanted[70:])


def test_a_session_keeps_what_it_can_of_a_prompt_that_begins_its_answer_otherwise(
    folder: Path, ids: Tensor
) -> None:
    prompt = ids[:110].tolist()
    other = [*prompt[:105], *range(40, 60)]  # the last words told the model how to answer
    with decoder_over(folder) as decoder:
        session = session_over(decoder)
        for _ in session.forward(prompt):
            pass
        for token in (1, 2, 3):
            list(session.forward([token]))
        assert session.rewind(prompt) == 110
        assert session.rewind(other) == 110 - TAIL_TOKENS
        *_, found = session.forward(other[110 - TAIL_TOKENS :])
        wanted = in_chunks(decoder, torch.tensor(other), [len(other)])
    assert_same_but_for_rounding(decoder.logits(found)[-1], wanted[-1])


def test_a_session_goes_on_after_an_interruption(folder: Path, ids: Tensor) -> None:
    prompt = ids[:110].tolist()
    with decoder_over(folder) as decoder:
        session = session_over(decoder)
        steps = session.forward(prompt)
        next(steps)
        cache: Any = session._own._cache
        interrupted(decoder, 1)(ids[40:80], cache)
        n_kept = session.rewind(prompt)
        assert n_kept == 40
        *_, found = session.forward(prompt[n_kept:])
        wanted = in_chunks(decoder, ids[:110], [110])
        assert_same_but_for_rounding(decoder.logits(found)[-1], wanted[-1])


# --- which positions are kept, and what that takes


def test_a_pass_keeps_its_end_and_a_position_a_little_before() -> None:
    assert stops(1) == [1]
    assert stops(TAIL_TOKENS) == [TAIL_TOKENS]
    assert stops(TAIL_TOKENS + 1) == [1, TAIL_TOKENS + 1]
    assert stops(256) == [256 - TAIL_TOKENS, 256]


@given(
    most=st.integers(MIN_MARKS, MAX_MARKS),
    steps=st.lists(st.integers(1, 600) | st.just(1) | st.floats(0, 1), max_size=60),
)
@settings(deadline=None)
def test_no_more_positions_are_kept_than_may_be_the_latest_prompt_always_among_them(
    most: int, steps: list[int | float]
) -> None:
    marks, n_tokens, ended = Marks(most), 0, 0
    for step in steps:
        if isinstance(step, float):  # take so much of it back
            n_tokens = marks.at_most(int(step * n_tokens))
            ended = ended if ended <= n_tokens else 0
        else:
            marks.passed(n_tokens, n_tokens + step)
            n_tokens += step
            ended = n_tokens if step > 1 else ended
        assert len(marks.positions) <= most
        assert marks.positions == sorted(set(marks.positions))
        assert all(0 < p <= n_tokens for p in marks.positions)
        assert ended == 0 or ended in marks.positions


def test_a_long_answer_is_kept_at_intervals() -> None:
    marks = Marks(8)
    marks.passed(0, 100)
    for position in range(100, 3 * DECODE_TOKENS):
        marks.passed(position, position + 1)
    assert marks.positions == [84, 100, DECODE_TOKENS, 2 * DECODE_TOKENS, 3 * DECODE_TOKENS]


def test_however_long_an_answer_becomes_its_prompts_end_is_kept_and_its_own() -> None:
    marks = Marks(MIN_MARKS)
    marks.passed(0, 100)
    for position in range(100, 10 * DECODE_TOKENS):
        marks.passed(position, position + 1)
    assert marks.positions == [84, 100, 10 * DECODE_TOKENS]


def test_positions_that_are_dropped_leave_the_others_spread_out() -> None:
    marks = Marks(6)
    for first in range(0, 256 * 40, 256):
        marks.passed(first, first + 256)
    gaps = [b - a for a, b in zip([0, *marks.positions], marks.positions[:-1], strict=False)]
    # Where all were alike, five would be 2048 apart; dropping one makes two gaps one.
    assert max(gaps) <= 2 * 2 * 2048


def test_states_take_no_more_than_was_announced(folder: Path, ids: Tensor) -> None:
    spec = spec_of(folder)
    with decoder_over(folder) as decoder:
        cache = decoder.new_cache(1024)
        assert isinstance(cache, KvCache)
        most = 0
        for _ in range(30):
            decoder.forward(ids[:25], cache)
            most = max(most, _bytes_of_states(cache))
        decoder.forward(ids[:1], cache)
        most = max(most, _bytes_of_states(cache))
    one = state_bytes(spec)
    assert most == one * (n_marks(spec) + 1)
    # While a pass adds its own, two more.
    assert most + 2 * one == states_bytes(spec)
    assert cache_bytes(spec, 0, torch.float32) == states_bytes(spec)


def _bytes_of_states(cache: KvCache) -> int:
    kept = [layer for layer in cache.layers if isinstance(layer, StateCache)]
    tensors = [t for layer in kept for state in layer._states.values() for t in state]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_states_of_the_large_models_are_as_large_as_their_sizes_say() -> None:
    def of(alias: str) -> Any:
        return read_config(ALIASES[alias].config).spec

    # 36 layers of 32 heads that map 128 channels to 128, and three tokens of 8192 channels.
    next80b = of("qwen3-next-80b-a3b")
    assert state_bytes(next80b) == 36 * (32 * 128 * 128 + 3 * 8192) * 4
    assert n_marks(next80b) == 6
    assert state_bytes(of("minimax-text-01")) == 70 * 64 * 128 * 128 * 4
    assert n_marks(of("minimax-text-01")) == MIN_MARKS
    # Keys and values of 12 layers, two heads of 256.
    plain = cache_bytes(next80b, 1000, torch.float32) - states_bytes(next80b)
    assert plain == 12 * 2 * 2 * 256 * 1000 * 4
    assert states_bytes(of("mixtral-8x7b")) == 0


WIDE: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "linear_key_head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_value_head_dim": 64,
        "linear_num_value_heads": 8,
    },
    "minimax": {"head_dim": 64, "num_attention_heads": 8},
}


@pytest.mark.parametrize("family", WIDE)
def test_a_prefill_stays_within_the_memory_set_aside_for_it(family: str, tmp_path: Path) -> None:
    long = {"max_position_embeddings": 512, "moe_intermediate_size": 16, "intermediate_size": 16}
    TinyModel(config={**WIDE[family], **long}).save(tmp_path, family)
    ids = torch.arange(512) % 97
    with decoder_over(tmp_path) as decoder:
        decoder.forward(ids, decoder.new_cache(512))  # experts are in RAM now
        cache = decoder.new_cache(512)
        decoder.forward(ids, cache)
        assert cache.keep(0) == 0  # keys and values have their full size
        with LiveBytes() as live:
            decoder.forward(ids, cache)
        working = decoder.computation.working_bytes
    announced = working + 2 * state_bytes(decoder.spec)  # those that a pass puts into the cache
    assert announced / 4 < live.peak <= announced

"""The sampler is held to transformers' own processors; the options to their bounds."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lowmoe.engine.options import GenerationDefaults, SamplingOptions, sampling_options
from lowmoe.engine.sampling import N_SHORTLIST, Sampler
from lowmoe.errors import FolderError, LowMoeError, UsageError


def reference(logits: Tensor, context: Sequence[int], options: SamplingOptions) -> Tensor:
    """What transformers would draw from, its processors in the order of GenerationMixin."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    processors.append(MinPLogitsWarper(options.min_p))
    scores = processors(torch.tensor([list(context)]), logits.clone().unsqueeze(0))
    return scores.softmax(-1)[0]


def unfiltered(logits: Tensor, context: Sequence[int], options: SamplingOptions) -> Tensor:
    """What transformers would draw from after top-k and before top-p."""
    return reference(logits, context, replace(options, top_p=1.0, min_p=0.0))


def edge_distance(before: Tensor, top_p: float) -> float:
    """How near the top-p limit comes to a sum of probabilities, where rounding may decide."""
    cumulative = before.double().sort().values.cumsum(0)
    return float((cumulative - (1 - top_p)).abs().min())


def by_likelihood(found: Tensor, before: Tensor) -> Tensor:
    """Sum found over tokens that are equally likely: which of them stay is left to the sort."""
    values, groups = before.unique(return_inverse=True)
    return torch.zeros(len(values)).index_add(0, groups, found)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, list[int], SamplingOptions]:
    n_tokens = draw(st.sampled_from([2, 7, 40, 300, 3000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = torch.randn(n_tokens, generator=generator) * draw(st.sampled_from([0.3, 2.0, 8.0]))
    if draw(st.booleans()):
        logits = logits.round()  # ties
    context = draw(st.lists(st.integers(0, n_tokens - 1), min_size=1, max_size=20))
    options = SamplingOptions(
        temperature=draw(st.sampled_from([0.25, 0.7, 1.0, 1.9])),
        top_k=draw(st.sampled_from([0, 1, 5, 50, 5000])),
        top_p=draw(st.sampled_from([0.013, 0.31, 0.77, 0.9, 0.993, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.021, 0.33])),
        repetition_penalty=draw(st.sampled_from([0.8, 1.0, 1.1, 1.7])),
    )
    return logits, context, options


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_distribution_is_that_of_transformers(
    case: tuple[Tensor, list[int], SamplingOptions],
) -> None:
    logits, context, options = case
    before = unfiltered(logits, context, options)
    # A float32 sum of 3000 probabilities is good to 1e-6; nearer the edge either answer is right.
    assume(options.top_p == 1 or edge_distance(before, options.top_p) > 2e-6)
    found = Sampler(options).probabilities(logits, context)
    expected = reference(logits, context, options)
    assert found.shape == logits.shape
    close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-5)
    close(found.sort().values, expected.sort().values)
    close(by_likelihood(found, before), by_likelihood(expected, before))
    if options.top_p == 1:
        close(found, expected)


@settings(max_examples=200, deadline=None)
@given(case=cases(), data=st.data())
def test_among_those_allowed_it_is_as_if_all_others_were_impossible(
    case: tuple[Tensor, list[int], SamplingOptions], data: st.DataObject
) -> None:
    logits, context, options = case
    ids = st.sets(st.integers(0, len(logits) - 1), min_size=1, max_size=60)
    allowed = torch.tensor(sorted(data.draw(ids)))
    masked = torch.full_like(logits, -math.inf)
    masked[allowed] = logits[allowed]
    before = unfiltered(masked, context, options)
    assume(options.top_p == 1 or edge_distance(before, options.top_p) > 2e-6)
    found = Sampler(options).probabilities(logits, context, allowed)
    expected = reference(masked, context, options)
    close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-5)
    close(by_likelihood(found, before), by_likelihood(expected, before))
    assert set(found.nonzero().squeeze(1).tolist()) <= set(allowed.tolist())
    assert Sampler(options).pick(logits, context, allowed) in allowed
    greedy = SamplingOptions(temperature=0, repetition_penalty=options.repetition_penalty)
    likeliest = Sampler(replace(options, temperature=1.0, top_k=1, top_p=1.0))
    among = likeliest.probabilities(logits, context, allowed)
    assert among[Sampler(greedy).pick(logits, context, allowed)] > 0


@pytest.mark.parametrize("spread", [0.01, 5.0])
def test_a_nucleus_wider_or_narrower_than_the_shortlist_is_that_of_transformers(
    spread: float,
) -> None:
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(3)) * spread
    options = SamplingOptions(temperature=1.0, top_p=0.77)
    found = Sampler(options).probabilities(logits, [0])
    assert ((found > 0).sum() > N_SHORTLIST) == (spread < 1)
    expected = reference(logits, [0], options)
    # A float32 sum over 20,000 may move the edge by a few tokens of 1 / 15,000 each, 1e-6 in all.
    assert abs(int((found > 0).sum()) - int((expected > 0).sum())) <= 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_tie_at_the_edge_of_the_nucleus_falls_to_the_highest_ids() -> None:
    logits = torch.zeros(5000)
    logits[::2] = 1.0
    options = SamplingOptions(temperature=1.0, top_p=0.301, top_k=2000)
    found = Sampler(options).probabilities(logits, [])
    # top-k keeps all 2500 that tie for it; 30.1 % of those are 752.5, and the fewest that do 753.
    assert found.nonzero().squeeze(1).tolist() == list(range(5000 - 2 * 753, 5000, 2))


def test_temperature_zero_picks_the_likeliest_token_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert Sampler(SamplingOptions(temperature=0)).pick(logits, [1]) == 1
    penalized = Sampler(SamplingOptions(temperature=0, repetition_penalty=1.5))
    assert penalized.pick(logits, [1]) == 2
    assert penalized.probabilities(logits, torch.tensor([1])).tolist() == [0, 0, 1, 0]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))

    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(seed=seed, temperature=1.0))
        torch.rand(3)  # somebody else's use of torch's generator
        return [sampler.pick(logits, []) for _ in range(20)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5))
    sampler = Sampler(SamplingOptions(seed=11, temperature=1.0, top_p=0.95))
    expected = sampler.probabilities(logits, [])
    n_draws = 20_000
    counts = torch.bincount(
        torch.tensor([sampler.pick(logits, []) for _ in range(n_draws)]), minlength=12
    )
    assert (counts[expected == 0] == 0).all()
    # Five standard deviations of a binomial count, for each token.
    assert ((counts - n_draws * expected).abs() <= 5 * (n_draws * expected).sqrt()).all()


def test_logits_may_be_as_far_apart_as_float32_allows() -> None:
    logits = torch.tensor([-3e38, 3e38, 0.0])
    options = SamplingOptions(temperature=0.001, top_p=1.0)
    assert Sampler(options).probabilities(logits, []).tolist() == [0, 1, 0]
    assert Sampler(options).pick(logits, []) == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_is_never_sampled_over(
    broken: float, temperature: float
) -> None:
    logits = torch.zeros(9)
    logits[4] = broken
    with pytest.raises(LowMoeError, match=r"1 of the model's 9 logits are NaN or infinite"):
        Sampler(SamplingOptions(temperature=temperature)).pick(logits, [])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 0.0005, 101, math.nan, math.inf, "1", True, None]),
        ("top_k", [-1, 10_000_001, 1.0, True, None]),
        ("top_p", [0, -0.5, 1.5, math.nan, "x"]),
        ("min_p", [-0.01, 1.01, math.nan]),
        ("repetition_penalty", [0, -1, 101, math.nan, math.inf]),
        ("seed", [-1, 2**63, 1.5, False]),
        ("max_new_tokens", [0, -1, 10_000_001, 2.0]),
    ],
)
def test_an_option_out_of_bounds_is_refused_by_name(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=rf"{name} \(--{name.replace('_', '-')}\) is .*must"):
            SamplingOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [0, 0.001, 100]),
        ("top_k", [0, 10_000_000]),
        ("top_p", [1e-9, 1]),
        ("min_p", [0, 1]),
        ("repetition_penalty", [0.01, 100]),
        ("seed", [0, 2**63 - 1]),
        ("max_new_tokens", [1, 10_000_000]),
    ],
)
def test_an_option_on_its_bounds_works(name: str, values: list[float]) -> None:
    for value in values:
        options = SamplingOptions(**{name: value})  # type: ignore[arg-type]
        assert Sampler(options).pick(torch.arange(5.0), [0]) in range(5)


@pytest.mark.parametrize("stop", [("",), ("x" * 257,), (1,), ("a",) * 17, "END", ["END"]])
def test_stop_strings_that_cannot_be_searched_for_are_refused(stop: object) -> None:
    with pytest.raises(UsageError, match=r"stop .*but"):
        SamplingOptions(stop=stop)  # type: ignore[arg-type]


def test_one_stop_string_where_a_list_is_needed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"stop is the string 'END'.*write \['END'\]"):
        sampling_options(GenerationDefaults(), stop="END")


def test_an_option_is_what_was_asked_else_the_models_else_ours() -> None:
    defaults = GenerationDefaults(temperature=0.3, top_k=20)
    options = sampling_options(defaults, top_k=5, stop=["END"], seed=0)
    assert options == SamplingOptions(temperature=0.3, top_k=5, stop=("END",), seed=0)
    assert sampling_options(GenerationDefaults()) == SamplingOptions()
    # 0 was asked for; it is not the absence of a wish.
    assert sampling_options(defaults, temperature=0.0).temperature == 0


def test_a_generation_config_is_read_and_what_belongs_to_others_ignored() -> None:
    found = GenerationDefaults.from_bytes(
        b'{"do_sample": true, "temperature": 1, "top_k": 20, "top_p": 0.8, "min_p": null,'
        b' "repetition_penalty": 1.05, "max_new_tokens": 400, "eos_token_id": [5, 7],'
        b' "pad_token_id": 3, "transformers_version": "4.51.0"}'
    )
    assert found == GenerationDefaults(
        temperature=1,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.05,
        max_new_tokens=400,
        eos_ids=(5, 7),
    )
    assert GenerationDefaults.from_bytes(b'{"eos_token_id": 2}').eos_ids == (2,)
    assert GenerationDefaults.from_bytes(b"{}") == GenerationDefaults()


def test_a_model_that_does_not_want_to_be_sampled_has_temperature_zero() -> None:
    found = GenerationDefaults.from_bytes(b'{"do_sample": false, "temperature": 0.6}')
    assert found.temperature == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "warm"),
        ("temperature", math.nan),
        ("temperature", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", [0.9]),
        ("min_p", 2),
        ("repetition_penalty", 10**400),
        ("max_new_tokens", 0),
        ("do_sample", "no"),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", -1),
    ],
)
def test_a_generation_config_with_a_wrong_value_is_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(FolderError, match=rf"generation_config\.json: {key} is .*must"):
        GenerationDefaults.from_bytes(json.dumps({key: value}).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"1"])
def test_a_generation_config_that_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(FolderError, match=r"generation_config\.json (is not JSON|holds a)"):
        GenerationDefaults.from_bytes(data)

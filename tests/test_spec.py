import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.spec import HfConfig, ModelSpec, checkpoint_tensors

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=5,
)
READERS: dict[str, Callable[[HfConfig], object]] = {
    "integer": lambda hf: hf.integer("key"),
    "integer with default": lambda hf: hf.integer("key", default=3),
    "optional integer": lambda hf: hf.optional_integer("key"),
    "number": lambda hf: hf.number("key"),
    "number with default": lambda hf: hf.number("key", default=0.5),
    "boolean": lambda hf: hf.boolean("key", default=False),
    "require": lambda hf: hf.require("key", "silu"),
    "rope_theta": lambda hf: hf.rope_theta(default=1e4),
    "end_ids": lambda hf: hf.end_ids(),
}
NOT_WHOLE = [True, False, 0, -1, 2**31 + 1, 10**400, 3.0, 1.5, "3", "", [], {}, float("nan")]
NOT_NUMBERS = [True, 0, 0.0, -1e-5, float("inf"), float("nan"), 10**400, "1e-5", "", [], {}]


def short(value: object) -> str:
    return repr(value)[:12]


def spec_of(alias: str) -> ModelSpec:
    return read_config(ALIASES[alias].config).spec


@pytest.mark.parametrize("value", NOT_WHOLE, ids=short)
def test_a_whole_number_is_nothing_else(value: object) -> None:
    message = re.escape(f"config.json: key is {value!r}, but must be a whole number from 1 to ")
    for read in (READERS["integer"], READERS["integer with default"], READERS["optional integer"]):
        with pytest.raises(CheckpointError, match=f"^{message}"):
            read(HfConfig({"key": value}))


def test_a_whole_number_has_a_largest() -> None:
    assert HfConfig({"key": 8}).integer("key", maximum=8) == 8
    with pytest.raises(CheckpointError, match=r"key is 9, .* from 1 to 8\.$"):
        HfConfig({"key": 9}).integer("key", maximum=8)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=short)
def test_a_number_is_finite_and_above_zero(value: object) -> None:
    message = re.escape(f"config.json: key is {value!r}, but must be a number above 0.")
    for read in (READERS["number"], READERS["number with default"]):
        with pytest.raises(CheckpointError, match=f"^{message}$"):
            read(HfConfig({"key": value}))


@pytest.mark.parametrize("value", [0, 1, "true", None, [], float("nan")], ids=repr)
def test_a_boolean_is_true_or_false(value: object) -> None:
    message = re.escape(f"key is {value!r}, but must be true or false.")
    with pytest.raises(CheckpointError, match=message):
        HfConfig({"key": value}).boolean("key", default=True)


@pytest.mark.parametrize("config", [{}, {"key": None}], ids=repr)
def test_what_is_absent_or_null_has_its_default_or_is_missing(config: dict[str, Any]) -> None:
    hf = HfConfig(config)
    assert hf.integer("key", default=3) == 3
    assert hf.number("key", default=0.5) == 0.5
    assert hf.optional_integer("key") is None
    for read in (READERS["integer"], READERS["number"]):
        with pytest.raises(CheckpointError, match=r"key is missing\. .* download it again"):
            read(hf)


def test_good_values_are_read_as_they_are() -> None:
    hf = HfConfig({"layers": 32, "epsilon": 1e-5, "whole": 10000, "tied": True})
    assert hf.integer("layers") == hf.optional_integer("layers") == 32
    assert hf.number("epsilon") == 1e-5
    assert isinstance(hf.number("whole"), float)
    assert hf.boolean("tied", default=False) is True
    assert hf.boolean("absent", default=True) is True


def test_only_what_is_implemented_is_let_through() -> None:
    HfConfig({"act": "silu"}).require("act", "silu", None)
    HfConfig({}).require("act", "silu", None)
    with pytest.raises(UnsupportedModelError, match="act is 'gelu', but only 'silu' or None is"):
        HfConfig({"act": "gelu"}).require("act", "silu", None)
    with pytest.raises(UnsupportedModelError, match="act is None, but only 'silu' is"):
        HfConfig({}).require("act", "silu")


@pytest.mark.parametrize(
    ("value", "ids"), [(2, (2,)), ([2, 7], (2, 7)), ([], ()), (None, ()), (0, (0,))]
)
def test_a_text_ends_with_one_token_several_or_none(value: object, ids: tuple[int, ...]) -> None:
    assert HfConfig({"eos_token_id": value}).end_ids() == ids


@pytest.mark.parametrize("value", ["</s>", 2.0, True, [2, None], [[2]], {"id": 2}], ids=repr)
def test_end_tokens_are_ids(value: object) -> None:
    message = re.escape(f"eos_token_id is {value!r}, but must be token ids.")
    with pytest.raises(CheckpointError, match=message):
        HfConfig({"eos_token_id": value}).end_ids()


@given(value=JSON, reader=st.sampled_from(sorted(READERS)))
def test_any_json_is_read_or_refused_in_one_line(value: object, reader: str) -> None:
    keys = {"rope_theta": "rope_parameters", "end_ids": "eos_token_id"}
    try:
        READERS[reader](HfConfig({keys.get(reader, "key"): value}))
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


@given(st.dictionaries(st.sampled_from(sorted(ALIASES["mixtral-8x7b"].config)), JSON, max_size=3))
def test_any_config_becomes_a_spec_or_a_refusal(changes: dict[str, Any]) -> None:
    config = json.loads(json.dumps({**ALIASES["mixtral-8x7b"].config, **changes}))
    refused = False
    try:
        spec = read_config(config).spec
    except CheckpointError:
        refused = True
    assert refused or spec.layers


@pytest.mark.parametrize(
    ("alias", "total", "active"),
    [
        ("mixtral-8x7b", 46.7, 12.9),
        ("mixtral-8x7b-base", 46.7, 12.9),
        ("mixtral-8x22b-base", 140.6, 39.2),
        ("apus-xdan-4.0", 113.7, 60.8),
    ],
)
def test_parameters_are_those_that_the_models_publish(
    alias: str, total: float, active: float
) -> None:
    spec = spec_of(alias)
    assert spec.n_parameters / 1e9 == pytest.approx(total, abs=0.1)
    assert spec.n_active_parameters / 1e9 == pytest.approx(active, abs=0.1)


def test_the_instructed_8x22b_differs_by_768_tokens_in_and_out() -> None:
    more = spec_of("mixtral-8x22b").n_parameters - spec_of("mixtral-8x22b-base").n_parameters
    assert more == 2 * 768 * 6144


def test_a_tied_head_is_not_counted_twice() -> None:
    spec = spec_of("mixtral-8x7b")
    tied = dataclasses.replace(spec, tied_head=True)
    assert spec.n_parameters - tied.n_parameters == 32000 * 4096


def test_every_tensor_has_a_role_of_its_own_and_the_parameters_are_their_sizes() -> None:
    spec = spec_of("mixtral-8x22b")
    tensors = list(checkpoint_tensors(spec))
    assert len({role for role, _ in tensors}) == len(tensors)
    assert sum(math.prod(shape) for _, shape in tensors) == spec.n_parameters
    experts = [shape for role, shape in tensors if role.expert_id is not None]
    assert len(experts) == 3 * spec.n_experts_total == 3 * 56 * 8
    assert set(experts) == {(16384, 6144), (6144, 16384)}


def test_layers_with_experts_of_different_sizes_have_no_common_one() -> None:
    spec = spec_of("mixtral-8x7b")
    assert spec.uniform_experts() == spec.layers[0].feed_forward
    other = dataclasses.replace(spec.layers[0].feed_forward, n_inner=64)
    layers = (dataclasses.replace(spec.layers[0], feed_forward=other), *spec.layers[1:])
    with pytest.raises(AssertionError, match="different sizes"):
        dataclasses.replace(spec, layers=layers).uniform_experts()

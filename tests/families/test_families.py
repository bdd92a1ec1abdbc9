import re
from typing import Any

import pytest

from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families import FAMILIES, Family, read_config
from lowmoe.families.aliases import ALIASES, DEMO, near_names
from lowmoe.spec import Role, checkpoint_tensors

MIXTRAL = dict(ALIASES["mixtral-8x7b"].config)


def mixtral(**changes: Any) -> Family:
    return read_config({**MIXTRAL, **changes})


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_a_config_that_wants_code_run_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"has {key}: .* never runs"):
        mixtral(**{key: {"AutoModel": "modeling.Model"}})


@pytest.mark.parametrize("model_type", [None, 7, ["mixtral"], {}])
def test_a_model_type_must_be_a_name(model_type: object) -> None:
    found = re.escape(repr(model_type))
    with pytest.raises(CheckpointError, match=f"model_type is {found}, but must name"):
        read_config({"model_type": model_type})


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    known = ", ".join(sorted(FAMILIES))
    with pytest.raises(
        UnsupportedModelError, match=f"model_type is 'bert', but implemented are {known}"
    ):
        read_config({"model_type": "bert"})


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_names_every_tensor_of_its_models_and_no_two_alike(model_type: str) -> None:
    aliases = [a for a in ALIASES.values() if a.config["model_type"] == model_type]
    assert aliases, "a family without a model to benchmark"
    for alias in aliases:
        family = read_config(alias.config)
        assert family.spec.model_type == model_type
        names = [family.tensor_name(role) for role, _ in checkpoint_tensors(family.spec)]
        assert len(set(names)) == len(names)
        assert not any("{" in name or "None" in name for name in names)


def test_a_mixtrals_names_are_those_of_its_checkpoints() -> None:
    family = mixtral()
    # Out of the index of mistralai/Mixtral-8x7B-v0.1.
    assert family.tensor_name(Role("up", 31, 7)) == (
        "model.layers.31.block_sparse_moe.experts.7.w3.weight"
    )
    assert family.tensor_name(Role("q", 0)) == "model.layers.0.self_attn.q_proj.weight"
    assert family.tensor_name(Role("head")) == "lm_head.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu' or None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .* but only None"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is .*yarn.* but only None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "only rope_type 'default'"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "only rope_type 'default'"),
        ({"rope_parameters": 3}, "rope_parameters is 3"),
    ],
)
def test_what_nobody_implemented_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        mixtral(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 5}, "32 heads of 128 over 5 key-value heads"),
        ({"num_key_value_heads": 64}, "32 heads of 128 over 64 key-value heads"),
        ({"head_dim": 127}, "32 heads of 127"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, .* from 1 to 8"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, .* from 1 to 8"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, .* from 1 to 10000"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"rope_theta": -1.0}, r"rope_theta is -1\.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta is 'x'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', .* true or false"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_numbers_that_make_no_model_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        mixtral(**changes)


def test_a_mixtrals_config_becomes_its_spec() -> None:
    spec = mixtral(sliding_window=4096, eos_token_id=[2, 7], tie_word_embeddings=True).spec
    assert (spec.n_vocab, spec.n_hidden, len(spec.layers)) == (32000, 4096, 32)
    assert (spec.context_length, spec.norm_epsilon, spec.tied_head) == (32768, 1e-5, True)
    assert spec.end_ids == (2, 7)
    attention, experts = spec.layers[31].attention, spec.layers[31].feed_forward
    assert (attention.n_heads, attention.n_kv_heads, attention.head_size) == (32, 8, 128)
    assert (attention.window, attention.rope.theta) == (4096, 1e6)
    assert (experts.n_experts, experts.n_inner) == (8, 14336)
    assert (experts.router.n_active, experts.router.renormalize) == (2, True)


def test_both_spellings_of_rope_mean_the_same() -> None:
    old = {key: value for key, value in MIXTRAL.items() if key != "rope_theta"}
    new = read_config({**old, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert new.spec == mixtral().spec
    assert read_config(old).spec.layers[0].attention.rope.theta == 1e6  # the family's default


def test_a_misspelled_alias_has_near_names() -> None:
    assert near_names("Mixtral-8x22") == ["mixtral-8x22b", "mixtral-8x7b", "mixtral-8x22b-base"]
    assert near_names("dem") == [DEMO]
    assert near_names("zzzzzz") == []


def test_no_alias_hides_a_repository_or_the_demo() -> None:
    assert DEMO not in ALIASES
    for name, alias in ALIASES.items():
        assert re.fullmatch(r"[a-z0-9.-]+", name)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", alias.repository)

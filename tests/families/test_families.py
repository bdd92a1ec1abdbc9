import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import quant
from lowmoe.errors import CheckpointError, UnsupportedModelError, UsageError
from lowmoe.families import FAMILIES, Family, read_config
from lowmoe.families.aliases import ALIASES, DEMO, near_names
from lowmoe.families.fewer_layers import with_layers
from lowmoe.spec import LayerSpec, LightningAttention, ModelSpec, Role

MIXTRAL = dict(ALIASES["mixtral-8x7b"].config)


def mixtral(**changes: Any) -> Family:
    return read_config({**MIXTRAL, **changes})


@pytest.mark.parametrize(
    ("alias", "key", "found"),
    [
        ("mixtral-8x7b", "num_local_experts", "describes 68719476480 experts"),
        ("minimax-text-01", "num_attention_heads", "2147483640, but must be .* to 512"),
    ],
)
def test_more_than_any_model_has_is_refused_before_each_is_named(
    alias: str, key: str, found: str
) -> None:
    with pytest.raises(CheckpointError, match=found):
        read_config({**ALIASES[alias].config, key: 2147483640})


def test_the_documents_table_has_every_model_type() -> None:
    text = (Path(quant.__file__).parent.parent / "docs" / "families.md").read_text("utf-8")
    rows = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|.*\| (?:native|torch)\b", text, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == set(FAMILIES)


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_a_config_that_wants_code_run_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"has {key}: .* never runs"):
        mixtral(**{key: {"AutoModel": "modeling.Model"}})


def test_code_that_does_what_a_family_does_is_passed_by_and_other_code_refused() -> None:
    config = dict(ALIASES["phi-3.5-moe"].config)
    known = {"AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"}
    assert read_config({**config, "auto_map": known}).spec == read_config(config).spec
    for other in ({"AutoModelForCausalLM": "modeling.Other"}, {"AutoModel": "x"}, "PhiMoE"):
        with pytest.raises(UnsupportedModelError, match=r"has auto_map: .* never runs"):
            read_config({**config, "auto_map": other})


def test_a_layer_that_guesses_further_tokens_is_left_out() -> None:
    assert read_config(ALIASES["glm-4.5-air"].config).ignored == ("model.layers.46.",)
    assert mixtral().ignored == ()


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


def _configs() -> list[dict[str, Any]]:
    """Of all aliases, and of the texts within those of models that see."""
    whole = [dict(alias.config) for alias in ALIASES.values()]
    return whole + [c["text_config"] for c in whole if "text_config" in c]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_has_a_place_for_every_tensor_and_no_two_alike(model_type: str) -> None:
    configs = [c for c in _configs() if c["model_type"] == model_type]
    assert configs, "a family without a model to benchmark"
    for config in configs:
        family = read_config(config)
        assert family.spec.model_type == model_type
        found = set()
        for role in family.shapes:
            piece = family.piece(role)
            found.add((piece.name, piece.first, piece.rows.start, piece.rows.stop))
            assert "{" not in piece.name
            assert "None" not in piece.name
        assert len(found) == len(family.shapes)


# In billions, of all parameters and of those a token meets: what their makers say. Dense parts
# that are not weights of the decoder (vision, layers that guess further tokens) are not ours.
SIZES = {
    "dbrx": (132, 36),
    "deepseek-v2-lite": (15.7, 2.4),
    "deepseek-v2.5": (236, 21),
    "deepseek-v3": (671, 37),
    "deepseek-v3.2": (671, 37),
    "dots.llm1": (142, 14),
    "ernie-4.5-21b-a3b": (21, 3),
    "ernie-4.5-300b-a47b": (300, 47),
    "glm-4.5": (355, 32),
    "glm-4.5-air": (106, 12),
    "glm-4.7-flash": (30, 3.6),
    "gpt-oss-120b": (117, 5.1),
    "gpt-oss-20b": (21, 3.6),
    "gpt2": (0.124, 0.124),
    "gpt2-xl": (1.56, 1.56),
    "grok-1": (314, 86),
    "hunyuan-a13b": (80, 13),
    "kimi-k2": (1026, 32),
    "llama-2-70b": (70, 70),
    "llama-3.1-405b": (405, 405),
    "llama-3.1-8b": (8, 8),
    "llama-4-maverick": (400, 17),
    "llama-4-scout": (109, 17),
    "minimax-m2": (230, 10),
    "minimax-text-01": (456, 45.9),
    "mistral-7b": (7.2, 7.2),
    "olmoe-1b-7b": (7, 1.3),
    "phi-3.5-moe": (42, 6.6),
    "qwen-72b": (72, 72),
    "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "qwen2-72b": (72.7, 72.7),
    "qwen3-235b-a22b": (235, 22),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-coder-480b-a35b": (480, 35),
    "qwen3-next-80b-a3b": (80, 3.9),
    "qwen3.5-122b-a10b": (122, 10),
    "qwen3.5-35b-a3b": (35, 3),
    "qwen3.5-397b-a17b": (397, 17),
    "skywork-moe": (146, 22),
}


@pytest.mark.parametrize("name", SIZES)
def test_an_aliass_shape_has_as_many_parameters_as_its_makers_say(name: str) -> None:
    spec = read_config(ALIASES[name].config).spec
    whole, active = SIZES[name]
    assert spec.n_parameters / 1e9 == pytest.approx(whole, rel=0.05)
    # Makers leave out embeddings or the head, or round; a wrong count of experts is off by more.
    assert spec.n_active_parameters / 1e9 == pytest.approx(active, rel=0.25)


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
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type is 'dynamic', but implemented are def"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type is 'proportional', but"),
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
        ({"rope_parameters": 3}, "rope's parameters are 3, but must be a table"),
        ({"rope_scaling": {"type": "yarn"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "longrope"}}, "short_factor is None, but must be a list"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1, 2]}},
            "1 short factors and 2 long ones, but 128 channels that turn need 64",
        ),
        ({"partial_rotary_factor": 1.5}, r"1\.5 of 128 channels turn"),
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


def test_names_without_their_beginning_are_found_where_a_family_allows_it() -> None:
    family = read_config(ALIASES["gpt2"].config)
    # The first names of openai-community/gpt2, and those that transformers saves.
    short = family.as_found({"h.0.attn.bias", "h.0.ln_1.weight", "wte.weight"})
    assert short.tensor_name(Role("embedding")) == "wte.weight"
    assert short.tensor_name(Role("q", 3)) == "h.3.attn.c_attn.weight"
    assert "h.11.attn.masked_bias" in short.ignored
    assert family.as_found({"transformer.wte.weight"}) is family
    assert mixtral().as_found({"embed_tokens.weight"}).without == ""


@pytest.mark.parametrize("name", ["deepseek-v2.5", "deepseek-v3"])
@pytest.mark.parametrize(
    "groups", [{"n_group": 7}, {"n_group": 32, "topk_group": 1, "num_experts_per_tok": 9}]
)
def test_groups_of_experts_that_cannot_be_are_refused(name: str, groups: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match=r"of \d+ experts in \d of \d+ groups, but groups"):
        read_config({**ALIASES[name].config, **groups})


def test_a_model_that_chooses_what_it_sees_runs_as_long_as_it_sees_all() -> None:
    assert read_config(ALIASES["deepseek-v3.2"].config).spec.context_length == 2048
    ignored = read_config(ALIASES["deepseek-v3.2"].config).ignored
    assert "model.layers.60.self_attn.indexer." in ignored
    assert "model.layers.61." in ignored


@pytest.mark.parametrize(
    ("alias", "changes", "message"),
    [
        ("skywork-moe", {"moe_2layer_gate": True}, "moe_2layer_gate is True, but only False"),
        ("skywork-moe", {"moe_use_skywork_gating": True}, "moe_use_skywork_gating is True"),
        ("skywork-moe", {"moe_feature_no_mul_topk": False}, "moe_feature_no_mul_topk is False"),
        ("skywork-moe", {"num_experts": [16, 32]}, "only layers that are alike"),
        ("skywork-moe", {"num_experts": [1]}, "num_experts is 1, but every token goes to 2"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu', but only 'gelu_"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True"),
        ("grok-1", {"hidden_act": "silu"}, "hidden_act is 'silu', but only 'gelu'"),
    ],
)
def test_variants_that_nobody_implemented_are_refused(
    alias: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_config({**ALIASES[alias].config, **changes})


@pytest.mark.parametrize(("saved", "means"), [(4, True), (1, True), (0, False)])
def test_a_llama_4_may_say_by_a_number_that_far_tokens_are_seen_sharper(
    saved: int, means: bool
) -> None:
    def spec(tuned: object) -> ModelSpec:
        return read_config(per_layer("llama-4-scout", attn_temperature_tuning=tuned)).spec

    assert spec(saved) == spec(means) != spec(not means)
    with pytest.raises(CheckpointError, match=r"tuning is 4\.0, but must be true or false"):
        spec(4.0)


_OF_EXPERTS = (
    "first_k_dense_replace",
    "n_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "topk_group",
)


@pytest.mark.parametrize(
    ("alias", "absent"),
    [
        ("mistral-7b", ("sliding_window",)),
        ("llama-4-scout", ("attention_chunk_size", "attn_temperature_tuning")),
        ("gpt-oss-20b", ("rope_scaling",)),
        ("gpt-oss-20b", ("sliding_window",)),
        ("gpt-oss-20b", ("sliding_window", "layer_types")),
        ("dots.llm1", (*_OF_EXPERTS, "sliding_window", "max_window_layers")),
        ("glm-4.5", _OF_EXPERTS),
        ("glm-4.7-flash", (*_OF_EXPERTS, "rms_norm_eps")),
        ("deepseek-v2-lite", (*_OF_EXPERTS, "n_shared_experts", "rms_norm_eps")),
        ("deepseek-v3", _OF_EXPERTS),
        ("deepseek-v3.2", _OF_EXPERTS),
    ],
)
def test_what_a_config_does_not_say_is_as_in_transformers_class(
    alias: str, absent: tuple[str, ...]
) -> None:
    whole = dict(ALIASES[alias].config)
    config = {k: v for k, v in whole.get("text_config", whole).items() if k not in absent}
    said = AutoConfig.for_model(**config).to_dict() | {"eos_token_id": None}
    assert read_config(config).spec == read_config(said).spec


@pytest.mark.parametrize(("name", "aliased"), [("qwen3_moe", "qwen3-30b-a3b"), ("qwen2", None)])
def test_a_window_that_is_used_and_not_said_is_as_in_transformers_class(
    name: str, aliased: str | None
) -> None:
    if aliased is None:
        config = AutoConfig.for_model(name, use_sliding_window=True).to_dict()
        config = {k: v for k, v in config.items() if k != "sliding_window"}
    else:
        config = {k: v for k, v in ALIASES[aliased].config.items() if k != "sliding_window"}
    config["use_sliding_window"] = True
    said = AutoConfig.for_model(**config).to_dict() | {"eos_token_id": None}
    assert said["sliding_window"] == 4096
    assert read_config(config).spec == read_config(said).spec


@pytest.mark.parametrize("first", [0, 1, 99])
@pytest.mark.parametrize("name", ["qwen2", "dots1"])
def test_layers_slide_from_the_one_that_the_config_names(name: str, first: int) -> None:
    windowed = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": first}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2}  # that one of them has
    said = AutoConfig.for_model(name, **windowed, **experts).to_dict()
    windows = [64 if "sliding" in kind else None for kind in said["layer_types"]]
    for config in (said, {k: v for k, v in said.items() if k != "layer_types"}):
        layers = read_config(config).spec.layers
        assert [layer.attention.window for layer in layers] == windows


def test_a_window_that_is_null_is_none() -> None:
    config = ALIASES["mistral-7b"].config
    for window, found in ((None, None), (512, 512)):
        spec = read_config({**config, "sliding_window": window}).spec
        assert spec.layers[0].attention.window == found


def test_a_misspelled_alias_has_near_names() -> None:
    assert near_names("Mixtral-8x22") == ["mixtral-8x22b", "mixtral-8x7b", "mixtral-8x22b-base"]
    assert near_names("dem") == [DEMO]
    assert near_names("zzzzzz") == []


def test_no_alias_hides_a_repository_or_the_demo() -> None:
    assert DEMO not in ALIASES
    for name, alias in ALIASES.items():
        assert re.fullmatch(r"[a-z0-9.-]+", name)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", alias.repository)


def test_an_alias_says_its_licence() -> None:
    """But for one model, whose pages name none."""
    unnamed = {alias.repository for alias in ALIASES.values() if alias.licence is None}
    assert unnamed == {"xDAN2099/APUS-xDAN-4.0-MoE-v2", "xDAN-AI/APUS-xDAN-4.0-MOE"}


# --- fewer layers


def shapes_of(config: Mapping[str, Any]) -> list[LayerSpec]:
    """Layers but for how fast each forgets, which goes by how deep the model is."""
    return [
        replace(layer, attention=replace(layer.attention, slopes=()))
        if isinstance(layer.attention, LightningAttention)
        else layer
        for layer in read_config(config).spec.layers
    ]


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_a_shape_with_fewer_layers_is_the_beginning_of_the_whole(name: str) -> None:
    config = ALIASES[name].config
    layers = shapes_of(config)
    for n_layers in {1, 4, 7, len(layers)}:
        assert shapes_of(with_layers(config, n_layers)) == layers[:n_layers]


def per_layer(alias: str, **lists: Any) -> dict[str, Any]:
    config = dict(ALIASES[alias].config)
    whole = config.get("text_config", config)
    changed = {**whole, **lists}
    return {**config, "text_config": changed} if "text_config" in config else changed


@pytest.mark.parametrize(
    "config",
    [
        per_layer("gpt-oss-20b", layer_types=["full_attention", "sliding_attention"] * 12),
        per_layer("qwen3-30b-a3b", mlp_only_layers=[0, 2, 40]),
        per_layer("glm-4.5-air", mlp_layer_types=["dense", "dense"] + ["sparse"] * 44),
        per_layer("llama-4-scout", no_rope_layers=[0, 1, 1] * 16, moe_layers=[1, 2, 3, 30]),
        per_layer("hunyuan-a13b", moe_topk=[8] * 32, num_experts=64),
        per_layer("ernie-4.5-21b-a3b", moe_layer_end_index=27),
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_what_is_listed_by_layer_is_cut_with_the_layers(config: dict[str, Any]) -> None:
    layers = read_config(config).spec.layers
    for n_layers in (1, 3, 5):
        assert read_config(with_layers(config, n_layers)).spec.layers == layers[:n_layers]


@pytest.mark.parametrize("n_layers", [0, 33, -1])
def test_layers_that_a_shape_does_not_have_are_refused(n_layers: int) -> None:
    with pytest.raises(UsageError, match=f"--layers is {n_layers}, but must be 1 to 32"):
        with_layers(MIXTRAL, n_layers)


def test_a_config_that_counts_no_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="says how many layers there are"):
        with_layers({"model_type": "mixtral"}, 1)

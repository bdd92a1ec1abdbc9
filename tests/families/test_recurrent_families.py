"""What the configs of families with recurrent layers become, and where their tensors lie."""

from typing import Any

import pytest

from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families import Family, read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.spec import GatedDeltaNet, GroupedQueryAttention, LightningAttention, Role, Rope


def family(alias: str, **changes: Any) -> Family:
    config = dict(ALIASES[alias].config)
    if "text_config" in config:
        return read_config({**config, "text_config": {**config["text_config"], **changes}})
    return read_config({**config, **changes})


@pytest.mark.parametrize("alias", ["qwen3-next-80b-a3b", "qwen3.5-35b-a3b", "qwen3.5-397b-a17b"])
def test_every_fourth_layer_of_a_qwen_keeps_keys_and_values(alias: str) -> None:
    spec = family(alias).spec
    for i, layer in enumerate(spec.layers):
        kind = GroupedQueryAttention if i % 4 == 3 else GatedDeltaNet
        assert isinstance(layer.attention, kind)
    whole = spec.layers[3].attention
    assert isinstance(whole, GroupedQueryAttention)
    assert whole.gated
    assert whole.rope == Rope(theta=1e7, size=64)


def test_every_eighth_layer_of_a_minimax_keeps_keys_and_values_and_half_of_its_heads_turn() -> None:
    for alias in ("minimax-text-01", "minimax-text-01-hf", "minimax-m1"):
        spec = family(alias).spec
        for i, layer in enumerate(spec.layers):
            kind = GroupedQueryAttention if i % 8 == 7 else LightningAttention
            assert isinstance(layer.attention, kind)
            for residual in (layer.attention_residual, layer.feed_forward_residual):
                assert residual is not None
                assert (residual.kept, residual.added) == (3.5565588200778455, 1.0)
        whole = spec.layers[7].attention
        assert isinstance(whole, GroupedQueryAttention)
        assert whole.rope == Rope(theta=1e7, size=64)


def test_a_later_layer_of_a_minimax_forgets_less() -> None:
    spec = family("minimax-text-01").spec
    first, last = spec.layers[0].attention, spec.layers[78].attention
    assert isinstance(first, LightningAttention)
    assert isinstance(last, LightningAttention)
    # Slopes 2 ** (-8 (h + 1) / 64), of layer l of 80 times 1 - l / (79 + 1e-5) + 1e-5.
    assert first.slopes[7] == pytest.approx(0.5 * (1 + 1e-5))
    assert last.slopes[63] == pytest.approx((1 / 79 + 1e-5) / 256, rel=1e-4)


def test_a_qwen_3_5s_experts_are_found_in_one_tensor_or_in_many() -> None:
    found = family("qwen3.5-35b-a3b")
    up, down = Role("up", 7, 3), Role("down", 7, 3)
    place = "model.language_model.layers.7.mlp.experts."
    assert found.tensor_name(up) == place + "3.up_proj.weight"
    every = {found.tensor_name(role) for role in found.shapes}
    assert found.as_found(every) is found
    assert found.as_found(set()) is found
    # Out of the index of Qwen/Qwen3.5-35B-A3B.
    first = "model.language_model.layers.0.mlp.experts."
    other = found.as_found({first + "gate_up_proj", first + "down_proj"})
    piece = other.piece(up)
    assert (piece.name, piece.shape) == (place + "gate_up_proj", (256, 1024, 2048))
    assert (piece.first, piece.count, piece.rows) == (3, 1, slice(512, 1024, 1))
    assert other.piece(down).name == place + "down_proj"
    mixtral = family("mixtral-8x7b")
    assert mixtral.as_found({"anything"}) is mixtral


def test_rows_of_several_roles_are_found_head_by_head() -> None:
    found = family("qwen3-next-80b-a3b")
    piece = found.piece(Role("delta_v", 0))
    assert piece.name == "model.layers.0.linear_attn.in_proj_qkvz.weight"
    # Of each of 16 heads of keys: 128 rows of queries and of keys, 256 of values and of the gate.
    assert (piece.n_heads, piece.shape) == (16, (16 * 768, 2048))
    assert (piece.rows, piece.wanted) == (slice(256, 512, 1), (4096, 2048))
    gate = found.piece(Role("attention_gate", 3))
    assert (gate.n_heads, gate.rows) == (16, slice(256, 512, 1))
    assert found.piece(Role("q_norm", 3)).less_one
    assert not found.piece(Role("delta_norm", 0)).less_one


@pytest.mark.parametrize(
    ("alias", "changes", "message"),
    [
        ("qwen3-next-80b-a3b", {"attention_bias": True}, "attention_bias is True, but only False"),
        ("qwen3-next-80b-a3b", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            "qwen3-next-80b-a3b",
            {"layer_types": ["sliding_attention"] * 48},
            "layer_types has 'sliding_attention', but only 'full_attention' or 'linear_attention'",
        ),
        ("qwen3.5-35b-a3b", {"attn_output_gate": False}, "attn_output_gate is False"),
        ("qwen3.5-35b-a3b", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("minimax-text-01", {"postnorm": False}, "postnorm is False, but only True"),
        ("minimax-text-01", {"postnorm": None}, "postnorm is None, but only True"),
        ("minimax-text-01", {"shared_intermediate_size": 64}, "shared_intermediate_size is 64"),
        ("minimax-text-01-hf", {"sliding_window": 64}, "sliding_window is 64, but only None"),
    ],
)
def test_what_nobody_implemented_is_refused(
    alias: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        family(alias, **changes)


@pytest.mark.parametrize(
    ("alias", "changes", "message"),
    [
        (
            "qwen3-next-80b-a3b",
            {"linear_num_value_heads": 24},
            "24 heads of values over 16 heads of keys",
        ),
        ("qwen3-next-80b-a3b", {"layer_types": ["full_attention"]}, "must list 48 layers"),
        ("qwen3-next-80b-a3b", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0"),
        ("minimax-text-01", {"attn_type_list": [0, 1]}, "must list 80 layers"),
        ("minimax-text-01", {"rotary_dim": 256}, "rotary_dim is 256"),
        ("minimax-text-01", {"layernorm_mlp_alpha": "x"}, "layernorm_mlp_alpha is 'x'"),
    ],
)
def test_numbers_that_make_no_model_are_refused(
    alias: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        family(alias, **changes)

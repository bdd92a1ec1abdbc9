"""What a GGUF header's values become, and which of them are refused."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowmoe.decoder.open_checkpoint import open_checkpoint
from lowmoe.decoder.weights import CheckpointTensors
from lowmoe.engine.text_parts import SMALL_FILES
from lowmoe.errors import CheckpointError, LowMoeError, UnsupportedModelError
from lowmoe.families.gguf import gguf_config, gguf_family
from lowmoe.families.gguf.rope import FACTORS, LONG, SHORT, wavelengths
from lowmoe.spec import GroupedQueryAttention, LinearScaling, Rope, SigmoidRouter, SoftmaxRouter
from tests.gguf_models import write_gguf
from tests.gguf_tensors import llama3_factors
from tests.test_gguf import add_tokenizer

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5e5,
}
SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (100, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.1.attn_norm.weight": (64,),
}


def config(*, vectors: dict[str, list[float]] | None = None, **changes: Any) -> dict[str, Any]:
    """changes: of LLAMA, with __ for dots; None takes a key away."""
    values = LLAMA | {f"llama.{k.replace('__', '.')}": v for k, v in changes.items()}
    values = {key: value for key, value in values.items() if value is not None}
    found = vectors or {}
    shapes = SHAPES | {name: (len(vector),) for name, vector in found.items()}
    return gguf_config(values, shapes, found.__getitem__)


def test_plain_values_are_taken_over() -> None:
    found = config()
    assert (found["model_type"], found["vocab_size"], found["hidden_size"]) == ("llama", 100, 64)
    assert found["tie_word_embeddings"] is True  # there is no output.weight
    assert found["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}


def test_a_value_for_each_layer_is_one_if_all_are_alike() -> None:
    assert config(feed_forward_length=np.array([96, 96]))["intermediate_size"] == 96
    with pytest.raises(UnsupportedModelError, match=r"feed_forward_length differs from layer"):
        config(feed_forward_length=np.array([96, 64]))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"embedding_length": None}, r"llama\.embedding_length is missing"),
        ({"embedding_length": -1}, r"embedding_length is '-1', but must be a whole number"),
        ({"embedding_length": True}, r"embedding_length is 'True'"),
        ({"embedding_length": "64"}, r"embedding_length is '64'"),
        ({"embedding_length": np.array([])}, r"embedding_length is '\[\]'"),
        ({"rope__freq_base": "x"}, r"freq_base is 'x', but must be a number"),
        ({"rope__scaling__type": 5}, r"scaling\.type is '5', but must be a word"),
        ({"rope__scaling__type": "ntk"}, r"scaling\.type is 'ntk', but implemented are none"),
        ({"attention__key_length": 2**16 + 2}, r"heads have 65538 channels, but at most 65536"),
        ({"rope__dimension_count": 17}, r"17 of 16 channels turn"),
        ({"rope__freq_base": 0.0}, r"at a base of 0\.0"),
        ({"rope__freq_base": 1.0}, r"at a base of 1\.0"),
        ({"rope__freq_base": 1e300}, r"at a base of 1e\+300"),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__original_context_length": 512,
                "rope__scaling__yarn_log_multiplier": 1e300,
            },
            r"yarn_log_multiplier makes an mscale of 1e\+301",
        ),
        ({"block_count": 3}, r"block_count promises 3 layers, but the last"),
        ({"expert_count": 2**31 - 1}, r"expert_count is 2147483647, but must be from 1 to 4096"),
        ({"attention__value_length": 8}, r"keys of 16 channels and values of 8"),
    ],
)
def test_values_that_make_no_sense_are_named(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        config(**changes)


@pytest.mark.parametrize(
    ("key", "value", "neutral"),
    [
        ("attn_logit_softcapping", 30.0, 0.0),
        ("attention__causal", False, True),
        ("attention__clamp_kqv", 8.0, 0.0),
        ("attention__temperature_length", 8192, 0),
        ("expert_weights_scale", 2.5, 1.0),
        ("logit_scale", 6.0, 1.0),
        ("rope__scaling__attn_factor", 1.2, 1.0),
        ("use_parallel_residual", np.array([True, True]), False),
    ],
)
def test_what_an_architecture_has_not_here_is_refused_by_name(
    key: str, value: object, neutral: object
) -> None:
    assert config(**{key: neutral}) == config()
    with pytest.raises(UnsupportedModelError, match=rf"llama\.{key.replace('__', '.')} is .*llama"):
        config(**{key: value})


def test_a_value_that_the_family_refuses_is_not_said_to_be_in_a_config_json() -> None:
    made = config(feed_forward_length=0)
    with pytest.raises(CheckpointError, match=r"^GGUF, in the words of a config\.json: interm"):
        gguf_family(made, LLAMA, set())


def test_rope_of_a_dbrx_is_scaled_as_the_file_says() -> None:
    values = {k.replace("llama", "dbrx"): v for k, v in LLAMA.items()} | {
        "general.architecture": "dbrx",
        "dbrx.attention.layer_norm_epsilon": 1e-5,
        "dbrx.expert_count": 4,
        "dbrx.expert_used_count": 2,
        "dbrx.rope.scaling.type": "linear",
        "dbrx.rope.scaling.factor": 4.0,
    }
    made = gguf_config(values, SHAPES, {}.__getitem__)
    attention = gguf_family(made, values, set()).spec.layers[0].attention
    assert isinstance(attention, GroupedQueryAttention)
    assert attention.rope == Rope(theta=5e5, scaling=LinearScaling(factor=4.0))


NEXT = {k.replace("llama.", "qwen3next."): v for k, v in LLAMA.items()} | {
    "general.architecture": "qwen3next",
    "qwen3next.block_count": 4,
    "qwen3next.expert_count": 4,
    "qwen3next.expert_used_count": 2,
    "qwen3next.ssm.conv_kernel": 4,
    "qwen3next.ssm.group_count": 2,
    "qwen3next.ssm.inner_size": 48,
    "qwen3next.ssm.state_size": 8,
    "qwen3next.ssm.time_step_rank": 4,
}
NEXT_SHAPES = {
    **SHAPES,
    "blk.3.attn_norm.weight": (64,),
    "blk.0.ffn_down_exps.weight": (4, 64, 24),
    "blk.0.ffn_down_shexp.weight": (64, 24),
}
MINIMAX = {k.replace("qwen3next.", "minimax-01."): v for k, v in NEXT.items()} | {
    "general.architecture": "minimax-01",
    "minimax-01.block_count": 9,
    "minimax-01.residual_scale": 3.5,
}
_STATE, _NONE = "linear_attention", "full_attention"


def layer_types(values: dict[str, Any]) -> list[str]:
    count = values[f"{values['general.architecture']}.block_count"]
    shapes = {**NEXT_SHAPES, f"blk.{count - 1}.attn_norm.weight": (64,)}
    found: list[str] = gguf_config(values, shapes, {}.__getitem__)["layer_types"]
    return found


def test_every_so_many_layers_keep_no_state_where_the_file_does_not_list_them() -> None:
    assert layer_types(NEXT) == [_STATE, _STATE, _STATE, _NONE]
    assert layer_types({**NEXT, "qwen3next.full_attention_interval": 2}) == [_STATE, _NONE] * 2
    assert layer_types(MINIMAX) == [_STATE] * 7 + [_NONE, _STATE]


def test_layers_that_keep_states_are_those_that_the_file_lists() -> None:
    key = "qwen3next.attention.recurrent_layers"
    listed = np.array([True, False, False, True, False])  # the last one guesses further tokens
    assert layer_types({**NEXT, key: listed}) == [_STATE, _NONE, _NONE, _STATE]
    with pytest.raises(CheckpointError, match=r"recurrent_layers lists 3 layers, but there are 4"):
        layer_types({**NEXT, key: listed[:3]})
    with pytest.raises(CheckpointError, match=r"must be a list of true and false"):
        layer_types({**NEXT, key: np.array([1, 2, 3, 4])})


V2 = {k.replace("llama.", "deepseek2."): v for k, v in LLAMA.items()} | {
    "general.architecture": "deepseek2",
    "deepseek2.attention.key_length": 24,
    "deepseek2.attention.kv_lora_rank": 16,
    "deepseek2.attention.value_length": 16,
    "deepseek2.expert_count": 160,
    "deepseek2.expert_shared_count": 2,
    "deepseek2.expert_used_count": 6,
    "deepseek2.expert_weights_scale": 16.0,
    "deepseek2.rope.dimension_count": 8,
}


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, (8, 3)),
        ({"expert_group_count": 4, "expert_group_used_count": 2}, (4, 2)),
        ({"expert_count": 64}, (1, 1)),
    ],
    ids=["the large one, older than the key", "as the file says", "the small one"],
)
def test_the_groups_of_a_deepseek_v2_are_its_makers(
    changes: dict[str, Any], groups: tuple[int, int]
) -> None:
    values = V2 | {f"deepseek2.{key}": value for key, value in changes.items()}
    made = gguf_config(values, NEXT_SHAPES, {}.__getitem__)
    router = gguf_family(made, values, set()).spec.layers[1].feed_forward.router
    assert isinstance(router, SoftmaxRouter)
    assert (router.n_groups, router.n_groups_active, router.scale) == (*groups, 16.0)


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, (8, 4)),
        ({"expert_group_count": 4, "expert_group_used_count": 2}, (4, 2)),
        ({"expert_count": 384}, (1, 1)),
        ({"expert_count": 64}, (1, 1)),
    ],
    ids=["V3 and R1, older than the key", "as the file says", "Kimi-K2", "GLM-4.7-Flash"],
)
def test_the_groups_of_a_deepseek_v3_are_its_makers(
    changes: dict[str, Any], groups: tuple[int, int]
) -> None:
    older = {"expert_count": 256, "expert_gating_func": 2, "expert_used_count": 8}
    values = V2 | {f"deepseek2.{key}": value for key, value in (older | changes).items()}
    made = gguf_config(values, NEXT_SHAPES, {}.__getitem__)
    router = gguf_family(made, values, set()).spec.layers[1].feed_forward.router
    assert isinstance(router, SigmoidRouter)
    assert (router.n_groups, router.n_groups_active) == groups


def test_a_router_of_an_unknown_kind_is_refused() -> None:
    values = V2 | {"deepseek2.expert_gating_func": 3}
    with pytest.raises(UnsupportedModelError, match="expert_gating_func is 3, but"):
        gguf_config(values, NEXT_SHAPES, {}.__getitem__)
    unsaid = gguf_config(V2 | {"deepseek2.expert_gating_func": 0}, NEXT_SHAPES, {}.__getitem__)
    assert unsaid["model_type"] == "deepseek_v2"


@pytest.mark.parametrize("n_heads", [0, 5])
def test_heads_that_do_not_divide_their_channels_are_refused(n_heads: int) -> None:
    with pytest.raises(CheckpointError, match=rf"must divide into the {n_heads} heads"):
        layer_types({**NEXT, "qwen3next.ssm.time_step_rank": n_heads})


def test_a_file_without_a_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="there is no tensor token_embd"):
        gguf_config(LLAMA, {}, {}.__getitem__)
    with pytest.raises(CheckpointError, match=r"general\.architecture is None"):
        gguf_config({}, SHAPES, {}.__getitem__)


def test_control_tokens_that_end_answers_are_found_by_name() -> None:
    tokens = {"tokenizer.ggml.tokens": ["a", "<|eot_id|>", "<|im_end|>", "</s>"]}
    kinds = {"tokenizer.ggml.token_type": np.array([1, 3, 1, 3])}
    values = {**LLAMA, **tokens, **kinds, "tokenizer.ggml.eos_token_id": 3}
    assert gguf_config(values, SHAPES, {}.__getitem__)["eos_token_id"] == [1, 3]


# --- rope


@pytest.mark.parametrize(
    ("theta", "head_size", "factor", "high", "n_original"),
    [(5e5, 128, 8.0, 4.0, 8192), (5e5, 64, 32.0, 4.0, 8192), (1e6, 96, 16.0, 2.0, 4096)],
    ids=["Llama 3.1", "Llama 3.2", "another"],
)
def test_factors_give_back_the_scaling_that_made_them(
    theta: float, head_size: int, factor: float, high: float, n_original: int
) -> None:
    made = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": n_original,
    }
    found = wavelengths(llama3_factors(made, head_size), theta)
    assert found is not None
    assert found == {key: value for key, value in made.items() if key != "rope_theta"}


def test_factors_of_another_making_are_kept_one_by_one() -> None:
    factors = [1.0, 3.0, 2.0, 1.5, 2.5, 3.5, 4.5, 5.0]
    rope = config(vectors={FACTORS: factors})["rope_parameters"]
    assert rope["rope_type"] == "longrope"
    assert rope["long_factor"] == rope["short_factor"] == factors
    assert rope["long_mscale"] == rope["short_mscale"] == 1.0


@pytest.mark.parametrize(
    "factors",
    [
        [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 8.0],
        [1.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 8.0],
        [1.0001, 1.0002, 1.0003, 1.0004, 1.0005, 1.0006, 1.0007, 1e30],
    ],
    ids=["alike", "falling", "almost nothing"],
)
@pytest.mark.parametrize("theta", [1.0000000000000002, 1.5, 1e17])
def test_factors_that_no_scaling_makes_divide_by_nothing(
    factors: list[float], theta: float
) -> None:
    assert wavelengths(factors, theta) is None


def test_factors_of_1_change_nothing() -> None:
    assert config(vectors={FACTORS: [1.0] * 8})["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize(
    ("vectors", "found"),
    [
        ({FACTORS: [1.0] * 7}, r"rope_freqs\.weight is \(7,\), but 16 channels"),
        ({FACTORS: [1.0] * 7 + [0.0]}, r"factors from 0\.0 to 1\.0"),
        ({LONG: [1.0] * 8}, r"rope_factors_short\.weight is None"),
        ({LONG: [1.0] * 8, SHORT: [float("nan")] * 8}, r"factors from nan"),
    ],
)
def test_factors_that_cannot_be_are_refused(vectors: dict[str, list[float]], found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        config(vectors=vectors)


def test_no_factor_is_asked_for_of_heads_that_no_model_has() -> None:
    def never(name: str) -> list[float]:
        raise AssertionError("as many as the file claims")

    values = LLAMA | {"llama.attention.key_length": 2**30, "llama.attention.value_length": 2**30}
    with pytest.raises(CheckpointError, match=r"heads have 1073741824 channels"):
        gguf_config(values, SHAPES | {FACTORS: (2**29,)}, never)


def test_a_part_of_a_head_turns_where_the_file_says_so() -> None:
    for size in range(2, 16, 2):
        share = config(rope__dimension_count=size)["rope_parameters"]["partial_rotary_factor"]
        assert int(16 * share) == size


# --- fuzz


N_MUTATIONS = 4_000  # 12 s on an idle core, most of it what a tokenizer takes


def test_no_value_of_a_header_is_worse_than_an_error_of_ours(
    talking_checkpoint: Path, tmp_path: Path
) -> None:
    """All that is read before the first weight: values, names, shapes, vocabulary."""
    path, choose = tmp_path / "x.gguf", random.Random(11)
    write_gguf(talking_checkpoint, path, more=add_tokenizer)
    sound = path.read_bytes()
    n_header = sound.index(b"blk.0.ffn_down_exps.weight")
    refused = 0
    with path.open("r+b") as file:
        for _ in range(N_MUTATIONS):
            at = choose.randrange(n_header)
            change = bytes(choose.choice((0, 1, 5, 127, 255)) for _ in range(choose.randint(1, 4)))
            file.seek(at)
            file.write(change)
            file.flush()
            try:
                opened = open_checkpoint(path)
                CheckpointTensors(opened.files, opened.family)
                if choose.random() < 0.2:
                    for name in SMALL_FILES:
                        opened.small_file(name)
            except LowMoeError:
                refused += 1
            file.seek(at)
            file.write(sound[at : at + len(change)])
    assert refused > N_MUTATIONS / 20

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lowmoe.decoder.mask import visible
from lowmoe.decoder.norm import rms_norm
from lowmoe.decoder.rope import rope_angles, rope_frequencies, rope_length, rotate
from lowmoe.decoder.router import route_softmax, router_logits
from lowmoe.families.rope import read_rope
from lowmoe.spec import HfConfig, Rope, SoftmaxRouter


@given(n_tokens=st.integers(1, 12), first=st.integers(0, 12), window=st.none() | st.integers(1, 30))
def test_a_token_sees_itself_and_those_before_it_in_its_window(
    n_tokens: int, first: int, window: int | None
) -> None:
    mask = visible(n_tokens, first, window)
    wanted = [
        [asked <= asking and (window is None or asking - asked < window)
         for asked in range(first + n_tokens)]
        for asking in range(first, first + n_tokens)
    ]  # fmt: skip
    if mask is None:
        assert all(map(all, wanted))
    else:
        assert mask.tolist() == wanted


@given(
    n_experts=st.integers(1, 9),
    data=st.data(),
    renormalize=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None)
def test_a_router_takes_the_likeliest_and_weighs_them_by_the_softmax(
    n_experts: int, data: st.DataObject, renormalize: bool, dtype: torch.dtype
) -> None:
    n_active = data.draw(st.integers(1, n_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = torch.randn(6, n_experts, generator=generator).mul(3).to(dtype)
    weights, expert_ids = route_softmax(
        logits, SoftmaxRouter(n_active=n_active, renormalize=renormalize)
    )
    assert weights.shape == expert_ids.shape == (6, n_active)
    assert weights.dtype == torch.float32
    assert (weights.diff(dim=1) <= 0).all(), "heaviest first"
    probabilities = torch.exp(logits.double()) / torch.exp(logits.double()).sum(1, keepdim=True)
    picked = probabilities.gather(1, expert_ids)
    rest = probabilities.scatter(1, expert_ids, 0).amax(1, keepdim=True)
    assert (picked >= rest - 1e-7).all()  # float32 cannot tell closer ones apart
    if renormalize:
        picked = picked / picked.sum(1, keepdim=True)
    torch.testing.assert_close(weights.double(), picked, rtol=1e-5, atol=1e-7)


def test_scores_are_those_of_the_router_in_the_dtype_of_the_tokens() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    router = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    scores = router_logits(x, router)
    assert scores.dtype == torch.bfloat16
    torch.testing.assert_close(scores, x @ router.bfloat16().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_torchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 48, generator=generator).mul(5).to(dtype)
    weight = torch.rand(48, generator=generator) + 0.5
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    wanted = F.rms_norm(x.float(), (48,), weight, 1e-5)
    # bfloat16 rounds the norm, the weight and the product: three roundings of 2**-8.
    rtol = 1e-5 if dtype == torch.float32 else 3 * 2**-8
    torch.testing.assert_close(found.float(), wanted, rtol=rtol, atol=1e-6)


def test_the_norm_of_silence_is_silence() -> None:
    assert not rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5).any()


def test_a_turn_changes_no_length_and_position_zero_nothing() -> None:
    x = torch.randn(6, 3, 10, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *rope_angles(Rope(theta=1e4), 10, 0, 6))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[0], x[0])
    assert not torch.allclose(turned[1:], x[1:])


def test_products_of_turned_heads_depend_on_their_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    for distance in (0, 1, 17):
        products = []
        for first in (0, 3, 100):
            near = rotate(q, *rope_angles(Rope(theta=1e4), 16, first + distance, 1))
            far = rotate(k, *rope_angles(Rope(theta=1e4), 16, first, 1))
            products.append((near * far).sum())
        # An angle of 117 radians is rounded by 4e-6, and so are its sine and cosine.
        torch.testing.assert_close(products, [products[0]] * 3, rtol=0, atol=1e-4)


def test_angles_go_on_where_the_last_chunk_ended() -> None:
    cos, sin = rope_angles(Rope(theta=1e6), 8, 0, 50)
    later_cos, later_sin = rope_angles(Rope(theta=1e6), 8, 30, 20)
    assert torch.equal(later_cos, cos[30:])
    assert torch.equal(later_sin, sin[30:])


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 40.0, "original_max_position_embeddings": 4096},
    "yarn, not truncated": {
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "yarn of one step": {
        "factor": 32.0,
        "beta_fast": 1.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    "longrope": {
        "short_factor": [1 + i / 8 for i in range(32)],
        "long_factor": [2 + i / 2 for i in range(32)],
        "original_max_position_embeddings": 4096,
    },
    "longrope of a factor": {
        "factor": 2.0,
        "short_factor": [1 + i / 8 for i in range(32)],
        "long_factor": [2 + i / 2 for i in range(32)],
        "original_max_position_embeddings": 4096,
    },
}


def test_where_both_say_a_first_length_the_configs_own_is_taken() -> None:
    parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    keys = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 8192}
    keys |= {"original_max_position_embeddings": 1024}
    rope = read_rope(HfConfig({**keys, "rope_parameters": parameters}), head_size=64, theta=1e4)
    config = LlamaConfig(**keys, rope_parameters={**parameters, "rope_theta": 1e4})
    config.standardize_rope_params()
    wanted, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(rope_frequencies(rope, 64, 2048), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n_tokens", [4096, 4097])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers_at_the_sizes_of_real_models(
    name: str, n_tokens: int
) -> None:
    parameters = {"rope_type": name.split(",")[0].split()[0], "rope_theta": 5e5, **SCALINGS[name]}
    keys = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 131072}
    rope = read_rope(HfConfig({**keys, "rope_parameters": parameters}), head_size=64, theta=1e4)
    config = LlamaConfig(**keys, rope_parameters=dict(parameters))
    wanted, length = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        config, torch.device("cpu"), seq_len=n_tokens
    )
    torch.testing.assert_close(rope_frequencies(rope, 64, n_tokens), wanted, rtol=1e-6, atol=0)
    assert rope_length(rope, n_tokens) == pytest.approx(length, rel=1e-9)

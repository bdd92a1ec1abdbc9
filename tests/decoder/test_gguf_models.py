"""Every family out of a GGUF file against transformers, which made the checkpoints.

Tolerances as in test_against_transformers.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from goldens import GOLDENS, LONG, spell_as_the_family_does
from safetensors.torch import load_file
from test_against_transformers import N_TOKENS, TOLERANCE, some_ids
from tiny_models import TinyModel, decoder_over, in_chunks, reference, reference_logits
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowmoe.decoder.open_checkpoint import open_checkpoint
from lowmoe.decoder.weights import CheckpointTensors
from lowmoe.errors import CheckpointError, LowMoeError, UnsupportedModelError
from lowmoe.experts.source import CheckpointExperts
from lowmoe.families import FAMILIES
from lowmoe.families.gguf.config import ARCHITECTURES
from tests import gguf_models
from tests.gguf_models import Type, rewritten, write_gguf

# Families that are not read from such files: llama.cpp has no Skywork-MoE; of models that see, what
# they see is a file of its own there, and ours is the text.
NOT_READ = {"llama4", "qwen3_5_moe", "skywork", "skywork_moe"}
# What the format has no key for, so that no file of such a model can exist.
NOT_KEPT = {
    "deepseek_v3": {"yarn of other shares, two shared, shards"},
    "dots1": {"a window in the last layers"},
    "glm4_moe_lite": {"plain in the middle, scaled"},
    "gpt_oss": {"all layers whole, low limit"},
    "llama4_text": set(GOLDENS["llama4_text"]),  # chunks and temperatures other than Llama 4's
    "minimax": set(GOLDENS["minimax"]),  # more factors than one
    "minimax_m1": set(GOLDENS["minimax_m1"]),
    "minimax_text_01": set(GOLDENS["minimax_text_01"]),
    "mistral": {"window"},
    "mixtral": {"sliding window", "old spelling, window, shards"},
    "olmoe": {"clamped, renormalized"},
    "phimoe": {"long rope", "no biases, wide jitter"},
    "qwen2": {"a window in the last layers"},
    "qwen2_moe": {"a plain layer, renormalized", "every second layer, no biases"},
    "qwen3_next": {"plain in the middle, not renormalized, 3 heads of values to one"},
    "qwen3_moe": {"plain layers, not renormalized, biases", "window, tied, top 4"},
}
_LIGHTNING, _WHOLE = "linear_attention", "full_attention"
_AS_MADE = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}
_ONE_FACTOR = {
    **{f"{kind}_alpha_factor": 1.9 for kind in ("linear_attn", "full_attn", "mlp")},
    **{f"{kind}_beta_factor": 1.0 for kind in ("linear_attn", "full_attn", "mlp")},
}
_LENGTH = (1 + np.log(2) / np.log(64)) ** 0.5  # a context of twice the tokens trained on
MORE = {
    "llama4_text": {
        "experts everywhere, as made": TinyModel(config=_AS_MADE),
        "every second layer, as made": TinyModel(
            config={**_AS_MADE, "interleave_moe_layer_step": 2, "attention_bias": True}
        ),
    },
    "minimax": {
        "one factor for all sums": TinyModel(config=_ONE_FACTOR),
        "lightning in the middle": TinyModel(
            config={
                **_ONE_FACTOR,
                "layer_types": [_WHOLE, _LIGHTNING, _WHOLE],
                "rms_norm_eps": 1e-3,
            }
        ),
    },
    "minimax_m1": {"one factor for all sums": TinyModel(config=_ONE_FACTOR)},
    "minimax_text_01": {"one factor for all sums": TinyModel(config=_ONE_FACTOR)},
    "phimoe": {
        "long rope of usual length": TinyModel(
            config={"rope_parameters": {**LONG, "short_mscale": _LENGTH, "long_mscale": _LENGTH}}
        ),
    },
}
CASES = [
    (family, name, model)
    for table in (GOLDENS, MORE)
    for family, models in table.items()
    if family not in NOT_READ
    for name, model in models.items()
    if name not in NOT_KEPT.get(family, set())
]


def saved(folder: Path, family: str, model: TinyModel) -> Tensor:
    """Make a checkpoint; returns transformers' logits."""
    model.save(folder, family)
    wanted = reference_logits(reference(folder), some_ids(N_TOKENS))
    spell_as_the_family_does(folder, family)
    return wanted


def logits_of(path: Path) -> Tensor:
    with decoder_over(path) as decoder:
        return in_chunks(decoder, some_ids(N_TOKENS), [N_TOKENS])


@pytest.mark.parametrize(
    ("family", "model"), [(f, m) for f, _, m in CASES], ids=[f"{f}: {n}" for f, n, _ in CASES]
)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, model: TinyModel) -> None:
    wanted = saved(tmp_path, family, model)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    found = logits_of(tmp_path / "model.gguf")
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


def test_every_family_has_a_case_and_every_architecture_a_family() -> None:
    assert {family for family, _, _ in CASES} == set(gguf_models.ARCHITECTURES)
    assert set(gguf_models.ARCHITECTURES) == set(FAMILIES) - NOT_READ
    assert set(gguf_models.ARCHITECTURES.values()) == set(ARCHITECTURES)


# --- transformers reads some of these files itself


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
# transformers takes sizes of experts for its own defaults, whatever the file says.
USUAL_EXPERTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"moe_intermediate_size": 768},
}


@pytest.mark.parametrize("type", [Type.F16, Type.Q8_0, Type.Q4_0, Type.Q5_1], ids=lambda t: t.name)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_moe", "qwen3_moe", "mistral"])
def test_transformers_reads_the_same_model_out_of_the_same_file(
    tmp_path: Path, family: str, type: Type
) -> None:
    saved(tmp_path, family, TinyModel(config=WIDE | USUAL_EXPERTS.get(family, {})))
    write_gguf(tmp_path, tmp_path / "model.gguf", type=type)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    wanted = reference_logits(model, some_ids(N_TOKENS))
    torch.testing.assert_close(logits_of(tmp_path / "model.gguf"), wanted, rtol=0, atol=TOLERANCE)


# --- other ways to keep the same


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    saved(tmp_path, "mixtral", TinyModel(config={}))
    write_gguf(tmp_path, tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def fuse(tensors: dict[str, Any], parts: list[str], whole: str, axis: int) -> None:
    for layer in range(3):
        found = [tensors.pop(f"blk.{layer}.{part}.weight")[0] for part in parts]
        tensors[f"blk.{layer}.{whole}.weight"] = np.concatenate(found, axis), Type.F32


def apart(tensors: dict[str, Any]) -> None:
    """Experts as they were kept until April 2024."""
    for name in [n for n in tensors if "_exps." in n]:
        for expert, data in enumerate(tensors.pop(name)[0]):
            place = name.replace("_exps.", f".{expert}.")
            tensors[place] = np.ascontiguousarray(data), Type.F32


@pytest.mark.parametrize(
    "change",
    [
        lambda t: fuse(t, ["attn_q", "attn_k", "attn_v"], "attn_qkv", 0),
        lambda t: fuse(t, ["ffn_gate_exps", "ffn_up_exps"], "ffn_gate_up_exps", 1),
        apart,
    ],
    ids=["queries, keys and values in one", "gates and ups in one", "experts apart"],
)
def test_other_ways_to_keep_tensors_give_the_same_logits(
    mixtral: Path, tmp_path: Path, change: Any
) -> None:
    rewritten(mixtral, tmp_path / "other.gguf", change)
    assert torch.equal(logits_of(tmp_path / "other.gguf"), logits_of(mixtral))


def test_latents_map_up_is_read_whole_too(tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v3", TinyModel(config={}))
    halves, whole = tmp_path / "halves.gguf", tmp_path / "whole.gguf"
    write_gguf(tmp_path, halves)

    def together(tensors: dict[str, Any]) -> None:
        for layer in range(3):
            keys, values = (tensors.pop(f"blk.{layer}.attn_{p}_b.weight")[0] for p in "kv")
            heads = np.concatenate([keys.transpose(0, 2, 1), values], 1)
            tensors[f"blk.{layer}.attn_kv_b.weight"] = (heads.reshape(-1, 18), Type.F32)

    rewritten(halves, whole, together)
    assert torch.equal(logits_of(whole), logits_of(halves))


def test_nets_whose_maps_are_in_one_are_read_too(tmp_path: Path) -> None:
    """As the converter wrote Qwen3-Next at first, as its makers keep it."""
    saved(tmp_path, "qwen3_next", TinyModel(config={}))
    apart, whole = tmp_path / "apart.gguf", tmp_path / "whole.gguf"
    write_gguf(tmp_path, apart)
    made = load_file(tmp_path / "model.safetensors")

    def together(tensors: dict[str, Any]) -> None:
        for layer in (0, 2):
            del tensors[f"blk.{layer}.attn_qkv.weight"], tensors[f"blk.{layer}.attn_gate.weight"]
            own = made[f"model.layers.{layer}.linear_attn.in_proj_qkvz.weight"].numpy()
            tensors[f"blk.{layer}.ssm_in.weight"] = own, Type.F32

    rewritten(apart, whole, together)
    assert torch.equal(logits_of(whole), logits_of(apart))


def test_a_layer_behind_the_model_is_left_out_if_it_guesses_further_tokens(
    mixtral: Path, tmp_path: Path
) -> None:
    def behind(tensors: dict[str, Any]) -> None:
        tensors["blk.3.attn_norm.weight"] = np.ones(48, np.float32), Type.F32
        tensors["blk.3.nextn.eh_proj.weight"] = np.ones((48, 96), np.float32), Type.F32

    rewritten(mixtral, tmp_path / "more.gguf", behind)
    assert torch.equal(logits_of(tmp_path / "more.gguf"), logits_of(mixtral))


def test_a_layer_behind_the_model_that_does_not_is_refused(mixtral: Path, tmp_path: Path) -> None:
    """Such as the last of a model whose header was damaged."""

    def behind(tensors: dict[str, Any]) -> None:
        tensors["blk.3.attn_norm.weight"] = np.ones(48, np.float32), Type.F32

    rewritten(mixtral, tmp_path / "more.gguf", behind)
    with pytest.raises(UnsupportedModelError, match=r"blk\.3\.attn_norm\.weight"):
        logits_of(tmp_path / "more.gguf")


def test_states_that_would_grow_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_next", TinyModel(config={}))
    write_gguf(tmp_path, tmp_path / "model.gguf")

    def growing(tensors: dict[str, Any]) -> None:
        tensors["blk.0.ssm_a"][0][1] = 0.5

    rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", growing)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_a holds 0\.5, but how fast"):
        logits_of(tmp_path / "other.gguf")


def test_a_model_split_over_files_is_the_same_model(mixtral: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path, tmp_path / "parts.gguf", split=7)
    first, *others = sorted(tmp_path.glob("parts-*"))
    assert len(others) == 4  # 31 tensors
    assert torch.equal(logits_of(first), logits_of(mixtral))


def test_experts_are_read_with_little_memory_too(mixtral: Path) -> None:
    ids = some_ids(N_TOKENS)
    with decoder_over(mixtral, n_slots=2) as decoder:
        assert torch.equal(in_chunks(decoder, ids, [N_TOKENS]), logits_of(mixtral))


def test_what_was_read_of_an_expert_is_counted_as_it_lies_in_the_file(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral", TinyModel(config=WIDE))
    write_gguf(tmp_path, tmp_path / "model.gguf", type=Type.Q8_0)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    source = CheckpointExperts(checkpoint.files, checkpoint.family, torch.float32)
    buffers = [torch.empty(n, dtype=torch.uint8) for n in source.buffer_bytes]
    # A block of Q8_0 is 32 weights in 34 bytes.
    assert source.read(1, 2, buffers) == 3 * 64 * 64 // 32 * 34


# --- refusals


N_DAMAGES = 200


@pytest.mark.parametrize("family", sorted({family for family, _, _ in CASES}))
def test_a_damaged_header_is_read_or_refused(tmp_path: Path, family: str) -> None:
    """Whatever keys an architecture has; what else is in a header is in test_gguf_config."""
    saved(tmp_path, family, next(model for f, _, model in CASES if f == family))
    path, choose, refused = tmp_path / "model.gguf", random.Random(5), 0
    write_gguf(tmp_path, path)
    sound = path.read_bytes()
    with path.open("r+b") as file:
        for _ in range(N_DAMAGES):
            at = choose.randrange(sound.index(b"blk.0."))
            damage = bytes(choose.choice((0, 1, 5, 127, 255)) for _ in range(choose.randint(1, 4)))
            file.seek(at)
            file.write(damage)
            file.flush()
            refused += not is_read(path)
            file.seek(at)
            file.write(sound[at : at + len(damage)])
    assert N_DAMAGES / 4 < refused < N_DAMAGES


def is_read(path: Path) -> bool:
    """Anything but an error of ours passes through."""
    try:
        opened = open_checkpoint(path)
        CheckpointTensors(opened.files, opened.family)
    except LowMoeError:
        return False
    return True


def refused(path: Path, more: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path, path, more=more)
    open_checkpoint(path)


def test_an_architecture_nobody_implemented_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"architecture is 'mamba', but.*llama4"):
        open_checkpoint(tmp_path / "x.gguf")


def test_tensors_of_another_variant_are_refused_by_name(mixtral: Path, tmp_path: Path) -> None:
    def shared(tensors: dict[str, Any]) -> None:
        tensors["blk.1.ffn_up_shexp.weight"] = np.zeros((40, 48), np.float32), Type.F32

    rewritten(mixtral, tmp_path / "other.gguf", shared)
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\.ffn_up_shexp"):
        logits_of(tmp_path / "other.gguf")


def test_a_tensor_that_is_missing_is_named(mixtral: Path, tmp_path: Path) -> None:
    rewritten(mixtral, tmp_path / "other.gguf", lambda t: t.pop("blk.2.attn_q.weight"))
    with pytest.raises(CheckpointError, match=r"blk\.2\.attn_q\.weight"):
        logits_of(tmp_path / "other.gguf")


def test_a_tensor_of_another_shape_is_named(mixtral: Path, tmp_path: Path) -> None:
    def narrower(tensors: dict[str, Any]) -> None:
        tensors["blk.2.attn_q.weight"] = np.zeros((48, 40), np.float32), Type.F32

    rewritten(mixtral, tmp_path / "other.gguf", narrower)
    with pytest.raises(CheckpointError, match=r"attn_q\.weight is \[48, 40\].*\[48, 48\]"):
        logits_of(tmp_path / "other.gguf")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(
    mixtral: Path, tmp_path: Path, value: float
) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["blk.0.attn_norm.weight"][0][5] = value

    rewritten(mixtral, tmp_path / "other.gguf", spoil)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_norm\.weight holds NaN or infinity"):
        logits_of(tmp_path / "other.gguf")


def test_the_same_spec_comes_out_of_both_kinds_of_files(mixtral: Path) -> None:
    of_folder = open_checkpoint(mixtral.parent).family.spec
    of_file = open_checkpoint(mixtral).family.spec
    # The file keeps no id that the tokenizer does not have.
    assert of_file == replace(of_folder, end_ids=())

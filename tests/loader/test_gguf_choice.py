"""Which GGUF file of a repository is taken, by names of uploads as they are on the hub."""

import re

import pytest

from lowmoe.errors import CheckpointError, UnknownModelError
from lowmoe.loader.gguf_choice import GgufChoice, choose_gguf

# Bytes of each; what a weight takes grows with the kind's number.
APUS = {
    "README.md": 1,
    "APUS-xDAN-4.0-MOE-0402.IQ3_XXS.gguf": 43_700,
    "APUS-xDAN-4.0-MOE-0402.Q2_K.gguf": 41_500,
}
USUAL = {
    f"mixtral-8x7b-instruct-v0.1.{kind}.gguf": size
    for kind, size in {"Q2_K": 15, "Q4_K_M": 26, "Q5_0": 32, "Q6_K": 38, "Q8_0": 49}.items()
}
FOLDERS = {
    f"{kind}/GLM-4.5-{kind}-0000{part}-of-00003.gguf": size
    for kind, size in {"UD-Q2_K_XL": 40, "Q8_0": 120, "BF16": 220}.items()
    for part in (1, 2, 3)
} | {"imatrix_unsloth.gguf_file": 1, "mmproj-BF16.gguf": 2}


def choose(n_bytes: dict[str, int], asked: str | None = None) -> GgufChoice:
    found = choose_gguf("acme/m", n_bytes, asked)
    assert found is not None
    return found


def test_no_more_than_8_bits_are_taken_where_there_are_8() -> None:
    assert choose(USUAL).kind == "Q8_0"
    assert choose(USUAL | {"m.BF16.gguf": 93, "m.F32.gguf": 186}).kind == "Q8_0"
    assert choose({"m-f16.gguf": 93, "m-f32.gguf": 186, "m-Q6_K.gguf": 38}).kind == "f16"


def test_the_most_bits_are_taken_where_all_have_fewer() -> None:
    assert choose(APUS).names == ("APUS-xDAN-4.0-MOE-0402.IQ3_XXS.gguf",)
    alike = {"m.Q4_K_S.gguf": 25, "m.Q4_K_M.gguf": 26, "m.IQ4_XS.gguf": 24, "m.Q3_K_L.gguf": 27}
    assert choose(alike).kind == "Q4_K_M"


def test_what_is_taken_is_said_with_the_reason_and_the_others() -> None:
    assert choose(APUS).why == "the most bits of IQ3_XXS, Q2_K"
    assert re.fullmatch(r"the shortest of 8 bits or more, .* of Q2_K, .*, Q8_0", choose(USUAL).why)
    assert choose({"model.gguf": 5}).why == "the only one"


def test_all_parts_are_taken_in_order_wherever_they_lie() -> None:
    names = [f"Q8_0/GLM-4.5-Q8_0-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert choose(FOLDERS) == GgufChoice(kind="Q8_0", names=tuple(names), why=choose(FOLDERS).why)


@pytest.mark.parametrize("asked", ["UD-Q2_K_XL", "ud-q2_k_xl"])
def test_the_kind_after_the_colon_is_taken(asked: str) -> None:
    assert choose(FOLDERS, asked).names[0] == "UD-Q2_K_XL/GLM-4.5-UD-Q2_K_XL-00001-of-00003.gguf"
    assert choose(FOLDERS, asked).why == "as asked"


def test_a_kind_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UnknownModelError, match=r"no GGUF file of kind 'Q4_K_M', but BF16, Q8_0,"):
        choose(FOLDERS, "Q4_K_M")
    with pytest.raises(
        UnknownModelError, match=r"kind 'Q8_0', but none at all\. Leave out the colon"
    ):
        choose({"model.safetensors": 5}, "Q8_0")


def test_parts_that_are_missing_are_named() -> None:
    incomplete = {name: size for name, size in FOLDERS.items() if "Q8_0-00002" not in name}
    with pytest.raises(CheckpointError, match=r"Q8_0/GLM-4\.5-Q8_0 has 2 of 3 parts, part 2 is"):
        choose(incomplete)


def test_parts_that_are_missing_of_one_kind_leave_the_others_to_choose() -> None:
    incomplete = {name: size for name, size in FOLDERS.items() if "Q8_0-00002" not in name}
    assert choose(incomplete, "BF16").names == choose(FOLDERS, "BF16").names
    with pytest.raises(CheckpointError, match=r"part 2 is .* or one of BF16, UD-Q2_K_XL after the"):
        choose(incomplete, "Q8_0")
    only = {name: size for name, size in incomplete.items() if "Q8_0" in name}
    with pytest.raises(CheckpointError, match=r"incomplete; name another repository\.$"):
        choose(only)


def test_more_parts_than_there_are_to_be_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"GLM-4\.5-Q8_0 has 4 of 3 parts\. The upload"):
        choose(FOLDERS | {"Q8_0/GLM-4.5-Q8_0-00004-of-00003.gguf": 120})


@pytest.mark.parametrize(
    ("name", "is_model"),
    [
        ("Flora-7B-Q4_K_M", True),
        ("Exploranium-Q8_0", True),
        ("lora-Q8_0", False),
        ("Llama-3-8B-LoRA.F16", False),
        ("Llama-3-8B-lora", False),
    ],
)
def test_adapters_are_told_from_models_that_have_the_letters_in_their_names(
    name: str, is_model: bool
) -> None:
    assert (choose_gguf("acme/m", {f"{name}.gguf": 5}, None) is not None) is is_model


def test_a_folder_may_have_the_kind_alone() -> None:
    named = {
        f"{kind}/m-0000{part}-of-00002.gguf": 5 for kind in ("Q4_K_M", "Q8_0") for part in (1, 2)
    }
    assert choose(named).kind == "Q8_0"
    assert choose(named, "Q4_K_M").names == (
        "Q4_K_M/m-00001-of-00002.gguf",
        "Q4_K_M/m-00002-of-00002.gguf",
    )


def test_no_kind_is_advised_that_cannot_be_told_apart() -> None:
    files = {
        "m-Q8_0-00001-of-00002.gguf": 9,
        "m-Q4_K_M.gguf": 5,
        "n-Q4_K_M.gguf": 5,
        "m-Q2_K.gguf": 3,
    }
    with pytest.raises(CheckpointError, match=r"or one of Q2_K after the colon"):
        choose(files)


def test_several_models_of_one_kind_are_not_guessed_among() -> None:
    two = {"small.Q8_0.gguf": 5, "large.Q8_0.gguf": 50}
    with pytest.raises(CheckpointError, match=r"large\.Q8_0\.gguf and small\.Q8_0\.gguf cannot be"):
        choose(two)
    with pytest.raises(CheckpointError, match="cannot be told apart"):
        choose({"a.gguf": 5, "b.gguf": 50})


def test_a_repository_without_such_files_has_none() -> None:
    assert choose_gguf("acme/m", {"model.safetensors": 5, "mmproj-model-f16.gguf": 5}, None) is None

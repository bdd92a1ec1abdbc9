"""Do models that come quantized compute what others compute with the same weights?"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from packed_models import write_bitsandbytes, write_fp8, write_mxfp4, write_words
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, TinyModel, decoder_over, in_chunks, reference, reference_logits

from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.decoder.weights import CheckpointTensors
from lowmoe.experts.source import CheckpointExperts
from lowmoe.families import read_config
from lowmoe.spec import Piece
from tests.checkpoint.tiny_mixtral import Options, contents, convert

KEPT = Path(__file__).parent.parent / "data" / "gptqmodel"  # see make.py there
KINDS = sorted(path.name for path in KEPT.iterdir() if path.is_dir())
WRITERS = {"fp8": write_fp8, "mxfp4": write_mxfp4, "words": write_words}
# As for all families: rounding of float32 over a few layers of logits of about 5.
TOLERANCE = 1e-4
IDS = torch.randint(0, VOCABULARY, (24,), generator=torch.Generator().manual_seed(3))


def our_logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    with decoder_over(folder) as decoder:
        return in_chunks(decoder, ids, [5, 24])


# Against transformers


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_logits_of_packed_weights_are_transformers(tmp_path: Path, kind: str) -> None:
    """transformers reads these files itself, and unpacks them where there is no GPU."""
    WRITERS[kind](tmp_path)
    wanted = reference_logits(reference(tmp_path).float(), IDS)
    torch.testing.assert_close(our_logits(tmp_path), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["minimax", "mixtral", "qwen2", "qwen3_next"])
@pytest.mark.parametrize(
    "how",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_logits_of_bitsandbytes_weights_are_transformers(
    tmp_path: Path, family: str, how: dict[str, Any]
) -> None:
    wanted = reference_logits(write_bitsandbytes(tmp_path, family, **how), IDS)
    torch.testing.assert_close(our_logits(tmp_path), wanted, rtol=0, atol=TOLERANCE)


# Against gptqmodel


def whole(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight as it would lie in a file of its own."""
    if len(shape) == 3:
        return torch.stack([some(checkpoint, name, shape, i, 1)[0] for i in range(shape[0])])
    return some(checkpoint, name, shape, 0, shape[0])


def some(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], first: int, count: int
) -> torch.Tensor:
    wanted = (count, *shape[1:]) if len(shape) < 3 else shape[1:]
    piece = Piece(
        name=name,
        shape=shape,
        first=first,
        count=count,
        transposed=False,
        rows=slice(0, wanted[0], 1),
        wanted=wanted,
        pairs=None,
    )
    return checkpoint.read_piece(piece).view(count, *shape[1:])


def whole_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight by the name and in the shape in which the model wants it."""
    checkpoint = Checkpoint(folder)
    family = read_config(checkpoint.config)
    pieces = [family.piece(role) for role in family.shapes]
    return {p.name: whole(checkpoint, p.name, p.shape) for p in pieces}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_gptqmodels_bit_for_bit(kind: str) -> None:
    wanted = json.loads((KEPT / kind / "codes.json").read_text())
    for name, weight in whole_weights(KEPT / kind).items():
        found = xxhash.xxh3_64_hexdigest(weight.float().numpy().tobytes())
        assert found == wanted[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_gptqmodels_files_are_transformers(kind: str) -> None:
    kept = load_file(KEPT / kind / "logits.safetensors")
    found = our_logits(KEPT / kind, kept["ids"])
    torch.testing.assert_close(found, kept["logits"], rtol=0, atol=TOLERANCE)


# Paged


OF_GPTQMODEL_7 = {
    "block_sparse_moe": "mlp",
    ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
}


def test_a_mixtral_of_the_names_of_gptqmodel_7_is_read(tmp_path: Path) -> None:
    """Source: gptqmodel 7.7.0, models/definitions/mixtral.py: the first of each pair of names."""
    TinyModel(config={}).save(tmp_path, "mixtral")
    wanted = our_logits(tmp_path)

    def renamed(name: str) -> str:
        for theirs, new in OF_GPTQMODEL_7.items():
            name = name.replace(theirs, new)
        return name

    path = tmp_path / "model.safetensors"
    save_file({renamed(n): t for n, t in load_file(path).items()}, path)
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in load_file(path)
    assert torch.equal(our_logits(tmp_path), wanted)


def test_an_expert_takes_as_many_bytes_of_the_disk_as_it_is_stored_in() -> None:
    checkpoint = Checkpoint(KEPT / "gptq-4bit-reordered")
    source = CheckpointExperts(checkpoint, read_config(checkpoint.config), torch.float32)
    buffers = [torch.empty(n, dtype=torch.uint8) for n in source.buffer_bytes]
    weights = load_file(KEPT / "gptq-4bit-reordered" / "model.safetensors")
    of_expert = [t.nbytes for n, t in weights.items() if ".experts.2." in n]
    assert source.read(0, 2, buffers) == sum(of_expert)


# Into a model folder


@pytest.fixture(params=[*WRITERS, *KINDS])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param in KINDS:
        return KEPT / str(request.param)
    WRITERS[request.param](tmp_path / "packed")
    return tmp_path / "packed"


def test_a_folder_of_packed_weights_is_that_of_their_numbers(packed: Path, tmp_path: Path) -> None:
    """Byte by byte: calibration and planes see the same float32."""
    plain = tmp_path / "plain"
    plain.mkdir()
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    weights = {n: t.contiguous() for n, t in whole_weights(packed).items()}
    save_file(weights, plain / "model.safetensors")
    found, wanted = tmp_path / "of packed", tmp_path / "of plain"
    convert(packed, found, Options(lengths=(12, 5)))
    convert(plain, wanted, Options(lengths=(12, 5)))
    planes = {n: b for n, b in contents(wanted).items() if n.endswith(".safetensors")}
    assert planes
    assert planes == {n: b for n, b in contents(found).items() if n.endswith(".safetensors")}


def test_no_tensor_of_these_checkpoints_is_left_over(packed: Path) -> None:
    checkpoint = Checkpoint(packed)
    family = read_config(checkpoint.config)
    CheckpointTensors(checkpoint, family)
    names = {n for role in family.shapes for n in checkpoint.stored(family.tensor_name(role))}
    assert names == checkpoint.names()

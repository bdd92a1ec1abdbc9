"""Is every damage to a finished folder an error, before a wrong byte is used?"""

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.manifest import Span, content_hash, read_manifest
from lowmoe.errors import FolderError

PLANE_0 = "experts-plane0-00001.safetensors"
PLANE_1 = "experts-plane1-00001.safetensors"


def read(folder: ModelFolder, name: str, span: Span) -> bytes:
    """One span, an expert's as the store reads it."""
    if not span.place.file.startswith("experts-"):
        return folder.read(name).numpy().tobytes()
    buffer = torch.frombuffer(mmap.mmap(-1, span.place.n_bytes), dtype=torch.uint8)
    _, layer_id, _, expert_id, part = name.split(".")
    folder.read_expert(int(layer_id), int(expert_id), [part], [buffer])
    return buffer.numpy().tobytes()


def read_all(model: Path) -> dict[str, bytes]:
    with ModelFolder(model) as folder:
        spans = {n: read(folder, n, span) for n, span in folder.manifest.spans.items()}
        return spans | {n: folder.small_file(n) or b"" for n in folder.manifest.small_files}


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def positions(span: Span) -> Iterator[int]:
    """First and last byte of a span, and some between: codes, scales, padding."""
    for part in range(9):
        yield span.place.offset + (span.place.n_bytes - 1) * part // 8


def rewrite_manifest(model: Path, **changes: Any) -> None:
    """Change the manifest as an editor would that knows its checksum."""
    values = {**json.loads((model / "manifest.json").read_bytes()), **changes}
    del values["checksum"]
    text = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    values["checksum"] = content_hash(text)
    (model / "manifest.json").write_text(json.dumps(values))


# One bit


def test_a_flipped_bit_in_any_span_is_found_when_it_is_read(model: Path) -> None:
    spans = read_manifest(model).spans
    for name, span in spans.items():
        for number, position in enumerate(positions(span)):
            flip(model / span.place.file, position, number % 8)
            with (
                ModelFolder(model) as folder,
                pytest.raises(FolderError, match=rf"{span.place.file}: {name} has hash [0-9a-f]+,"),
            ):
                read(folder, name, span)
            flip(model / span.place.file, position, number % 8)
    assert len(spans) > 30
    read_all(model)  # and none is left


def test_every_byte_behind_a_header_belongs_to_a_span(model: Path) -> None:
    manifest = read_manifest(model)
    for path in model.glob("*.safetensors"):
        places = [s.place for s in manifest.spans.values() if s.place.file == path.name]
        position = min(place.offset for place in places)
        for place in sorted(places, key=lambda place: place.offset):
            assert place.offset == position
            position += place.n_bytes
        assert position == path.stat().st_size


def test_a_flipped_bit_in_a_header_reaches_nobody(model: Path) -> None:
    """Headers are for other readers: the places of all that is read are in the manifest."""
    wanted, spans = read_all(model), read_manifest(model).spans.values()
    for path in model.glob("*.safetensors"):
        end = min(s.place.offset for s in spans if s.place.file == path.name)
        for position in (0, 9, end - 1):
            flip(path, position)
    assert read_all(model) == wanted


def test_a_flipped_bit_in_a_small_file_is_found_when_it_is_read(model: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        for position in (0, (model / name).stat().st_size - 1):
            flip(model / name, position)
            with (
                ModelFolder(model) as folder,
                pytest.raises(FolderError, match=rf"{re.escape(name)} has hash [0-9a-f]+, but"),
            ):
                folder.small_file(name)
            flip(model / name, position)


def test_a_flipped_bit_in_the_manifest_is_found_or_means_the_same(model: Path) -> None:
    wanted, path = read_manifest(model), model / "manifest.json"
    n_found, tried = 0, range(0, path.stat().st_size, 5)
    for position in tried:
        flip(path, position, position % 8)
        try:
            # 1e-05 may become 1E-05.
            assert read_manifest(model) == wanted
        except FolderError:
            n_found += 1
        flip(path, position, position % 8)
    assert n_found >= len(tried) - 2


# Whole files


@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_a_file_cut_short_is_refused_at_once(
    model: Path, converted: dict[str, bytes], part: float
) -> None:
    for name, data in converted.items():
        length = int((len(data) - 1) * part)
        (model / name).write_bytes(data[:length])
        wanted = f"{re.escape(name)}: {length} bytes, but the manifest needs {len(data)}"
        if name == "manifest.json":
            wanted = r"manifest\.json: not JSON"
        # Without its last byte, a line feed, the manifest still says all it said.
        if name != "manifest.json" or part < 1:
            with pytest.raises(FolderError, match=wanted):
                ModelFolder(model)
        (model / name).write_bytes(data)
    ModelFolder(model)


def test_a_file_that_is_missing_is_named_at_once(model: Path, converted: dict[str, bytes]) -> None:
    for name, data in converted.items():
        (model / name).unlink()
        wanted = f"{re.escape(name)}: missing, but the manifest lists it"
        if name == "manifest.json":
            wanted = r"has no manifest\.json, so it is no finished model folder"
        with pytest.raises(FolderError, match=wanted):
            ModelFolder(model)
        (model / name).write_bytes(data)


def test_experts_that_were_swapped_are_told_apart(model: Path) -> None:
    spans = read_manifest(model).spans
    names = ("layers.0.experts.1.plane0", "layers.1.experts.2.plane0")
    places = [spans[name].place for name in names]
    with (model / PLANE_0).open("r+b") as file:
        bytes_of = []
        for place in places:
            file.seek(place.offset)
            bytes_of.append(file.read(place.n_bytes))
        for place, data in zip(places, reversed(bytes_of), strict=True):
            file.seek(place.offset)
            file.write(data)
    with ModelFolder(model) as folder:
        for name, other in (names, names[::-1]):
            with pytest.raises(FolderError, match=f"{PLANE_0}: {name} holds the bytes of {other}"):
                read(folder, name, spans[name])


def test_files_that_were_swapped_are_told_apart(model: Path, converted: dict[str, bytes]) -> None:
    (model / PLANE_0).write_bytes(converted[PLANE_1])
    (model / PLANE_1).write_bytes(converted[PLANE_0])
    name = "layers.1.experts.3.plane0"
    with (
        ModelFolder(model) as folder,
        pytest.raises(FolderError, match=f"{name} holds the bytes of layers.1.experts.3.plane1"),
    ):
        read(folder, name, folder.manifest.spans[name])


def test_a_file_of_another_kind_in_its_place_is_refused(
    model: Path, converted: dict[str, bytes]
) -> None:
    (model / "dense.safetensors").write_bytes(converted[PLANE_0])
    with (
        ModelFolder(model) as folder,
        pytest.raises(FolderError, match=r"embedding\.plane0 has hash"),
    ):
        folder.read("embedding.plane0")


def test_a_part_that_is_not_there_is_named(model: Path) -> None:
    buffer = torch.zeros(8192, dtype=torch.uint8)
    with (
        ModelFolder(model) as folder,
        pytest.raises(FolderError, match=r"has no layers\.0\.experts\.0\.plane2"),
    ):
        folder.read_expert(0, 0, ["plane2"], [buffer])


# The manifest


def test_a_newer_format_says_what_to_do(model: Path) -> None:
    rewrite_manifest(model, version=2)
    with pytest.raises(
        FolderError, match=r"format version 2, but this lowmoe reads version 1.*pip"
    ):
        ModelFolder(model)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null and void"])
def test_a_manifest_that_is_no_json_is_refused(model: Path, text: bytes) -> None:
    (model / "manifest.json").write_bytes(text)
    with pytest.raises(FolderError, match=r"manifest\.json: not JSON"):
        ModelFolder(model)


@pytest.mark.parametrize("text", ["[]", "5", '{"kind": "other"}', "{}"])
def test_json_that_is_no_manifest_is_refused(model: Path, text: str) -> None:
    (model / "manifest.json").write_text(text)
    with pytest.raises(FolderError, match=r"not the manifest of a lowmoe model folder"):
        ModelFolder(model)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"hidden_size": 64', b'"hidden_size": 65'),
        (b'"expert_planes": 2', b'"expert_planes": 1'),
        (b'"n_tokens": 48', b'"n_tokens": 49'),
        (b'"name": "tiny"', b'"name": "tinY"'),
        (b'"checksum": "', b'"checksum": "0'),
    ],
)
def test_an_edited_value_is_refused(model: Path, old: bytes, new: bytes) -> None:
    path = model / "manifest.json"
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(FolderError, match=r"manifest\.json: its checksum does not match"):
        ModelFolder(model)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"spans": {"head.d": ["../secret", 0, 8, "00"]}}, "'../secret' is not a plain file name"),
        ({"small_files": {"/etc/passwd": {"n_bytes": 1, "hash": ""}}}, "'/etc/passwd' is not a pl"),
        ({"spans": {"head.d": ["dense.safetensors", -8, 8, "00"]}}, "head.d is 8 bytes at -8"),
        ({"spans": {"head.d": ["dense.safetensors", 0, "8", "00"]}}, "head.d is '8' bytes at 0"),
        ({"spans": {"head.d": ["dense.safetensors", 0]}}, "not enough values"),
        ({"spans": [["dense.safetensors", 0, 8, "00"]]}, "no attribute"),
        ({"small_files": 5}, "iterable"),
        ({"recipe": {}}, "code"),
        ({"recipe": None}, "NoneType"),
        ({"calibration": {"n_tokens": 1}}, "text_hash"),
        ({"source": {"name": "x", "commit": None, "branch": "y"}}, "branch"),
    ],
)
def test_a_forged_manifest_is_refused(model: Path, changes: dict[str, Any], what: str) -> None:
    rewrite_manifest(model, **changes)
    with pytest.raises(FolderError, match=rf"manifest\.json: a field is missing or malf.*{what}"):
        ModelFolder(model)


def test_a_config_of_any_text_survives(model: Path) -> None:
    odd = {"model_type": "mixtral", "name": "Ω \ud800 \x00", "limit": float("inf")}
    rewrite_manifest(model, config=odd)
    assert read_manifest(model).config == odd
    (model / "manifest.json").write_bytes(read_manifest(model).to_json())
    assert read_manifest(model).config == odd

"""Do we and the safetensors library read each other's files, and neither of us hostile ones?"""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import Recipe
from lowmoe.checkpoint.safetensors_file import (
    DTYPES,
    MAX_HEADER_BYTES,
    SafetensorsFile,
    build_header,
)
from lowmoe.errors import CheckpointError, LowMoeError
from tests.checkpoint.tiny_mixtral import Options, config_with, convert, write_tiny_mixtral


def container(header: object, data: bytes = b"") -> bytes:
    """A file with this header, JSON or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_all(path: Path) -> dict[str, Tensor]:
    file = SafetensorsFile.open(path)
    return {name: file.read(name) for name in file.tensors}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


# Each other's files

ODD = config_with(
    hidden_size=65, head_dim=6, intermediate_size=33, num_attention_heads=2, vocab_size=19
)


@pytest.mark.parametrize("format", ["trellis", "nf4", "bf16", "fp32"])
@pytest.mark.parametrize("config", [config_with(), ODD], ids=["even", "odd"])
def test_the_library_reads_what_we_write(
    tmp_path: Path, config: dict[str, Any], format: str
) -> None:
    write_tiny_mixtral(tmp_path / "checkpoint", config)
    convert(tmp_path / "checkpoint", tmp_path / "model", Options(recipe=Recipe(format=format)))
    with ModelFolder(tmp_path / "model") as folder:
        spans = folder.manifest.spans
        for file in {span.place.file for span in spans.values()}:
            found = load_file(tmp_path / "model" / file)
            assert set(found) == {n for n, span in spans.items() if span.place.file == file}
            for name, tensor in found.items():
                assert raw(tensor) == raw(folder.read(name)), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_we_read_what_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"of shape {shape}": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for shape in [(3, 5), (7,), (2, 1, 2, 2), (), (0,), (4, 0, 3)]
    }
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    found = read_all(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, wanted in tensors.items():
        assert found[name].dtype == dtype
        assert raw(found[name]) == raw(wanted), name


def test_an_empty_tensor_may_stand_before_or_behind_its_neighbour(tmp_path: Path) -> None:
    header = {
        "a": entry("U8", [2], 0, 2),
        "empty": entry("F32", [0, 9], 0, 0),
        "last": entry("F32", [0], 2, 2),
    }
    (tmp_path / "file").write_bytes(container(header, b"xy"))
    assert load_file(tmp_path / "file").keys() == header.keys()  # the library thinks so too
    assert {n: list(t.shape) for n, t in read_all(tmp_path / "file").items()} == {
        "a": [2], "empty": [0, 9], "last": [0],
    }  # fmt: skip


def test_a_dtype_that_is_not_implemented_spoils_only_its_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(3, dtype=torch.bool)}, tmp_path / "file")
    file = SafetensorsFile.open(tmp_path / "file")
    assert file.read("a").tolist() == [1, 1, 1]
    with pytest.raises(
        CheckpointError, match=r"b has dtype BOOL, but BF16, F16, F32, U8, .* are imple"
    ):
        file.read("b")


def test_data_begins_where_it_should(tmp_path: Path) -> None:
    tensors = {"a": (torch.uint8, (4096,)), "b": (torch.float32, (3, 5))}
    header, entries = build_header(tensors, alignment=4096)
    assert len(header) == 4096
    assert [(e.offset, e.n_bytes) for e in entries.values()] == [(4096, 4096), (8192, 60)]
    (tmp_path / "file").write_bytes(header + bytes(4096 + 60))
    assert SafetensorsFile.open(tmp_path / "file").tensors == entries


# Hostile files

HOSTILE = {
    "nothing": (b"", "0 bytes, too short"),
    "seven bytes": (b"1234567", "7 bytes, too short"),
    "longer than the file": (b"\xff" * 8 + b"{}", "claims 18446744073709551615 bytes"),
    "one byte longer": ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes, but the file holds 2"),
    "no header": (container(b""), "not JSON"),
    "not JSON": (container(b"{]"), "not JSON"),
    "not UTF-8": (container(b'{"\xff": 1}'), "not JSON"),
    "nested": (container(b"[" * 200_000), "nested too deeply"),
    "nested tables": (container(b'{"a":' * 100_000), "nested too deeply"),
    "a list": (container([]), "not a table"),
    "a number": (container(7), "not a table"),
    "a text entry": (container({"a": "F32"}), "entry for a is malformed"),
    "a list entry": (container({"a": [1, 2]}), "entry for a is malformed"),
    "null": (container({"a": None}), "entry for a is malformed"),
    "no dtype": (container({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x"), "entry for a is"),
    "no shape": (container({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "entry for a is"),
    "no offsets": (container({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "entry for a is malform"),
    "one offset": (
        container({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x"),
        "entry for a is malformed",
    ),
    "text offsets": (container({"a": entry("U8", [1], "0", "1")}, b"x"), "entry for a is malf"),
    "float offsets": (container({"a": entry("U8", [1], 0.0, 1.0)}, b"x"), "entry for a is malf"),
    "true offsets": (container({"a": entry("U8", [1], False, True)}, b"x"), "entry for a is malf"),
    "negative offset": (container({"a": entry("U8", [1], -1, 0)}, b"x"), "entry for a is malf"),
    "negative shape": (container({"a": entry("U8", [-1, -1], 0, 1)}, b"x"), "entry for a is malf"),
    "text shape": (container({"a": entry("U8", "1", 0, 1)}, b"x"), "entry for a is malformed"),
    "number shape": (container({"a": entry("U8", 1, 0, 1)}, b"x"), "entry for a is malformed"),
    "null dtype": (container({"a": entry(None, [1], 0, 1)}, b"x"), "entry for a is"),  # type: ignore[arg-type]
    "dtype of another size": (container({"a": entry("F32", [1], 0, 1)}, b"x"), r"a is F32 \[1\]"),
    "larger shape": (container({"a": entry("U8", [2], 0, 1)}, b"x"), r"a is U8 \[2\], but"),
    "huge shape": (container({"a": entry("U8", [2**40], 0, 1)}, b"x"), "the header gives it 1 byt"),
    "huge number": (container({"a": entry("U8", [2**80], 0, 1)}, b"x"), "entry for a is malformed"),
    "overflow": (container({"a": entry("U8", [2**32, 2**32, 0], 0, 0)}), "more than any file can"),
    "a million dimensions": (
        container({"a": entry("U8", [2**50] * 1_000_000, 0, 1)}, b"x"),
        "entry for a is malformed",
    ),
    "behind the end": (container({"a": entry("U8", [9], 0, 9)}, b"x"), r"describes \d+ bytes, but"),
    "backwards": (container({"a": entry("I16", [1], 1, 0)}, b"x"), "begins at byte"),
    "overlap": (
        container({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xyz"),
        r"b begins at byte \d+, but the one before it ends at",
    ),
    "the same bytes twice": (
        container({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"xy"),
        r"b begins at byte \d+, but the one before it ends at",
    ),
    "hole": (
        container({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xyz"),
        r"b begins at byte \d+, but the one before it ends at",
    ),
    "hole at the start": (container({"a": entry("U8", [1], 1, 2)}, b"xy"), "a begins at byte"),
    "bytes nobody owns": (container({"a": entry("U8", [1], 0, 1)}, b"xy"), r"but the file holds"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_no_time(tmp_path: Path, name: str) -> None:
    data, wanted = HOSTILE[name]
    (tmp_path / "file").write_bytes(data)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"/file: .*{wanted}"):
        SafetensorsFile.open(tmp_path / "file")
    # The longest header here, 17 MB of shape, takes .1 s to parse; all others some ms.
    assert time.process_time() - start < 1
    with pytest.raises(safetensors.SafetensorError):  # the library agrees
        load_file(tmp_path / "file")


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """The format forbids it; the library lets the last one win."""
    a = json.dumps(entry("U8", [1], 0, 1))
    (tmp_path / "file").write_bytes(container(f'{{"a":{a},"a":{a}}}'.encode(), b"x"))
    with pytest.raises(CheckpointError, match=r"/file: the header is not JSON \('a' comes twice\)"):
        SafetensorsFile.open(tmp_path / "file")


def test_a_header_longer_than_the_librarys_limit_is_refused_unread(tmp_path: Path) -> None:
    length = MAX_HEADER_BYTES + 1
    with (tmp_path / "file").open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)  # a hole: takes no disk
    with pytest.raises(CheckpointError, match=f"the header claims {length} bytes"):
        SafetensorsFile.open(tmp_path / "file")


# Arbitrary files

VALID = save(
    {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(3).bfloat16()},
    metadata={"format": "pt"},
)
# Strategies of hypothesis: what a header may hold.
SMALL = st.integers(-3, 12)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F16", "I64", "F8_E4M3", "", "f32"]),
        "shape": st.lists(SMALL | st.integers(), max_size=4),
        "data_offsets": st.lists(SMALL, min_size=1, max_size=3),
    }
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
HEADERS = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON, max_size=4)


def reads_or_refuses(data: bytes, path: Path) -> bool:
    """Whether we take such a file; anything but an error of ours passes through."""
    path.write_bytes(data)
    try:
        read_all(path)
    except LowMoeError:
        return False
    return True


@settings(max_examples=150, deadline=1000)
@given(data=st.binary(max_size=200) | HEADERS.map(lambda h: container(h, bytes(8))))
def test_arbitrary_files_are_read_or_refused(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reads_or_refuses(data, tmp_path_factory.getbasetemp() / "arbitrary")


@settings(max_examples=250, deadline=1000)
@given(
    position=st.integers(0, len(VALID) - 1),
    removed=st.integers(0, 3),
    inserted=st.binary(max_size=3) | st.sampled_from([b"9", b"-", b'"', b"0", b"[", b"e9", b","]),
)
def test_no_damaged_file_is_read_that_the_library_refuses(
    position: int, removed: int, inserted: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    if reads_or_refuses(VALID[:position] + inserted + VALID[position + removed :], path):
        for name, tensor in load_file(path).items():
            assert raw(tensor) == raw(SafetensorsFile.open(path).read(name))

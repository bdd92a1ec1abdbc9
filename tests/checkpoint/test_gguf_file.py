"""Do we read what the gguf package writes, in every type, and refuse what is damaged?"""

import random
import struct
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from lowmoe.checkpoint import gguf_file
from lowmoe.checkpoint.gguf_file import GgufFiles
from lowmoe.checkpoint.gguf_header import MAX_NAME_BYTES, GgufHeader, Strings, read_header
from lowmoe.errors import CheckpointError, LowMoeError, UnsupportedModelError

Type = gguf.GGMLQuantizationType
ROWS, COLUMNS = 6, 512
# The package knows how long a block of these is, not what is in it.
LOCKED = {Type.Q8_1, Type.Q8_K, Type.Q1_0}
INTEGERS = {Type.I8, Type.I16, Type.I32, Type.I64, Type.F64}
READ = [t for t in Type if t not in LOCKED | INTEGERS]


def blocks(type: Type, *shape: int) -> np.ndarray[Any, Any]:
    """Random bytes as blocks of a type; scales are kept from infinity."""
    size = gguf.quant_shape_to_byte_shape(shape, type)
    random_bytes = np.random.default_rng(3).integers(0, 256, size, np.uint8)
    return random_bytes & 0x7B if type in (Type.F16, Type.F32, Type.BF16) else random_bytes


def write(path: Path, tensors: dict[str, tuple[np.ndarray[Any, Any], Type]], **how: Any) -> Path:
    writer = gguf.GGUFWriter(path, "test", **how)
    for name, (data, type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- each other's files


@pytest.mark.parametrize("type", READ, ids=lambda t: t.name)
def test_numbers_of_every_type_are_the_gguf_packages(tmp_path: Path, type: Type) -> None:
    data = blocks(type, ROWS, COLUMNS)
    files = GgufFiles.open(write(tmp_path / "x.gguf", {"a": (data, type)}))
    with np.errstate(all="ignore"):
        wanted = torch.from_numpy(np.array(gguf.dequantize(data, type), np.float32))
    found = files.read_rows("a", (ROWS, COLUMNS), 0, ROWS)
    assert torch.equal(found.float().nan_to_num(), wanted.nan_to_num())
    rows = files.read_rows("a", (ROWS, COLUMNS), 2, 3)
    assert torch.equal(rows.float().nan_to_num(), wanted[2:5].nan_to_num())


@pytest.mark.parametrize("type", [Type.Q4_K, Type.Q8_0, Type.F16], ids=lambda t: t.name)
def test_one_expert_of_many_is_read_alone(tmp_path: Path, type: Type) -> None:
    data = blocks(type, 5, ROWS, COLUMNS)
    files = GgufFiles.open(write(tmp_path / "x.gguf", {"a": (data, type)}))
    with np.errstate(all="ignore"):
        wanted = torch.from_numpy(np.array(gguf.dequantize(data[3:4], type), np.float32))
    found = files.read_rows("a", (5, ROWS, COLUMNS), 3, 1)
    assert torch.equal(found.float().nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("type", [Type.Q4_K, Type.Q8_0], ids=lambda t: t.name)
def test_reading_many_rows_takes_little_more_than_their_numbers(
    tmp_path: Path, type: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, rows, columns = 2**14, 1000, 1024
    monkeypatch.setattr(gguf_file, "_WEIGHTS_AT_ONCE", at_once)
    data = blocks(type, rows, columns)
    files = GgufFiles.open(write(tmp_path / "x.gguf", {"a": (data, type)}))
    with np.errstate(all="ignore"):
        wanted = torch.from_numpy(gguf.dequantize(data, type))
    tracemalloc.start()
    try:
        found = files.read_rows("a", (rows, columns), 0, rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Of the rows at once their blocks, at most 4 bytes a weight, and their numbers twice; what
    # Of the rows at once their blocks, their numbers twice, and what making those of 16 rows takes.
    assert peak < 4 * rows * columns + 8 * 4 * at_once
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


def test_a_part_of_a_quantized_vector_is_read(tmp_path: Path) -> None:
    data = blocks(Type.Q8_0, 1, 96)[0]
    files = GgufFiles.open(write(tmp_path / "x.gguf", {"a": (data, Type.Q8_0)}))
    with np.errstate(all="ignore"):
        wanted = torch.from_numpy(gguf.dequantize(data, Type.Q8_0))
    assert torch.equal(files.read_rows("a", (96,), 10, 50), wanted[10:60])


@pytest.mark.parametrize("type", sorted(LOCKED | INTEGERS), ids=lambda t: t.name)
def test_a_type_that_nobody_can_read_is_refused_by_name(tmp_path: Path, type: Type) -> None:
    data = blocks(type, ROWS, COLUMNS)
    files = GgufFiles.open(write(tmp_path / "x.gguf", {"a": (data, type)}))
    with pytest.raises(UnsupportedModelError, match=f"a has type {type.name}, which cannot"):
        files.read_rows("a", (ROWS, COLUMNS), 0, ROWS)


def test_values_of_all_types_are_those_written(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "test")
    numbers = {"uint8": 200, "int8": -5, "uint16": 60_000, "int16": -300, "uint32": 2**31}
    numbers |= {"int32": -(2**30), "uint64": 2**63, "int64": -(2**62), "bool": True}
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float32("float32", 1e-5)
    writer.add_float64("float64", 1e-300)
    writer.add_string("string", "Grüße")
    writer.add_array("words", ["a", "", "▁the", "🦙"])
    writer.add_array("ints", [3, -4, 5])
    writer.add_array("floats", [0.5, -0.25])
    writer.add_array("bools", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    values = dict(read_header(tmp_path / "x.gguf").values)
    assert {key: values[key] for key in numbers} == numbers
    assert type(values["bool"]) is bool
    # Of float32, the shortest number that it can be.
    assert (values["float32"], values["float64"], values["string"]) == (1e-5, 1e-300, "Grüße")
    words = values["words"]
    assert isinstance(words, Strings)
    assert list(words) == words[:] == ["a", "", "▁the", "🦙"]
    assert words[-1] == "🦙"
    with pytest.raises(IndexError):
        words[4]
    arrays = [np.asarray(values[key]).tolist() for key in ("ints", "floats", "bools")]
    assert arrays == [[3, -4, 5], [0.5, -0.25], [True, False]]


def test_bytes_that_are_no_utf8_are_shown_as_such(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header(value("words", 9, array(8, [text(b"\xff\xfe")]))))
    words = read_header(path).values["words"]
    assert isinstance(words, Strings)
    assert list(words) == ["\ufffd\ufffd"]


# --- split over files


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    tensors = {name: (np.full((4, 8), i, np.float32), Type.F32) for i, name in enumerate("abcde")}
    write(tmp_path / "model.gguf", tensors, split_max_tensors=2)
    return sorted(tmp_path.glob("model-*"))


def test_tensors_of_all_parts_are_found(parts: list[Path]) -> None:
    files = GgufFiles.open(parts[0])
    assert len(parts) == 3
    for i, name in enumerate("abcde"):
        assert torch.equal(files.read_rows(name, (4, 8), 0, 4), torch.full((4, 8), float(i)))


def test_another_part_than_the_first_names_the_first(parts: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=r"part 2 of 3\. .*model-00001-of-00003\.gguf"):
        GgufFiles.open(parts[1])


def test_a_part_that_is_missing_is_named(parts: list[Path]) -> None:
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.gguf: missing"):
        GgufFiles.open(parts[0])


def test_parts_that_changed_places_are_noticed(parts: list[Path], tmp_path: Path) -> None:
    parts[1].rename(tmp_path / "aside")
    parts[2].rename(parts[1])
    (tmp_path / "aside").rename(parts[2])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.gguf: split\.no is 2, .* 1\."):
        GgufFiles.open(parts[0])


def test_a_part_under_the_name_of_a_whole_is_noticed(parts: list[Path], tmp_path: Path) -> None:
    parts[0].rename(tmp_path / "whole.gguf")
    with pytest.raises(CheckpointError, match=r"split\.count is 3, but its name makes that 1"):
        GgufFiles.open(tmp_path / "whole.gguf")


def test_the_same_tensor_twice_is_noticed(parts: list[Path], tmp_path: Path) -> None:
    data = parts[1].read_bytes()
    parts[1].write_bytes(data.replace(text(b"c"), text(b"a")))
    with pytest.raises(CheckpointError, match=r"holds a, but so does model-00001"):
        GgufFiles.open(parts[0])


def test_a_part_with_too_few_tensors_is_noticed(parts: list[Path], tmp_path: Path) -> None:
    data = parts[0].read_bytes()
    key = text(b"split.tensors.count") + struct.pack("<I", 5)
    at = data.index(key) + len(key)
    parts[0].write_bytes(data[:at] + struct.pack("<i", 6) + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"promises 6 tensors, but the files hold 5"):
        GgufFiles.open(parts[0])


# --- attacks


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def value(key: str, kind: int, data: bytes) -> bytes:
    return text(key.encode()) + struct.pack("<I", kind) + data


def array(kind: int, entries: list[bytes], count: int | None = None) -> bytes:
    n = len(entries) if count is None else count
    return struct.pack("<IQ", kind, n) + b"".join(entries)


def tensor(
    name: bytes = b"a", dims: tuple[int, ...] = (8, 4), kind: int = 0, offset: int = 0
) -> bytes:
    sizes = b"".join(struct.pack("<Q", d) for d in dims)
    return text(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def header(
    *values: bytes,
    tensors: tuple[bytes, ...] = (),
    version: int = 3,
    n_values: int | None = None,
    n_tensors: int | None = None,
    data: int = 0,
) -> bytes:
    counts = (
        len(tensors) if n_tensors is None else n_tensors,
        len(values) if n_values is None else n_values,
    )
    whole = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join((*values, *tensors))
    return whole + bytes(-len(whole) % 32) + bytes(data)


HUGE = 2**63
ATTACKS = {
    "empty": b"",
    "magic alone": b"GGUF",
    "another magic": b"GGML" + header()[4:],
    "safetensors": struct.pack("<Q", 2) + b"{}",
    "version 1": header(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "values that are not there": header(n_values=HUGE),
    "tensors that are not there": header(n_tensors=HUGE),
    "a key as long as memory": header(struct.pack("<Q", HUGE) + b"abc", n_values=1),
    "a key that is no text": header(value("k", 4, bytes(4)).replace(b"k", b"\xff")),
    "the same key twice": header(*[value("k", 4, bytes(4))] * 2),
    "a value as long as memory": header(value("k", 8, struct.pack("<Q", HUGE))),
    "a value of an unknown type": header(value("k", 13, bytes(8))),
    "words as many as memory": header(value("k", 9, array(8, [], HUGE))),
    "numbers as many as memory": header(value("k", 9, array(10, [], 2**61))),
    "arrays in arrays": header(value("k", 9, array(9, [array(4, [bytes(4)])]))),
    "neither true nor false": header(value("k", 7, b"\x02")),
    "neither, among many": header(value("k", 9, array(7, [b"\x01", b"\x02"]))),
    "alignment of 0": header(value("general.alignment", 4, bytes(4))),
    "alignment of 12": header(value("general.alignment", 4, struct.pack("<I", 12))),
    "alignment of 2**31": header(value("general.alignment", 4, struct.pack("<I", 2**31))),
    "alignment of a word": header(value("general.alignment", 8, text(b"32"))),
    "no dimensions": header(tensors=(tensor(dims=()),)),
    "five dimensions": header(tensors=(tensor(dims=(2,) * 5),), data=128),
    "a dimension of 0": header(tensors=(tensor(dims=(8, 0)),), data=128),
    "a dimension of 2**63": header(tensors=(tensor(dims=(HUGE, 4)),), data=128),
    "sizes that overflow": header(tensors=(tensor(dims=(2**32, 2**32)),), data=128),
    "half a block": header(tensors=(tensor(dims=(48, 4), kind=2),), data=256),
    "a name that is too long": header(tensors=(tensor(b"a" * (MAX_NAME_BYTES + 1)),), data=128),
    "a name that is no text": header(tensors=(tensor(b"\xff"),), data=128),
    "the same tensor twice": header(tensors=(tensor(), tensor(offset=128)), data=256),
    "more than the file": header(tensors=(tensor(),), data=127),
    "behind the file": header(tensors=(tensor(offset=2**62),), data=128),
    "between alignments": header(tensors=(tensor(offset=8),), data=256),
    "tensors for each of which there is a byte": header(n_tensors=2**18 + 1, data=2**23 + 64),
    "values for each of which there is a byte": header(n_values=2**16 + 1, data=2**20),
    "a list of how many parts": header(value("split.count", 9, array(4, [bytes(4)] * 2))),
    "a list of how many tensors": header(value("split.tensors.count", 9, array(4, [bytes(4)] * 2))),
    "one over the other": header(tensors=(tensor(), tensor(b"b", offset=96)), data=256),
}


@pytest.mark.parametrize("data", ATTACKS.values(), ids=list(ATTACKS))
def test_a_hostile_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.gguf: "):
        GgufFiles.open(path)


def test_the_attacks_fail_by_what_they_change(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(
        header(value("general.alignment", 4, struct.pack("<I", 64)), tensors=(tensor(),))[:-32]
    )
    sound = header(
        value("general.alignment", 4, struct.pack("<I", 32)),
        value("k", 9, array(7, [b"\x01", b"\x00"])),
        tensors=(tensor(b"a" * MAX_NAME_BYTES), tensor(b"b", offset=128)),
        data=256,
    )
    path.write_bytes(sound)
    assert len(GgufFiles.open(path).part_of) == 2


def test_a_tensor_of_a_type_yet_to_come_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header(tensors=(tensor(kind=250),), data=128))
    with pytest.raises(UnsupportedModelError, match="a has type 250, which this version"):
        GgufFiles.open(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"a": (np.zeros((4, 8), np.float32), Type.F32)})
    files = GgufFiles.open(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 64)
    with pytest.raises(LowMoeError, match="cut short"):
        files.read_rows("a", (4, 8), 0, 4)


# --- fuzz


def seed_file(path: Path) -> bytes:
    """A small file with something of everything."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "▁d"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_array("flags", [True, False])
    for name, type in (("a", Type.Q4_0), ("b", Type.F32), ("c", Type.Q8_0)):
        writer.add_tensor(name, blocks(type, 2, 32), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]


def mutated(data: bytes, choose: random.Random) -> bytes:
    """One to four bytes, words or lengths changed, or a part cut out."""
    found = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(len(found))
        kind = choose.randrange(5)
        if kind == 0:
            found[at] = choose.randrange(256)
        elif kind == 1:
            found[at] = choose.choice(INTERESTING)
        elif kind == 2:
            found[at] ^= 1 << choose.randrange(8)
        elif kind == 3:
            wide = choose.choice((4, 8))
            number = choose.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)))
            found[at : at + wide] = (number % 2 ** (8 * wide)).to_bytes(wide, "little")
        else:
            del found[at : at + choose.randint(1, 16)]
    return bytes(found)


def read_everything(path: Path) -> GgufHeader:
    files = GgufFiles.open(path)
    for name, shape in files.shapes().items():
        files.read_rows(name, shape, 0, shape[0])
    for found in files.values.values():
        if isinstance(found, Strings):
            for _ in found:  # each is decoded when it is asked for
                pass
    return files.parts[0].header


# 15 s on one core of an idle machine; watching memory costs twenty times as much.
N_MUTATIONS = 200_000
WATCHED_EVERY = 100
# What Python itself keeps of a file this small: names, tables, one block of 64 KiB.
OVERHEAD = 2**18


def try_to_read(path: Path) -> str:
    """What came of it; anything but an error of ours is a crash."""
    try:
        read_everything(path)
    except LowMoeError as e:
        return str(e)
    return "read"


def peak_bytes(path: Path) -> int:
    """The most memory that reading took at once, all of Python's and numpy's."""
    tracemalloc.start()
    try:
        try_to_read(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_mutation_crashes_hangs_or_takes_memory_the_file_does_not_have(tmp_path: Path) -> None:
    path, choose, outcomes = tmp_path / "x.gguf", random.Random(5), Counter[str]()
    data = seed_file(path)
    read_everything(path)
    with path.open("r+b") as file:
        for number in range(N_MUTATIONS):
            # Not a new file each time: some file systems put those on the disk at once.
            file.seek(0)
            file.write(mutated(data, choose))
            file.truncate()
            file.flush()
            outcome = try_to_read(path)
            assert "\n" not in outcome
            outcomes[outcome.split(":")[0]] += 1
            if number % WATCHED_EVERY == 0:
                assert peak_bytes(path) < 2 * len(data) + OVERHEAD
    # Both happen often, so that both are tested.
    assert N_MUTATIONS / 10 < outcomes["read"] < N_MUTATIONS * 9 / 10, outcomes


def test_what_a_header_holds_takes_at_most_twice_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    words = array(8, [text(b"ab")] * 20_000)
    found = header(value("words", 9, words), value("n", 9, array(0, [b"\x01"] * 10**5)))
    path.write_bytes(found)
    assert peak_bytes(path) < 2 * len(found) + OVERHEAD

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import quant.layout
from quant.layout import REGION_ALIGNMENT, PlaneLayout, round_up
from quant.trellis import TrellisCode, table_values

HEADER = Path(quant.layout.__file__).with_name("layout.h")
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

SHAPES = [(1, 1), (64, 64), (65, 63), (128, 192), (200, 130), (2816, 2048), (14336, 4096)]

# Prints the constants and, for each shape on the command line, its layout's numbers. Then reads a
# table and a plane's codes from standard input and writes the table value of every weight.
PROBE = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "layout.h"

using namespace lowmoe::layout;

static size_t number(const char* text) { return std::strtoull(text, nullptr, 10); }

static void print_numbers(int argc, char** argv) {
  std::printf("%d %d %d %d %d %d %d %d %d %d %d %d\n", kBlockRows, kBlockColumns, kSliceColumns,
              kSlices, kWords, kWordWeights, kSymbolBits, kScaleLevels, kRegionAlignment,
              kMaxPlanes, kBlockCodeBytes, kBlockScaleBytes);
  for (int a = 1; a + 1 < argc; a += 2) {
    const PlaneLayout plane{number(argv[a]), number(argv[a + 1])};
    std::printf("%zu %zu %zu %zu %zu %zu %zu\n", plane.row_blocks(), plane.column_blocks(),
                plane.code_bytes(), plane.group_scale_offset(), plane.row_scale_offset(),
                plane.gain_offset(), plane.plane_bytes());
  }
}

static int decode(int window_bits, PlaneLayout plane) {
  std::vector<int8_t> table(size_t{1} << window_bits);
  std::vector<uint64_t> words(plane.code_bytes() / 8);
  if (std::fread(table.data(), 1, table.size(), stdin) != table.size()) return 1;
  if (std::fread(words.data(), 8, words.size(), stdin) != words.size()) return 1;
  const size_t columns = plane.column_blocks() * kBlockColumns;
  std::vector<int8_t> values(plane.row_blocks() * kBlockRows * columns);
  const uint64_t* word = words.data();
  for (size_t r = 0; r < plane.row_blocks(); r++)
    for (size_t c = 0; c < plane.column_blocks(); c++)
      for (int s = 0; s < kSlices; s++)
        for (int w = 0; w < kWords; w++, word++)
          for (int i = 0; i < kWordWeights; i++) {
            const size_t row = r * kBlockRows + word_row(w, i);
            const size_t column = c * kBlockColumns + s * kSliceColumns + word_column(i);
            values[row * columns + column] = table[window(*word, i, window_bits)];
          }
  return std::fwrite(values.data(), 1, values.size(), stdout) == values.size() ? 0 : 1;
}

int main(int argc, char** argv) {
  const int window_bits = std::atoi(argv[1]);
  if (window_bits > 0) return decode(window_bits, {number(argv[2]), number(argv[3])});
  print_numbers(argc - 1, argv + 1);
  return 0;
}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(PROBE)
    strict = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{HEADER.parent}"]
    command = [str(COMPILER), *strict, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    subprocess.run(command, check=True, timeout=120)
    return folder / "probe"


def header_constants() -> dict[str, int]:
    """The k... constants of layout.h by their name in layout.py; needs no compiler."""
    constants: dict[str, int] = {}
    for name, value in re.findall(r"inline constexpr int k(\w+) = (.+);", HEADER.read_text()):
        spelled = re.sub(r"k([A-Z]\w*)", lambda m: python_name(m[1]), value).replace("/", "//")
        constants[python_name(name)] = eval(spelled, {"__builtins__": {}}, dict(constants))
    return constants


def python_name(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()


def python_constants() -> dict[str, int]:
    return {name: value for name, value in vars(quant.layout).items() if name.isupper()}


def test_layout_h_and_layout_py_have_the_same_constants() -> None:
    assert header_constants() == python_constants()


@needs_compiler
def test_a_compiler_sees_the_same_constants_and_the_same_offsets(probe: Path) -> None:
    sizes = [str(size) for shape in SHAPES for size in shape]
    printed = subprocess.run([probe, "0", *sizes], check=True, capture_output=True, text=True)
    constants, *layouts = ([int(n) for n in line.split()] for line in printed.stdout.splitlines())
    assert constants == list(python_constants().values())
    for shape, numbers in zip(SHAPES, layouts, strict=True):
        layout = PlaneLayout(*shape)
        assert numbers == [
            layout.row_blocks,
            layout.column_blocks,
            layout.code_bytes,
            layout.group_scale_offset,
            layout.row_scale_offset,
            layout.gain_offset,
            layout.plane_bytes,
        ]


@needs_compiler
@pytest.mark.parametrize("window_bits", [4, 5, 6, 7, 10])
@pytest.mark.parametrize("shape", [(64, 64), (130, 200)])
def test_words_decode_alike_in_cpp_and_in_python(
    probe: Path, window_bits: int, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(window_bits)
    table = torch.randint(-63, 64, (2**window_bits,), generator=generator)
    code = TrellisCode(window_bits=window_bits, table=tuple(table.tolist()))
    layout = PlaneLayout(*shape)
    plane = torch.randint(0, 256, (layout.plane_bytes,), generator=generator, dtype=torch.uint8)
    sent = bytes(table.to(torch.int8).numpy()) + bytes(plane[: layout.code_bytes].numpy())
    command = [str(probe), str(window_bits), *map(str, shape)]
    values = subprocess.run(command, input=sent, check=True, capture_output=True).stdout
    assert values == bytes(table_values(plane, layout, code).contiguous().numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_regions_follow_each_other_aligned_and_without_overlap(shape: tuple[int, int]) -> None:
    layout = PlaneLayout(*shape)
    assert layout.padded_rows - shape[0] in range(64)
    assert layout.padded_columns - shape[1] in range(64)
    assert layout.code_bytes == layout.padded_rows * layout.padded_columns // 4  # 2 bits
    assert layout.group_scale_offset >= layout.code_bytes
    assert layout.row_scale_offset >= layout.group_scale_offset + layout.group_scale_bytes
    assert layout.gain_offset == layout.row_scale_offset + 2 * layout.padded_rows
    assert layout.plane_bytes == layout.gain_offset + REGION_ALIGNMENT
    for offset in (layout.group_scale_offset, layout.row_scale_offset, layout.gain_offset):
        assert offset % REGION_ALIGNMENT == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_regions_of_row_blocks_are_all_but_the_gain_and_paddings(shape: tuple[int, int]) -> None:
    layout = PlaneLayout(*shape)
    taken = [range(offset, offset + size) for offset, size in layout.regions()]
    assert [r.start for r in taken] == [0, layout.group_scale_offset, layout.row_scale_offset]
    assert all(len(r) % layout.row_blocks == 0 for r in taken)
    ends = [*(r.start for r in taken[1:]), layout.gain_offset]
    assert all(end - r.stop in range(REGION_ALIGNMENT) for r, end in zip(taken, ends, strict=True))


@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (2048, 1536)])
def test_a_plane_takes_the_bits_its_drawing_adds_up_to(shape: tuple[int, int]) -> None:
    # 2 bits of code, 4 bits of scale for 64 weights, 16 bits of scale for a row, 64 bytes for the
    # gain: 2.064 to 2.073.
    n_out, n_in = shape
    bits = PlaneLayout(n_out, n_in).plane_bytes * 8 / (n_out * n_in)
    assert bits == pytest.approx(2 + 4 / 64 + 16 / n_in + 512 / (n_out * n_in), rel=1e-12)
    assert bits < 2.08


@pytest.mark.parametrize(("count", "rounded"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_rounding_up_never_rounds_a_multiple(count: int, rounded: int) -> None:
    assert round_up(count, 64) == rounded

// The trellis kernels as tests and benchmarks call them: all blocks of a matrix, one thread.
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "lowmoe/kernels/cpu/bindings.h"

namespace lowmoe {

namespace {

using Plane = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Outputs = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& otherwise) {
  if (!holds) throw nb::value_error(otherwise.c_str());
}

void require_shape(const char* name, size_t rows, size_t columns, size_t n_rows, size_t n_columns) {
  const auto text = [](size_t a, size_t b) {
    return std::string("[") + std::to_string(a) + ", " + std::to_string(b) + "]";
  };
  require(rows == n_rows && columns == n_columns, std::string(name) + " is " + text(rows, columns) +
                                                      ", but must be " + text(n_rows, n_columns));
}

// A matrix in Python's arrays, which must outlive it.
struct Matrix {
  Code code;
  TrellisMatrix w;

  Matrix(const std::vector<Plane>& planes, size_t n_out, size_t n_in, const Plane& table,
         float scale_unit)
      : code{{}, scale_unit}, w{{n_out, n_in}, &code, {}, static_cast<int>(planes.size())} {
    require(n_out > 0 && n_in > 0, "a matrix has rows and columns");
    require(1 <= planes.size() && planes.size() <= layout::kMaxPlanes,
            std::to_string(planes.size()) + " planes, but a stack has 1 to 3");
    require(table.size() == kTableSize,
            "the table has " + std::to_string(table.size()) + " values, but must have 64");
    std::memcpy(code.table, table.data(), kTableSize);
    for (size_t p = 0; p < planes.size(); p++) {
      require(planes[p].size() == w.shape.plane_bytes(),
              "a plane has " + std::to_string(planes[p].size()) + " bytes, but must have " +
                  std::to_string(w.shape.plane_bytes()));
      require(reinterpret_cast<uintptr_t>(planes[p].data()) % layout::kRegionAlignment == 0,
              "a plane must be aligned to 64 bytes");
      w.planes[p] = planes[p].data();
    }
  }
  Matrix(const Matrix&) = delete;
};

// Tokens in Python's arrays, which must outlive them, and the sums of their codes.
struct Tokens {
  std::vector<int32_t> sums;
  RoundedTokens x;

  Tokens(const Codes& codes, const Scales& scales, size_t n_in) {
    const size_t n_tokens = codes.shape(0), n_columns = padded_columns(n_in);
    require_shape("codes", codes.shape(0), codes.shape(1), n_tokens, n_columns);
    require_shape("scales", scales.shape(0), scales.shape(1), n_tokens, scale_groups(n_in));
    sums.resize(n_tokens * n_columns / layout::kBlockColumns);
    const int8_t* code = codes.data();
    for (int32_t& sum : sums) {
      for (int i = 0; i < layout::kBlockColumns; i++) sum += *code++;
    }
    // Kernels read tokens only; the type is shared with those that write them.
    x = {const_cast<int8_t*>(codes.data()), const_cast<float*>(scales.data()), sums.data(), n_in};
  }
};

struct alignas(layout::kRegionAlignment) Scratch {
  uint8_t bytes[kTileScratchBytes];
};

// work(matrix, row block, tokens) for each of the row blocks that y has room for, from first_block.
template <class Work>
void each_block(const std::vector<Plane>& planes, size_t n_out, size_t n_in, const Plane& table,
                float scale_unit, const Codes& codes, const Scales& scales, size_t first_block,
                const Outputs& y, Work work) {
  const Matrix matrix(planes, n_out, n_in, table, scale_unit);
  const Tokens tokens(codes, scales, n_in);
  const size_t n_blocks = y.shape(1) / layout::kBlockRows;
  require_shape("y", y.shape(0), y.shape(1), codes.shape(0), n_blocks * layout::kBlockRows);
  const size_t all_blocks = matrix.w.shape.row_blocks();
  require(n_blocks <= all_blocks && first_block <= all_blocks - n_blocks,
          "y has rows up to " + std::to_string((first_block + n_blocks) * layout::kBlockRows) +
              ", but the matrix " + std::to_string(all_blocks * layout::kBlockRows));
  nb::gil_scoped_release release;
  for (size_t b = 0; b < n_blocks; b++) {
    work(matrix.w, first_block + b, tokens.x, y.data() + b * layout::kBlockRows);
  }
}

void dot_blocks(const char* isa, const std::vector<Plane>& planes, size_t n_out, size_t n_in,
                const Plane& table, float scale_unit, const Codes& codes, const Scales& scales,
                size_t first_block, const Outputs& y) {
  const auto dot_block = isa_named(isa).trellis->dot_block;
  each_block(planes, n_out, n_in, table, scale_unit, codes, scales, first_block, y,
             [&](const TrellisMatrix& w, size_t block, const RoundedTokens& x, float* to) {
               for (size_t t = 0; t < y.shape(0); t++) {
                 dot_block(w, block, x.from(t), to + t * y.shape(1));
               }
             });
}

void multiply_blocks(const char* isa, const std::vector<Plane>& planes, size_t n_out, size_t n_in,
                     const Plane& table, float scale_unit, const Codes& codes, const Scales& scales,
                     size_t first_block, const Outputs& y) {
  const auto multiply_block = isa_named(isa).trellis->multiply_block;
  Scratch scratch;
  each_block(planes, n_out, n_in, table, scale_unit, codes, scales, first_block, y,
             [&](const TrellisMatrix& w, size_t block, const RoundedTokens& x, float* to) {
               multiply_block(w, block, x, y.shape(0), to, y.shape(1), scratch.bytes);
             });
}

}  // namespace

void bind_trellis(nb::module_& m) {
  const char* meaning =
      "y [T, rows] = the rows from 64 * first_block on, times tokens of codes [T, padded columns] "
      "and scales [T, scale groups]. planes: [plane_bytes] each, aligned to 64 bytes; table: 64 "
      "values + 64. Raises ValueError where sizes or alignments do not fit.";
  const auto define = [&](const char* name, auto function) {
    m.def(name, function, nb::kw_only(), nb::arg("isa"), nb::arg("planes"), nb::arg("n_out"),
          nb::arg("n_in"), nb::arg("table"), nb::arg("scale_unit"), nb::arg("codes"),
          nb::arg("scales"), nb::arg("first_block"), nb::arg("y"), meaning);
  };
  define("dot_blocks", dot_blocks);
  define("multiply_blocks", multiply_blocks);
}

}  // namespace lowmoe

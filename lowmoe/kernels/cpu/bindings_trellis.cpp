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
using Sums = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
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

RoundedTokens tokens_of(const Codes& codes, const Scales& scales, const Sums& sums, size_t n_in) {
  const size_t n_tokens = codes.shape(0), n_columns = padded_columns(n_in);
  require_shape("codes", codes.shape(0), codes.shape(1), n_tokens, n_columns);
  require_shape("scales", scales.shape(0), scales.shape(1), n_tokens, scale_groups(n_in));
  require_shape("sums", sums.shape(0), sums.shape(1), n_tokens, n_columns / layout::kBlockColumns);
  // Kernels read tokens only; the type is shared with those that write them.
  return {const_cast<int8_t*>(codes.data()), const_cast<float*>(scales.data()),
          const_cast<int32_t*>(sums.data()), n_in};
}

// What is done with one row block, for all tokens.
using BlockKernel = void (*)(const TrellisKernels& kernels, const TrellisMatrix& w,
                             size_t row_block, const RoundedTokens& x, size_t n_tokens, float* y,
                             size_t y_stride);

void dot_block(const TrellisKernels& kernels, const TrellisMatrix& w, size_t row_block,
               const RoundedTokens& x, size_t n_tokens, float* y, size_t y_stride) {
  for (size_t t = 0; t < n_tokens; t++) {
    kernels.dot_block(w, row_block, x.from(t), y + t * y_stride);
  }
}

void multiply_block(const TrellisKernels& kernels, const TrellisMatrix& w, size_t row_block,
                    const RoundedTokens& x, size_t n_tokens, float* y, size_t y_stride) {
  alignas(layout::kRegionAlignment) uint8_t scratch[kTileScratchBytes];
  kernels.multiply_block(w, row_block, x, n_tokens, y, y_stride, scratch);
}

// For each of the row blocks that y has room for, from first_block on.
void each_block(BlockKernel kernel, const TrellisKernels& kernels, const TrellisMatrix& w,
                const RoundedTokens& x, size_t first_block, const Outputs& y) {
  const size_t n_tokens = y.shape(0), n_blocks = y.shape(1) / layout::kBlockRows;
  const size_t all_blocks = w.shape.row_blocks();
  require(n_blocks <= all_blocks && first_block <= all_blocks - n_blocks,
          "y has rows up to " + std::to_string((first_block + n_blocks) * layout::kBlockRows) +
              ", but the matrix " + std::to_string(all_blocks * layout::kBlockRows));
  nb::gil_scoped_release release;
  for (size_t b = 0; b < n_blocks; b++) {
    kernel(kernels, w, first_block + b, x, n_tokens, y.data() + b * layout::kBlockRows, y.shape(1));
  }
}

void define(nb::module_& m, const char* name, BlockKernel kernel) {
  using nb::arg;
  m.def(
      name,
      [kernel](const char* isa, const std::vector<Plane>& planes, size_t n_out, size_t n_in,
               const Plane& table, float scale_unit, const Codes& codes, const Scales& scales,
               const Sums& sums, size_t first_block, const Outputs& y) {
        const Matrix matrix(planes, n_out, n_in, table, scale_unit);
        const RoundedTokens x = tokens_of(codes, scales, sums, n_in);
        const size_t n_rows = y.shape(1) / layout::kBlockRows * layout::kBlockRows;
        require_shape("y", y.shape(0), y.shape(1), codes.shape(0), n_rows);
        each_block(kernel, *isa_named(isa).trellis, matrix.w, x, first_block, y);
      },
      nb::kw_only(), arg("isa"), arg("planes"), arg("n_out"), arg("n_in"), arg("table"),
      arg("scale_unit"), arg("codes"), arg("scales"), arg("sums"), arg("first_block"), arg("y"),
      "y [T, rows] = the rows from 64 * first_block on, times tokens of codes "
      "[T, padded columns], scales [T, scale groups] and sums of codes [T, column blocks]. "
      "planes: [plane_bytes] each, aligned to 64 bytes; table: 64 values + 64. "
      "Raises ValueError where sizes or alignments do not fit.");
}

}  // namespace

void bind_trellis(nb::module_& m) {
  define(m, "dot_blocks", dot_block);
  define(m, "multiply_blocks", multiply_block);
}

}  // namespace lowmoe

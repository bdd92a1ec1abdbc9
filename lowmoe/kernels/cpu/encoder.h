// Chooses the codes of trellis planes: what quant/encode.py does, a row block at a time.
//
// Every instruction set gives the same bytes: the search is in integers (encoder_search.h), and
// what is in float32 multiplies and adds in one order, never fused. Nothing here allocates; any
// thread may call, with a scratch of its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowmoe/kernels/cpu/matrix.h"

namespace lowmoe {

// The largest Hadamard block.
inline constexpr int kMostBlockColumns = 128;

// A matrix to be coded, and where its planes go.
//   weights   [n_out][n_in]       W
//   d         [n_in]              the input transform: what is coded is W / d H
//   h                             columns of a Hadamard block: a power of two that divides n_in
//   table     value of each window, -63 to 63; a narrower code's repeated
//   unit      the weight that 1 in the table stands for where the scale is 1
//   metric    [n_in / h][h][h]    covariance of the inputs in the basis of the codes; null: white
//   factors   [n_in / h][h][h]    how errors are fed back, see quant/encode.py; null where metric
//   is own_share                     of a depth's own error in what is fed back, the rest is the
//   stack's planes    plane_bytes each    all of it zero before products  [row blocks][1 +
//   n_planes]   for the gains, sums over the rows of a block: the energy
//                                 of the exact output, then its product with each depth's coded one
struct EncoderTask {
  layout::PlaneLayout shape;
  const float* weights;
  const float* d;
  size_t h;
  int8_t table[kTableSize];
  float unit;
  int n_planes;
  const float* metric;
  const float* factors;
  float own_share;
  uint8_t* planes[layout::kMaxPlanes];
  double* products;

  size_t columns() const { return shape.column_blocks() * layout::kBlockColumns; }
  size_t groups() const { return shape.column_blocks(); }
};

// kTooLarge: for scales in float16.
enum class Coded : int { kFine = 0, kNotFinite = 1, kTooLarge = 2 };

struct EncoderKernels {
  // What encode_block needs of scratch, in bytes.
  size_t (*scratch_bytes)(const EncoderTask& task);

  // Codes 64 rows. Unless they are kFine, their planes and products hold nothing of use.
  //   scratch  scratch_bytes, aligned to 64
  Coded (*encode_block)(const EncoderTask& task, size_t row_block, uint8_t* scratch);
};

struct Isa;

// Codes a whole matrix on n_threads threads of its own; the planes are the same for any number.
// Returns the outcome of the first row block that is not kFine.  Throws std::bad_alloc.
Coded encode_matrix(const Isa& isa, const EncoderTask& task, int n_threads);

}  // namespace lowmoe

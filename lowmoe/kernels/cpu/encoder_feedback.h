// Error feedback: quant/encode.py's _Stack.with_feedback and the gains' sums, for one row block.
//
// Slices of a Hadamard block follow each other, since each hears the errors of those before it;
// lanes are filled by searching the same slice of neighbouring Hadamard blocks at once.
#pragma once

#include <algorithm>
#include <cstring>

#include "lowmoe/kernels/cpu/encoder.h"
#include "lowmoe/kernels/cpu/encoder_fit.h"
#include "lowmoe/kernels/cpu/encoder_search.h"

namespace lowmoe {

// For each row the energy of the exact output, then its product with the output of every depth.
struct Products {
  double sum[1 + layout::kMaxPlanes][64] = {};
};

template <class V>
class Feedback {
  using Column = float[64];
  static constexpr int kSlices = Search<V>::kSlices;

  // Of one Hadamard block, all [columns][64 rows].
  struct Block {
    Column wrong[layout::kMaxPlanes][kMostBlockColumns];  // errors of each depth of the stack
    Column felt[layout::kMaxPlanes][kMostBlockColumns];   // what of them a depth makes up for
    Column coded[4], wanted[4];                           // of the slice at work
    BlockScales scales[layout::kMaxPlanes][kMostBlockColumns / layout::kBlockColumns];
  };

 public:
  static constexpr size_t kScratchBytes = kSlices * sizeof(Block);

  // fits: of every plane, as chosen without feedback.  scratch: kScratchBytes, aligned to 64.
  Feedback(const EncoderTask& task, size_t row_block, const FittedScales* fits, uint8_t* scratch,
           Products& products)
      : task_(task),
        row_block_(row_block),
        search_(task.table),
        fits_(fits),
        blocks_(reinterpret_cast<Block*>(scratch)),
        products_(products) {}

  // Chooses the words anew.  target: [columns][64].
  void run(const Column* target) {
    target_ = target;
    std::memset(static_cast<void*>(blocks_), 0, kScratchBytes);  // some lanes may find no block
    const size_t n_blocks = task_.shape.n_in / task_.h;
    for (first_ = 0; first_ < n_blocks; first_ += kSlices) {
      n_ = std::min<size_t>(kSlices, n_blocks - first_);
      for (size_t k = 0; k < n_; k++) find_scales(k);
      for (size_t column = 0; column < task_.h; column += layout::kSliceColumns) slice(column);
      for (size_t k = 0; k < n_; k++) multiply(k);
    }
  }

 private:
  size_t column_of(size_t k) const { return (first_ + k) * task_.h; }
  const Column* target_of(size_t k) const { return target_ + column_of(k); }

  void find_scales(size_t k) {
    const size_t first = column_of(k) / layout::kBlockColumns;
    const size_t last = (column_of(k) + task_.h - 1) / layout::kBlockColumns;
    for (int p = 0; p < task_.n_planes; p++) {
      for (size_t g = first; g <= last; g++) {
        fits_[p].of_group(g, task_.unit, &blocks_[k].scales[p][g - first]);
      }
    }
  }

  const BlockScales& scales_of(size_t k, int p, size_t column) const {
    const size_t first = column_of(k) / layout::kBlockColumns;
    return blocks_[k].scales[p][(column_of(k) + column) / layout::kBlockColumns - first];
  }

  // The four columns from `column` on of each block, through all depths.
  void slice(size_t column) {
    for (size_t k = 0; k < n_; k++) std::memset(blocks_[k].coded, 0, sizeof blocks_[k].coded);
    for (int p = 0; p < task_.n_planes; p++) {
      for (size_t k = 0; k < n_; k++) want(k, p, column);
      choose(p, column);
      for (size_t k = 0; k < n_; k++) notice(k, p, column);
    }
    for (size_t k = 0; k < n_; k++) mix(blocks_[k], column);
  }

  // What this depth aims at: the weights, less what is coded of them, and what it makes up for.
  void want(size_t k, int p, size_t column) {
    Block& block = blocks_[k];
    const float* factors = task_.factors + (first_ + k) * task_.h * task_.h + column;
    transform(factors, block.felt[p], column, block.wanted);
    for (int c = 0; c < 4; c++) {
      const float* aim = target_of(k)[column + c];
      for (int r = 0; r < 64; r++) {
        block.wanted[c][r] = aim[r] + block.wanted[c][r] - block.coded[c][r];
      }
    }
  }

  void choose(int p, size_t column) {
    typename Search<V>::Aim aim;
    float* coded[kSlices];
    for (size_t k = 0; k < kSlices; k++) {
      aim.x[k] = blocks_[k].wanted[0];
      aim.scales[k] = &scales_of(k < n_ ? k : 0, p, column);
      coded[k] = blocks_[k].coded[0];
    }
    typename Search<V>::Choice choice;
    search_.closed(aim, &choice);
    store(choice, p, column);
    for (int i = 0; i < kSteps; i++) {
      const int j = i / 4, at = 64 * (i % 4) + 8 * j;
      const auto value = V::to_floats(choice.values[i]);
      const auto part = V::multiply(value, aim.of_row(&BlockScales::scale, j));
      V::put(coded, at, V::add(V::floats(coded, at), part));
    }
  }

  void store(const typename Search<V>::Choice& choice, int p, size_t column) {
    uint8_t* plane = task_.planes[p] + row_block_ * task_.groups() * layout::kBlockCodeBytes;
    uint8_t nowhere[8 * layout::kWords];
    uint8_t* to[kSlices];
    for (size_t k = 0; k < kSlices; k++) {
      const size_t slice = (column_of(k) + column) / layout::kSliceColumns;
      to[k] = k < n_ ? plane + slice * sizeof nowhere : nowhere;
    }
    V::put_words(to, choice.low, choice.high);
  }

  void notice(size_t k, int p, size_t column) {
    for (int c = 0; c < 4; c++) {
      const float* aim = target_of(k)[column + c];
      float* wrong = blocks_[k].wrong[p][column + c];
      for (int r = 0; r < 64; r++) wrong[r] = aim[r] - blocks_[k].coded[c][r];
    }
  }

  // Of what a depth hears, a share is its own error and the rest the whole stack's.
  void mix(Block& block, size_t column) const {
    const float own = task_.own_share, rest = 1 - own;
    const Column* last = block.wrong[task_.n_planes - 1];
    for (int p = 0; p < task_.n_planes; p++) {
      for (size_t c = column; c < column + 4; c++) {
        for (int r = 0; r < 64; r++) {
          block.felt[p][c][r] = block.wrong[p][c][r] * own + last[c][r] * rest;
        }
      }
    }
  }

  // out[c][r] = sum over k < n of  x[k][r] * matrix[k * h + c],  in order of k.
  void transform(const float* matrix, const Column* x, size_t n, Column* out) const {
    constexpr int kParts =
        2;  // vectors of rows at once: sums enough to hide what one addition takes
    for (int r = 0; r < 64; r += kParts * V::kLanes) {
      typename V::F sum[4][kParts];
      for (auto& of_column : sum) {
        for (auto& part : of_column) part = V::all_floats(0);
      }
      for (size_t k = 0; k < n; k++) {
        for (int part = 0; part < kParts; part++) {
          const auto rows = V::floats(x[k] + r + part * V::kLanes);
          for (int c = 0; c < 4; c++) {
            const auto factor = V::all_floats(matrix[k * task_.h + c]);
            sum[c][part] = V::add(sum[c][part], V::multiply(rows, factor));
          }
        }
      }
      for (int c = 0; c < 4; c++) {
        for (int part = 0; part < kParts; part++)
          V::put(out[c] + r + part * V::kLanes, sum[c][part]);
      }
    }
  }

  // Adds a block's share to the products.
  void multiply(size_t k) {
    const size_t h = task_.h;
    const Column* exact = target_of(k);
    Column felt[4];
    for (size_t column = 0; column < h; column += 4) {
      transform(task_.metric + (first_ + k) * h * h + column, exact, h, felt);
      for (size_t c = 0; c < 4; c++) {
        const float* aim = exact[column + c];
        for (int r = 0; r < 64; r++) products_.sum[0][r] += felt[c][r] * aim[r];
        for (int p = 0; p < task_.n_planes; p++) {
          const float* wrong = blocks_[k].wrong[p][column + c];
          for (int r = 0; r < 64; r++) products_.sum[1 + p][r] += felt[c][r] * (aim[r] - wrong[r]);
        }
      }
    }
  }

  const EncoderTask& task_;
  const size_t row_block_;
  const Search<V> search_;
  const FittedScales* fits_;
  Block* blocks_;  // [kSlices]
  Products& products_;
  const Column* target_ = nullptr;
  size_t first_ = 0, n_ = 0;  // the Hadamard blocks at work
};

}  // namespace lowmoe

#include "lowmoe/kernels/cpu/ends.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "lowmoe/kernels/cpu/float16.h"

namespace lowmoe {

namespace {

// Adds one plane of a row: the layout of quant/layout.py, weight by weight.
void add_plane(const TrellisMatrix& w, int plane, size_t row, float* out) {
  const size_t block = row / layout::kBlockRows, r = row % layout::kBlockRows;
  // word_row's inverse: which word of a slice has the row, and its first weight there.
  const size_t word = r / 2 % layout::kWords;
  const int first = static_cast<int>(8 * (r / 16) + 4 * (r % 2));
  uint16_t row_scale;
  std::memcpy(&row_scale, w.row_scales(plane, block) + 2 * r, sizeof row_scale);
  const float unit = from_float16(row_scale) * w.code->scale_unit;
  const uint8_t* codes = w.codes(plane, block);
  const uint8_t* scales = w.group_scales(plane, block);
  for (size_t b = 0; b < w.shape.column_blocks(); b++) {
    const uint8_t pair = scales[b * layout::kBlockScaleBytes + r % 32];
    const float scale = unit * static_cast<float>(r < 32 ? pair & 15 : pair >> 4);
    for (int slice = 0; slice < layout::kSlices; slice++) {
      uint64_t bits;
      std::memcpy(&bits, codes + ((b * layout::kSlices + slice) * layout::kWords + word) * 8, 8);
      for (int i = 0; i < layout::kSliceColumns; i++) {
        const int value = w.code->table[layout::window(bits, first + i, kWindowBits)];
        out[b * layout::kBlockColumns + slice * layout::kSliceColumns + i] +=
            scale * static_cast<float>(value - kTableOffset);
      }
    }
  }
}

// H times each block of x, in place.
void hadamard(float* x, size_t n, size_t block) {
  for (size_t first = 0; first < n; first += block) {
    for (size_t half = 1; half < block; half *= 2) {
      for (size_t i = first; i < first + block; i += 2 * half) {
        for (size_t j = i; j < i + half; j++) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
      }
    }
  }
}

}  // namespace

void restore_row(const Linear& matrix, size_t row, float* scratch, float* out) {
  const TrellisMatrix& w = matrix.w;
  const size_t n_in = w.shape.n_in;
  std::fill_n(scratch, padded_columns(n_in), 0.0f);
  for (int p = 0; p < w.n_planes; p++) add_plane(w, p, row, scratch);
  const size_t block = std::min<size_t>(n_in & (~n_in + 1), 128);
  hadamard(scratch, n_in, block);
  const float scale = w.gain() / std::sqrt(static_cast<float>(block));
  for (size_t k = 0; k < n_in; k++) out[k] = scratch[k] * scale * from_float16(matrix.d[k]);
}

Ends::Ends(Engine& engine, const Linear& embedding, const Norm& final_norm, const Linear& head)
    : engine_(engine),
      embedding_(embedding),
      head_(head),
      final_norm_(final_norm),
      normed_(std::max(engine.max_tokens(), size_t(engine.pool().size())) *
              padded_columns(head.w.shape.n_in)),
      rounded_(engine.max_tokens(), head.w.shape.n_in) {}

void Ends::embed(const int64_t* ids, size_t n, float* x) {
  const size_t n_hidden = embedding_.w.shape.n_in;
  engine_.pool().run([&](Team& team) {
    team.each("embedding", n, [&](size_t t) {
      float* scratch = normed_.data() + team.thread() * padded_columns(n_hidden);
      restore_row(embedding_, ids[t], scratch, x + t * n_hidden);
    });
  });
}

void Ends::logits(const float* x, size_t n, float* scores) {
  engine_.pool().run([&](Team& team) {
    engine_.norm_and_round(team, x, n, final_norm_, head_.d, normed_.data(), rounded_.tokens());
    engine_.multiply(team, "head", head_.w, rounded_.tokens(), n, scores, head_.w.shape.n_out);
  });
}

}  // namespace lowmoe

#include "lowmoe/kernels/cpu/engine.h"

#include <algorithm>

namespace lowmoe {

namespace {

size_t rows_in_block(const TrellisMatrix& w, size_t row_block) {
  return std::min<size_t>(layout::kBlockRows, w.shape.n_out - row_block * layout::kBlockRows);
}

}  // namespace

Engine::Engine(const Isa& isa, Pool& pool, const Code& code, size_t max_tokens)
    : isa_(isa),
      pool_(pool),
      code_(code),
      max_tokens_(max_tokens),
      rows_(pool.size() * max_tokens * kUnitRows),
      tiles_(pool.size() * kTileScratchBytes) {}

void Engine::multiply_block(int thread, const TrellisMatrix& w, size_t row_block,
                            const RoundedTokens& x, size_t n, float* y, size_t stride) const {
  if (n == 1) {
    isa_.trellis->dot_block(w, row_block, x, y);
  } else {
    isa_.trellis->multiply_block(w, row_block, x, n, y, stride, tile_of(thread));
  }
}

void Engine::multiply(Team& team, const char* phase, const TrellisMatrix& w, const RoundedTokens& x,
                      size_t n, float* y, size_t stride) const {
  team.each(phase, w.shape.row_blocks(), [&](size_t block) {
    float* to = y + block * layout::kBlockRows;
    const size_t n_rows = rows_in_block(w, block);
    if (n_rows == layout::kBlockRows) {
      multiply_block(team.thread(), w, block, x, n, to, stride);
      return;
    }
    float* rows = rows_of(team.thread());  // whole blocks are computed; a last one may be cut
    multiply_block(team.thread(), w, block, x, n, rows, layout::kBlockRows);
    for (size_t t = 0; t < n; t++) {
      std::copy_n(rows + t * layout::kBlockRows, n_rows, to + t * stride);
    }
  });
}

void Engine::multiply_add(Team& team, const char* phase, const TrellisMatrix& w,
                          const RoundedTokens& x, size_t n, float* y, size_t stride) const {
  team.each(phase, w.shape.row_blocks(), [&](size_t block) {
    float* rows = rows_of(team.thread());
    multiply_block(team.thread(), w, block, x, n, rows, layout::kBlockRows);
    const size_t n_rows = rows_in_block(w, block);
    for (size_t t = 0; t < n; t++) {
      isa_.vector->add_scaled(rows + t * layout::kBlockRows, 1.0f, n_rows,
                              y + t * stride + block * layout::kBlockRows);
    }
  });
}

void Engine::norm(const Norm& norm, const float* x, size_t n_in, float* y) const {
  const VectorKernels& v = *isa_.vector;
  (norm.centred ? v.layer_norm : v.rms_norm)(x, norm.weight, norm.epsilon, n_in, y);
  if (norm.bias) v.add_scaled(norm.bias, 1.0f, n_in, y);
}

void Engine::norm_and_round(Team& team, const float* x, size_t n, const Norm& norm,
                            const uint16_t* d, float* normed, const RoundedTokens& out) const {
  const size_t n_in = out.n_in;
  team.each("norm", n, [&](size_t t) {
    float* y = normed + t * n_in;
    this->norm(norm, x + t * n_in, n_in, y);
    isa_.vector->round_token(y, d, 0, n_in, out.from(t));
  });
}

void Engine::keep_normed(Team& team, const float* normed, float kept, size_t n, size_t n_hidden,
                         float* x) const {
  if (kept == 0.0f) return;
  team.each("norm", n, [&](size_t t) {
    for (size_t i = t * n_hidden; i < (t + 1) * n_hidden; i++) x[i] = kept * normed[i];
  });
}

void Engine::round(Team& team, const float* x, size_t n, const uint16_t* d,
                   const RoundedTokens& out) const {
  const size_t groups = scale_groups(out.n_in);
  team.each("rounding", n * groups, [&](size_t unit) {
    const size_t t = unit / groups, first = unit % groups * kScaleColumns;
    const size_t count = std::min<size_t>(kScaleColumns, out.n_in - first);
    isa_.vector->round_token(x + t * out.n_in + first, d, first, count, out.from(t));
  });
}

}  // namespace lowmoe

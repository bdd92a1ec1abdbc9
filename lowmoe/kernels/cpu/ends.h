// The two ends of a model: rows of the embedding, and scores of the next token.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowmoe/kernels/cpu/engine.h"

namespace lowmoe {

class Ends {
 public:
  Ends(Engine& engine, const Linear& embedding, const Norm& final_norm, const Linear& head);

  // x [n][n_hidden] = rows of the embedding.  ids [n], each below its n_out.
  void embed(const int64_t* ids, size_t n, float* x);

  // scores [n][n_vocab] = head(norm(x)).  n <= max_tokens.
  void logits(const float* x, size_t n, float* scores);

 private:
  Engine& engine_;
  Linear embedding_, head_;
  Norm final_norm_;
  Buffer<float> normed_;
  RoundedBuffer rounded_;
};

// One row of a matrix in its own basis, W and not W / d H, [n_in] floats.
// Slow and the same everywhere; scratch: padded_columns(n_in) floats.
void restore_row(const Linear& matrix, size_t row, float* scratch, float* out);

}  // namespace lowmoe

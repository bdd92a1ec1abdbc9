// x += lightning_attention(norm(x)), or kept * norm(x) plus it, for one layer whose heads keep a
// state, on all threads.
// Source: arXiv 2401.04658; a token at a time, since a head's state stays in a core's cache.
#pragma once

#include <cstddef>
#include <span>

#include "lowmoe/kernels/cpu/engine.h"

namespace lowmoe {

struct LightningLayer {
  Norm norm;
  Linear qkv;             // rows: all heads of q, then of k, then of v
  Linear gate;            // [q_size, n_hidden], of what heads put out
  Linear out;             // [n_hidden, q_size]
  const float* remains;   // [n_heads], of each head's state with every token
  const float* out_norm;  // [q_size], over what all heads put out
  float out_norm_epsilon;
  float kept;  // x becomes kept * norm(x) before anything is added; 0 if it stays as it is
  size_t n_hidden, n_heads, head_size;

  size_t q_size() const { return n_heads * head_size; }
};

// Where to leave the state after the first `end` tokens of a call.
struct LightningStop {
  size_t end;
  float* maps;  // [n_heads][head_size][head_size]
};

// The operation and its scratch; layers of one model share it, one after the other.
class Lightning {
 public:
  // like: any layer; all must have its sizes.
  Lightning(Engine& engine, const LightningLayer& like);

  // n tokens x [n][n_hidden], n <= max_tokens, after those that made `maps`, which stays as it is.
  // stops: in order, the last of them after n.
  void run(const LightningLayer& layer, const float* maps, std::span<const LightningStop> stops,
           float* x, size_t n);

 private:
  void read(Team& team, const LightningLayer& layer, const float* maps,
            std::span<const LightningStop> stops);

  Engine& engine_;
  Buffer<float> normed_, qkv_, gate_, read_, ones_;
  RoundedBuffer rounded_in_, rounded_out_;
};

}  // namespace lowmoe

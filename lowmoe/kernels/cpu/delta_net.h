// x += delta_net(norm(x)), or kept * norm(x) plus it, for one layer whose heads keep a state, on
// all threads.
// Source: arXiv 2412.06464; a token at a time, since a head's state stays in a core's cache.
#pragma once

#include <cstddef>
#include <span>

#include "lowmoe/kernels/cpu/engine.h"

namespace lowmoe {

struct DeltaLayer {
  Norm norm;
  Linear in;           // rows: queries and keys of all key heads, values and gates of all heads
  Linear out;          // [n_hidden, n_values]
  const float* rates;  // [2 * n_heads][n_hidden]: of corrections, then of decays
  const float* taps;   // [n_taps][n_mixed], the earliest token's first
  const float* decay_bias;  // [n_heads]
  const float* log_decay;   // [n_heads]
  const float* head_norm;   // [value_size]
  float head_norm_epsilon;
  float kept;  // x becomes kept * norm(x) before anything is added; 0 if it stays as it is
  size_t n_hidden, n_key_heads, n_heads, key_size, value_size, n_taps;

  size_t n_keys() const { return n_key_heads * key_size; }
  size_t n_values() const { return n_heads * value_size; }
  size_t n_mixed() const { return 2 * n_keys() + n_values(); }
  size_t n_in() const { return n_mixed() + n_values(); }
  size_t group() const { return n_heads / n_key_heads; }
};

// What is kept of the tokens up to some point.
struct DeltaState {
  float* window;  // [n_taps - 1][n_mixed]: what comes in of the latest tokens, not mixed yet
  float* maps;    // [n_heads][key_size][value_size]
};

// Where to leave the state after the first `end` tokens of a call.
struct DeltaStop {
  size_t end;
  DeltaState state;
};

// The operation and its scratch; layers of one model share it, one after the other.
class DeltaNet {
 public:
  // like: any layer; all must have its sizes.
  DeltaNet(Engine& engine, const DeltaLayer& like);

  // n tokens x [n][n_hidden], n <= max_tokens, after what `before` has, which stays as it is.
  // stops: in order, the last of them after n.
  void run(const DeltaLayer& layer, const DeltaState& before, std::span<const DeltaStop> stops,
           float* x, size_t n);

 private:
  void rate(Team& team, const DeltaLayer& layer, size_t n);
  void mix(Team& team, const DeltaLayer& layer, const float* window, size_t n);
  void mix_channels(const DeltaLayer& layer, const float* window, size_t t, size_t first,
                    size_t count);
  void keep_windows(Team& team, const DeltaLayer& layer, const float* window,
                    std::span<const DeltaStop> stops);
  void read(Team& team, const DeltaLayer& layer, const float* maps,
            std::span<const DeltaStop> stops);
  StateStep step_of(const DeltaLayer& layer, size_t t, size_t head) const;
  void gate(Team& team, const DeltaLayer& layer, size_t n);
  const float* row(const float* window, const DeltaLayer& layer, size_t at) const;

  Engine& engine_;
  Buffer<float> normed_, parts_, mixed_, read_;
  Buffer<float> rates_;  // [n][n_heads][2]: how much is corrected, and what remains of the state
  Buffer<float> ones_;
  RoundedBuffer rounded_in_, rounded_out_;
};

}  // namespace lowmoe

// A layer of routed experts on all threads: norm, route, then gate, up, SiLU, down and the weighted
// sum. Source: Mixtral, arXiv 2401.04088.
//
// Experts come when they are in memory, some at a time: run() takes those at hand, and every output
// is kept apart until add(), so that the order they come in does not change a sum's rounding.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "lowmoe/kernels/cpu/engine.h"
#include "lowmoe/kernels/cpu/router.h"

namespace lowmoe {

// What is between gate and up, and down: curve(gate) * (up + shift), or of an expert without a gate
// curve(up), where curve(x) = x * sigmoid(steepness * (x + cubic * x^3)); gate is kept under limit
// and up within +-limit before.
struct Activation {
  float steepness, cubic, shift, limit;

  bool is_silu() const { return steepness == 1 && cubic == 0 && shift == 0 && std::isinf(limit); }
};

// An expert that every token uses, always in memory.
struct SharedExpert {
  Linear gate_up;       // [2 * n_inner, n_hidden], gate's rows first
  Linear down;          // [n_hidden, n_inner]
  const float* router;  // [n_hidden], of its own weight, a sigmoid; null for a weight of 1

  size_t n_inner() const { return down.w.shape.n_in; }
};

// n_experts may be 0 where the layer has a shared expert; then so is n_active.
struct ExpertsLayer {
  Norm norm;
  Router router;
  const uint16_t* d_in;     // float16 [n_hidden], of gate and up of all experts
  const uint16_t* d_inner;  // float16 [n_experts][n_inner], of each one's down
  size_t n_hidden, n_experts, n_inner;
  Activation activation;
  const float* gate_up_bias;  // [n_experts][2 * n_inner], gate's first, or null
  const float* down_bias;     // [n_experts][n_hidden], or null
  std::optional<SharedExpert> shared;
  std::optional<Norm> out_norm;  // of what is added to x
  float kept;        // x becomes kept * norm(x) before anything is added; 0 if it stays as it is
  bool gated;        // else up is alone, wherever gate and up are named
  bool weigh_input;  // whether weights multiply what experts are given, not what they return

  int n_active() const { return router.n_active; }
  size_t n_halves() const { return gated ? 2 : 1; }
};

// One expert's bytes, a part for each plane, as quant/expert.py draws them: the plane of gate|up,
// whose row blocks alternate, then the plane of down.
struct ExpertParts {
  int64_t expert_id;
  const uint8_t* parts[layout::kMaxPlanes];
  int n_parts;
};

// The operation and its scratch; layers of one model share it, one after the other.
class Experts {
 public:
  // layers: all that it will be run for, of one n_hidden; those with experts have the same sizes.
  Experts(Engine& engine, std::span<const ExpertsLayer> layers);

  // Each token's experts, heaviest first: weights [n][n_active], ids [n][n_active].
  // Keeps the normed tokens x [n][n_hidden] for run().
  void route(const ExpertsLayer& layer, const float* x, size_t n, float* weights, int64_t* ids);

  // Instead of route(), for tokens that were routed and rounded elsewhere, in the basis of d_in:
  // codes [n][padded n_hidden] and scales [n][groups] as quant/activations.py draws them, n at most
  // max_tokens.  Keeps copies for run().
  void take(const ExpertsLayer& layer, const int8_t* codes, const float* scales, size_t n);

  // The same as route() for a layer that is not next, keeping nothing.
  void foresee(const ExpertsLayer& layer, const float* x, size_t n, float* weights, int64_t* ids);

  // The outputs of some experts, each given once, for the tokens that go to them by ids.
  //   weights  [n][n_active], of which a layer that does not weigh its input reads none
  void run(const ExpertsLayer& layer, const int64_t* ids, const float* weights, size_t n,
           const ExpertParts* experts, size_t n_experts);

  // Rows of outputs that may still be taken since route() or take(): an expert's
  // tokens, a row each.
  size_t rows_left(size_t n, int n_active) const { return n * n_active - n_rows_; }

  // x [n][n_hidden] += each token's outputs times weights, in the order they were chosen, and the
  // shared expert's; experts that have not run since route() or take() add nothing.
  void add(const ExpertsLayer& layer, const float* weights, size_t n, float* x);

 private:
  // The tokens of one expert.  first: their place among the rows of `gathered_` and `outputs_`.
  struct Group {
    TrellisMatrix gate_up, down;
    const uint16_t* d_inner;
    const float *gate_up_bias, *down_bias;  // or null
    size_t first, count;
  };

  void begin(const ExpertsLayer& layer, size_t n);
  void score(Team& team, const ExpertsLayer& layer, const float* x, size_t n);
  void choose(Team& team, const char* phase, const ExpertsLayer& layer, size_t n, float* weights,
              int64_t* ids);
  void share(Team& team, const ExpertsLayer& layer, size_t n, float* x);
  size_t find_groups(const ExpertsLayer& layer, const int64_t* ids, const float* weights, size_t n,
                     const ExpertParts* experts, size_t n_experts);
  void gather(Team& team, size_t first, size_t count);
  RoundedTokens tokens_of(const Group& group, size_t n) const;
  void run_inner(int thread, const ExpertsLayer& layer, const Group& group, size_t unit, size_t n);
  void run_down(int thread, const ExpertsLayer& layer, const Group& group, size_t block);

  Engine& engine_;
  Buffer<float> normed_, scores_;
  Buffer<float> choice_;  // [max_tokens][2 * n_experts], see route()
  RoundedBuffer rounded_, gathered_, inner_;
  Buffer<float> outputs_;      // [assignments][n_hidden]
  Buffer<Group> groups_;       // of this run
  Buffer<uint32_t> source_;    // [assignments]: the token in each row of outputs
  Buffer<float> heard_;        // [assignments]: the weight of what a row's expert is given
  Buffer<uint32_t> row_of_;    // [n][n_active]: the row of outputs of each assignment, or kNoRow
  Buffer<int32_t> expert_at_;  // [n_experts]: where an expert is among those given, or -1
  size_t n_rows_ = 0;          // of outputs, taken since route() or take()
  // Of shared experts: what they are given, what is inside them, as it is and rounded.
  RoundedBuffer shared_in_, shared_rounded_;
  Buffer<float> shared_both_, shared_inner_;
  Buffer<float> out_;  // [max_tokens][n_hidden], where it is normed before it is added
};

}  // namespace lowmoe

// Chooses the experts of a token; lowmoe/decoder/router.py says the same in torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowmoe {

// Softmax over all experts, of which the n_active likeliest are used, the heaviest first; among
// equals the one of lower id.
//   logits        [n_experts]
//   renormalize   whether the weights are made to add up to 1
//   weights, ids  [n_active]
// Any NaN among the logits makes all weights NaN; ids are still n_active different experts.
// Requires 1 <= n_active <= n_experts.  Allocates nothing; any thread may call it.
void route_softmax(const float* logits, size_t n_experts, int n_active, bool renormalize,
                   float* weights, int64_t* ids);

struct Router {
  const float* weights;      // [n_experts][n_hidden]
  const float* bias;         // of the logits, [n_experts], or null
  const float* choice_bias;  // of what experts are chosen by, not weighed by; [n_experts], or null
  bool sigmoid;              // of each logit by itself, else a softmax over all
  bool renormalize;          // whether the weights are made to add up to 1
  int n_active;
  size_t n_groups, n_groups_active;  // see both routers in lowmoe/spec/feed_forward.py
  float scale;                       // of the weights
  // How many times as likely as it is an expert counts for the choice, [n_experts], or null. Its
  // owner may change it between calls.
  const float* preference;
  float spread;  // the deviation that logits are brought to before a softmax; 0 to leave them
  float jitter;  // above 0 for a sparse mixer of two, see SparseMixerRouter in that file

  bool is_plain() const {
    return !sigmoid && !bias && !choice_bias && !preference && jitter == 0 &&
           n_groups_active == n_groups;
  }
};

// The same by any router. Experts come in the order they are chosen in, which with a choice_bias or
// a preference is not that of their weights.
//   logits   [n_experts], overwritten
//   scratch  [2 * n_experts]
// Requires n_groups to divide n_experts and 1 <= n_groups_active <= n_groups, n_active of them to
// be in any n_groups_active groups.  Allocates nothing; any thread may call it.
void route(const Router& router, size_t n_experts, float* logits, float* scratch, float* weights,
           int64_t* ids);

}  // namespace lowmoe

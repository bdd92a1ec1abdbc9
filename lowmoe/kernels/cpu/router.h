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

}  // namespace lowmoe

#include "lowmoe/kernels/cpu/router.h"

#include <cmath>
#include <limits>

namespace lowmoe {

namespace {

// Puts expert e among the best so far, ids[0..n_found), of which n_active are kept; returns how
// many there are then.
int insert(const float* logits, int64_t e, int n_active, int n_found, int64_t* ids) {
  if (n_found == n_active && !(logits[e] > logits[ids[n_found - 1]])) return n_found;
  int place = n_found < n_active ? n_found : n_active - 1;
  const int n_now = place + 1 > n_found ? place + 1 : n_found;
  for (; place > 0 && logits[e] > logits[ids[place - 1]]; place--) ids[place] = ids[place - 1];
  ids[place] = e;
  return n_now;
}

}  // namespace

void route_softmax(const float* logits, size_t n_experts, int n_active, bool renormalize,
                   float* weights, int64_t* ids) {
  int n_found = 0;
  bool has_nan = false;
  for (size_t e = 0; e < n_experts; e++) {
    has_nan |= std::isnan(logits[e]);
    n_found = insert(logits, static_cast<int64_t>(e), n_active, n_found, ids);
  }
  const float top = logits[ids[0]];
  float total = 0;
  for (int k = 0; k < n_active; k++) {
    weights[k] = std::exp(logits[ids[k]] - top);
    total += weights[k];
  }
  if (!renormalize) {
    total = 0;
    for (size_t e = 0; e < n_experts; e++) total += std::exp(logits[e] - top);
  }
  if (has_nan) total = std::numeric_limits<float>::quiet_NaN();
  for (int k = 0; k < n_active; k++) weights[k] /= total;
}

}  // namespace lowmoe

#include "lowmoe/kernels/cpu/layers.h"

#include <algorithm>
#include <utility>

namespace lowmoe {

Layers::Layers(Attention& attention, std::span<const AttentionLayer> attention_layers,
               Experts& experts, std::span<const ExpertsLayer> experts_layers,
               std::vector<ExpertParts> table, int64_t* uses, size_t max_tokens)
    : attention_(attention),
      attention_layers_(attention_layers),
      experts_(experts),
      experts_layers_(experts_layers),
      table_(std::move(table)),
      uses_(uses) {
  size_t most_active = 0, most_experts = 0, at = 0;
  for (const ExpertsLayer& layer : experts_layers) {
    most_active = std::max<size_t>(most_active, layer.n_active());
    most_experts = std::max(most_experts, layer.n_experts);
    table_at_.push_back(at);
    at += layer.n_experts;
  }
  weights_ = Buffer<float>(max_tokens * most_active);
  ids_ = Buffer<int64_t>(max_tokens * most_active);
  is_chosen_.resize(most_experts);
  chosen_.resize(most_experts);
}

size_t Layers::run(KvPages& cache, size_t first, float* x, size_t n) {
  return compute(x, n,
                 [&](size_t i) { attention_.run(attention_layers_[i], i, cache, first, x, n); });
}

size_t Layers::step(std::span<const Place> places, float* x) {
  return compute(x, places.size(),
                 [&](size_t i) { attention_.step(attention_layers_[i], i, places, x); });
}

template <class Attend>
size_t Layers::compute(float* x, size_t n, const Attend& attend) {
  size_t n_used = 0;
  for (size_t i = 0; i < experts_layers_.size(); i++) {
    const ExpertsLayer& layer = experts_layers_[i];
    attend(i);
    experts_.route(layer, x, n, weights_.data(), ids_.data());
    const std::span<const ExpertParts> chosen = choose(i, n);
    if (!chosen.empty()) {
      experts_.run(layer, ids_.data(), weights_.data(), n, chosen.data(), chosen.size());
    }
    experts_.add(layer, weights_.data(), n, x);
    n_used += chosen.size();
  }
  return n_used;
}

// The experts that any of n tokens was sent to, by their ids.
std::span<const ExpertParts> Layers::choose(size_t layer_id, size_t n) {
  const size_t n_experts = experts_layers_[layer_id].n_experts;
  const size_t n_assignments = n * experts_layers_[layer_id].n_active();
  std::fill(is_chosen_.begin(), is_chosen_.end(), 0);
  for (size_t a = 0; a < n_assignments; a++) is_chosen_[ids_[a]] = 1;
  size_t count = 0;
  for (size_t e = 0; e < n_experts; e++) {
    if (!is_chosen_[e]) continue;
    const size_t at = table_at_[layer_id] + e;
    chosen_[count++] = table_[at];
    if (uses_) uses_[at]++;
  }
  return {chosen_.data(), count};
}

}  // namespace lowmoe

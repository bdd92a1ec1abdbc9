#include "lowmoe/kernels/cpu/layers.h"

#include <algorithm>
#include <utility>

namespace lowmoe {

Layers::Layers(Attention& attention, std::span<const AttentionLayer> attention_layers,
               Experts& experts, std::span<const ExpertsLayer> experts_layers,
               std::vector<ExpertParts> table, size_t max_tokens)
    : attention_(attention),
      attention_layers_(attention_layers),
      experts_(experts),
      experts_layers_(experts_layers),
      table_(std::move(table)),
      weights_(max_tokens * experts_layers.front().n_active),
      ids_(max_tokens * experts_layers.front().n_active),
      is_chosen_(experts_layers.front().n_experts),
      chosen_(experts_layers.front().n_experts) {}

size_t Layers::run(KvPages& cache, size_t first, float* x, size_t n) {
  size_t n_used = 0;
  for (size_t i = 0; i < experts_layers_.size(); i++) {
    const ExpertsLayer& layer = experts_layers_[i];
    attention_.run(attention_layers_[i], i, cache, first, x, n);
    experts_.route(layer, x, n, weights_.data(), ids_.data());
    const std::span<const ExpertParts> chosen = choose(i, n);
    experts_.run(layer, ids_.data(), n, chosen.data(), chosen.size());
    experts_.add(layer, weights_.data(), n, x);
    n_used += chosen.size();
  }
  return n_used;
}

// The experts that any of n tokens was sent to, by their ids.
std::span<const ExpertParts> Layers::choose(size_t layer_id, size_t n) {
  const size_t n_experts = is_chosen_.size();
  const size_t n_assignments = n * experts_layers_[layer_id].n_active;
  std::fill(is_chosen_.begin(), is_chosen_.end(), 0);
  for (size_t a = 0; a < n_assignments; a++) is_chosen_[ids_[a]] = 1;
  size_t count = 0;
  for (size_t e = 0; e < n_experts; e++) {
    if (is_chosen_[e]) chosen_[count++] = table_[layer_id * n_experts + e];
  }
  return {chosen_.data(), count};
}

}  // namespace lowmoe

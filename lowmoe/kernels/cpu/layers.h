// All layers of a model in one call, for when every expert is in memory: what lies between layers
// costs nothing then. In Python it cost 90 us a layer, a seventh of a token of OLMoE-1B-7B, since
// the weights that stream through the caches leave nothing of an interpreter in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "lowmoe/kernels/cpu/attention.h"
#include "lowmoe/kernels/cpu/experts.h"

namespace lowmoe {

class Layers {
 public:
  // attention and experts: one layer each; table: the bytes of every expert, layer by layer in the
  // order of their ids; uses: as many counts in the same order, of passes that used an expert, or
  // null.  max_tokens: of any call.
  Layers(Attention& attention, std::span<const AttentionLayer> attention_layers, Experts& experts,
         std::span<const ExpertsLayer> experts_layers, std::vector<ExpertParts> table,
         int64_t* uses, size_t max_tokens);

  // n tokens x [n][n_hidden] at positions first on pass through all layers, in place. Their keys
  // and values enter the cache, which has room for them.
  // Returns how many experts were used, those of several tokens once a layer.
  size_t run(KvPages& cache, size_t first, float* x, size_t n);

  // The same for one token of each of several conversations, see Attention::step.
  size_t step(std::span<const Place> places, float* x);

 private:
  template <class Attend>
  size_t compute(float* x, size_t n, const Attend& attend);
  std::span<const ExpertParts> choose(size_t layer_id, size_t n);

  Attention& attention_;
  std::span<const AttentionLayer> attention_layers_;
  Experts& experts_;
  std::span<const ExpertsLayer> experts_layers_;
  std::vector<ExpertParts> table_;
  int64_t* uses_;
  std::vector<size_t> table_at_;     // [n_layers]: where a layer's experts begin in it
  Buffer<float> weights_;            // [max_tokens][n_active], of the layer with most
  Buffer<int64_t> ids_;              // likewise
  std::vector<uint8_t> is_chosen_;   // [n_experts], of the layer with most
  std::vector<ExpertParts> chosen_;  // of this layer, of room for as many
};

}  // namespace lowmoe

// What the bindings of layers share: operations bound to the layers they are run for, and the
// checks that kernels trust.
#pragma once

#include <nanobind/nanobind.h>

#include <tuple>
#include <vector>

#include "lowmoe/kernels/cpu/attention.h"
#include "lowmoe/kernels/cpu/engine.h"
#include "lowmoe/kernels/cpu/experts.h"
#include "lowmoe/kernels/cpu/kv_pages.h"

namespace lowmoe {

namespace nb = nanobind;

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void require(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}

inline void check_count(const Engine& engine, size_t n) {
  require(n > 0 && n <= engine.max_tokens(), "no tokens, or more than the engine was made for");
}

// An operation with the layers it is run for.
template <class Operation, class Layer>
struct Bound {
  std::vector<Layer> layers;
  Operation operation;

  const Layer& layer(size_t id) const {
    require(id < layers.size(), "no such layer");
    return layers[id];
  }
};

using GivenPlace = std::tuple<KvPages*, size_t>;

struct BoundAttention : Bound<Attention, AttentionLayer> {
  const Engine& engine;
  size_t max_context, max_sequences;

  void check(const KvPages& cache, size_t first, size_t n) const {
    require(n > 0 && n <= engine.max_tokens(), "no tokens, or more than the engine was made for");
    require(n <= max_context && first <= max_context - n, "too long a context");
    require(first + n <= cache.n_reserved(), "the cache has no room");
    const AttentionLayer& like = layers.front();
    require(cache.fits(layers.size(), like.n_kv_heads, like.head_size, like.latent != nullptr),
            "the cache is another model's");
  }

  std::vector<Place> places(const std::vector<GivenPlace>& given) const {
    require(given.size() <= max_sequences, "more sequences than attention was made for");
    require(!given.empty() && given.size() <= engine.max_tokens(),
            "no tokens, or more than the engine was made for");
    std::vector<Place> places;
    for (const auto& [cache, position] : given) {
      require(cache, "a sequence has no cache");
      check(*cache, position, 1);
      for (const Place& other : places) require(other.cache != cache, "a cache is given twice");
      places.push_back({cache, position});
    }
    return places;
  }
};

struct BoundExperts : Bound<Experts, ExpertsLayer> {
  const Engine& engine;
  std::vector<ExpertParts> given;  // of the latest run
};

inline ExpertParts parts_of(size_t id, const std::vector<Address>& addresses) {
  require(!addresses.empty() && addresses.size() <= layout::kMaxPlanes, "1 to 3 parts");
  ExpertParts expert{static_cast<int64_t>(id), {}, static_cast<int>(addresses.size())};
  for (size_t p = 0; p < addresses.size(); p++) {
    require(addresses[p] % layout::kRegionAlignment == 0, "parts must be aligned to 64 bytes");
    expert.parts[p] = at<const uint8_t>(addresses[p]);
  }
  return expert;
}

}  // namespace lowmoe

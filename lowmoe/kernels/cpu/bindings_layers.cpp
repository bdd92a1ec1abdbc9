#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "lowmoe/kernels/cpu/attention.h"
#include "lowmoe/kernels/cpu/bindings.h"
#include "lowmoe/kernels/cpu/delta_net.h"
#include "lowmoe/kernels/cpu/ends.h"
#include "lowmoe/kernels/cpu/engine.h"
#include "lowmoe/kernels/cpu/experts.h"
#include "lowmoe/kernels/cpu/kv_cache.h"
#include "lowmoe/kernels/cpu/kv_pages.h"
#include "lowmoe/kernels/cpu/layers.h"
#include "lowmoe/kernels/cpu/lightning.h"
#include "lowmoe/kernels/cpu/pool.h"
#include "lowmoe/kernels/cpu/probe.h"

namespace lowmoe {

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}

Code code_of(const std::vector<int>& table, float scale_unit) {
  require(table.size() == kTableSize, "the table must have 64 values");
  Code code{};
  for (size_t i = 0; i < table.size(); i++) {
    require(std::abs(table[i]) < kTableOffset, "table values must lie in -63 to 63");
    code.table[i] = static_cast<uint8_t>(table[i] + kTableOffset);
  }
  code.scale_unit = scale_unit;
  return code;
}

Linear linear_of(const Engine& engine, size_t n_out, size_t n_in,
                 const std::vector<Address>& planes, Address d) {
  require(!planes.empty() && planes.size() <= layout::kMaxPlanes, "1 to 3 planes");
  Linear linear{{{n_out, n_in}, &engine.code(), {}, static_cast<int>(planes.size())},
                at<const uint16_t>(d)};
  for (size_t p = 0; p < planes.size(); p++) {
    require(planes[p] % layout::kRegionAlignment == 0, "planes must be aligned to 64 bytes");
    linear.w.planes[p] = at<const uint8_t>(planes[p]);
  }
  return linear;
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

void check_count(const Engine& engine, size_t n) {
  require(n > 0 && n <= engine.max_tokens(), "no tokens, or more than the engine was made for");
}

struct BoundDeltaNet : Bound<DeltaNet, DeltaLayer> {
  const Engine& engine;
};

struct BoundLightning : Bound<Lightning, LightningLayer> {
  const Engine& engine;
};

// (after how many tokens, maps)
void run_lightning(BoundLightning& self, size_t layer_id, Address maps,
                   const std::vector<std::tuple<size_t, Address>>& stops, Address x, size_t n) {
  check_count(self.engine, n);
  const LightningLayer& layer = self.layer(layer_id);
  std::vector<LightningStop> found;
  size_t last = 0;
  for (const auto& [end, to_maps] : stops) {
    require(end > last, "stops out of order");
    last = end;
    found.push_back({end, at<float>(to_maps)});
  }
  require(last == n, "the last stop must be after the last token");
  nb::gil_scoped_release unlocked;
  self.operation.run(layer, at<const float>(maps), found, at<float>(x), n);
}

// (after how many tokens, window, maps)
using GivenStop = std::tuple<size_t, Address, Address>;

void run_delta_net(BoundDeltaNet& self, size_t layer_id, Address window, Address maps,
                   const std::vector<GivenStop>& stops, Address x, size_t n) {
  check_count(self.engine, n);
  const DeltaLayer& layer = self.layer(layer_id);
  std::vector<DeltaStop> found;
  size_t last = 0;
  for (const auto& [end, to_window, to_maps] : stops) {
    require(end > last, "stops out of order");
    last = end;
    found.push_back({end, {at<float>(to_window), at<float>(to_maps)}});
  }
  require(last == n, "the last stop must be after the last token");
  nb::gil_scoped_release unlocked;
  self.operation.run(layer, {at<float>(window), at<float>(maps)}, found, at<float>(x), n);
}

struct BoundExperts : Bound<Experts, ExpertsLayer> {
  const Engine& engine;
  std::vector<ExpertParts> given;  // of the latest run
};

struct BoundEnds {
  Ends operation;
  const Engine& engine;
  size_t n_vocab;
};

// Whether the scratch of one serves the other.
bool same_latents(const AttentionLayer& one, const AttentionLayer& other) {
  if (!one.latent || !other.latent) return !one.latent && !other.latent;
  const LatentProjection &a = *one.latent, &b = *other.latent;
  const auto q_rank = [](const LatentProjection& of) {
    return of.q_down ? of.q_down->w.shape.n_out : 0;
  };
  return a.kv_rank() == b.kv_rank() && a.plain_size() == b.plain_size() &&
         a.value_size() == b.value_size() && q_rank(a) == q_rank(b);
}

ExpertParts parts_of(size_t id, const std::vector<Address>& addresses) {
  require(!addresses.empty() && addresses.size() <= layout::kMaxPlanes, "1 to 3 parts");
  ExpertParts expert{static_cast<int64_t>(id), {}, static_cast<int>(addresses.size())};
  for (size_t p = 0; p < addresses.size(); p++) {
    require(addresses[p] % layout::kRegionAlignment == 0, "parts must be aligned to 64 bytes");
    expert.parts[p] = at<const uint8_t>(addresses[p]);
  }
  return expert;
}

using GivenExpert = std::tuple<int64_t, std::vector<Address>>;

void run_experts(BoundExperts& self, size_t layer_id, Address ids, size_t n,
                 const std::vector<GivenExpert>& experts, Address weights) {
  check_count(self.engine, n);
  const ExpertsLayer& layer = self.layer(layer_id);
  require(weights || !layer.weigh_input,
          "a layer that weighs what experts are given, not told by what");
  self.given.clear();
  std::vector<bool> seen(layer.n_experts);
  for (const auto& [id, parts] : experts) {
    require(id >= 0 && static_cast<size_t>(id) < layer.n_experts, "no such expert");
    require(!seen[id], "an expert is given twice");
    seen[id] = true;
    self.given.push_back(parts_of(id, parts));
  }
  const int64_t* chosen = at<const int64_t>(ids);
  const size_t n_rows = std::count_if(chosen, chosen + n * layer.n_active(), [&](int64_t id) {
    require(id >= 0 && static_cast<size_t>(id) < layer.n_experts, "no such expert");
    return seen[id];
  });
  require(n_rows <= self.operation.rows_left(n, layer.n_active()), "an expert has run already");
  nb::gil_scoped_release release;
  self.operation.run(layer, chosen, at<const float>(weights), n, self.given.data(),
                     self.given.size());
}

struct BoundLayers {
  Layers operation;
  const BoundAttention& attention;
};

using ExpertTable = std::vector<std::vector<std::vector<Address>>>;

void make_layers(BoundLayers* self, BoundAttention& attention, BoundExperts& experts,
                 const ExpertTable& addresses) {
  const size_t n_layers = experts.layers.size();
  require(attention.layers.size() == n_layers && addresses.size() == n_layers,
          "attention, experts and table of different layers");
  require(&attention.engine == &experts.engine, "attention and experts of different engines");
  std::vector<ExpertParts> table;
  for (size_t i = 0; i < n_layers; i++) {
    require(addresses[i].size() == experts.layers[i].n_experts,
            "a layer's table has other experts than the layer");
    for (size_t id = 0; id < addresses[i].size(); id++) {
      table.push_back(parts_of(id, addresses[i][id]));
    }
  }
  new (self) BoundLayers{Layers(attention.operation, attention.layers, experts.operation,
                                experts.layers, std::move(table), attention.engine.max_tokens()),
                         attention};
}

KvFormat kv_format(const std::string& name) {
  if (name == "float32") return KvFormat::kFloat32;
  if (name == "float16") return KvFormat::kFloat16;
  require(name == "int8", "a cache is float32, float16 or int8");
  return KvFormat::kInt8;
}

std::vector<std::tuple<std::string, double, uint64_t>> phases(Pool& pool) {
  std::vector<std::tuple<std::string, double, uint64_t>> found;
  for (const Profile::Phase& phase : pool.profile()) {
    if (phase.name) found.emplace_back(phase.name, phase.nanoseconds * 1e-9, phase.count);
  }
  return found;
}

}  // namespace

void bind_layers(nb::module_& m) {
  using namespace nb::literals;
  using release = nb::call_guard<nb::gil_scoped_release>;

  m.attr("PAGE_TOKENS") = KvPages::kPageTokens;
  m.def(
      "allocated_bytes", [] { return allocated_bytes.load(); },
      "Bytes of scratch and cache that native objects hold now.");
  m.def(
      "kv_head_bytes",
      [](const std::string& format, size_t head_size) {
        return head_bytes(kv_format(format), head_size);
      },
      "format"_a, "head_size"_a, "Bytes of one head's key or value of one token.");

  nb::class_<Pool>(m, "Pool", "Threads that compute together; the caller is one of them.")
      .def(
          "__init__",
          [](Pool* self, int n_threads, const std::vector<int>& cpus) {
            require(n_threads >= 1, "a pool needs a thread");
            new (self) Pool(n_threads, cpus);
          },
          "n_threads"_a, "cpus"_a)
      .def_prop_ro("n_threads", &Pool::size)
      .def(
          "read_seconds",
          [](Pool& self, Address data, size_t n_bytes) {
            require(data % 64 == 0, "data must be aligned to 64 bytes");
            return read_seconds(self, at<const uint8_t>(data), n_bytes);
          },
          "data"_a, "n_bytes"_a, release(), "Seconds that reading n_bytes takes all threads.")
      .def(
          "start_profile", [](Pool& p) { p.profile().clear(), p.profile().enabled = true; },
          "Begin to add up the seconds of each phase.")
      .def("phases", &phases,
           "[(phase, seconds, times)] since start_profile, as one thread saw them.");

  nb::class_<Engine>(m, "Engine", "An instruction set, threads and scratch for up to max_tokens.")
      .def(
          "__init__",
          [](Engine* self, const char* isa, Pool& pool, const std::vector<int>& table,
             float scale_unit, size_t max_tokens) {
            require(max_tokens > 0, "max_tokens is 0");
            new (self) Engine(isa_named(isa), pool, code_of(table, scale_unit), max_tokens);
          },
          "isa"_a, "pool"_a, "table"_a, "scale_unit"_a, "max_tokens"_a, nb::keep_alive<1, 3>());

  nb::class_<Linear>(m, "Linear", "A matrix of trellis planes by the addresses of its bytes.")
      .def(
          "__init__",
          [](Linear* self, const Engine& engine, size_t n_out, size_t n_in,
             const std::vector<Address>& planes,
             Address d) { new (self) Linear(linear_of(engine, n_out, n_in, planes, d)); },
          "engine"_a, "n_out"_a, "n_in"_a, "planes"_a, "d"_a, nb::keep_alive<1, 2>());

  nb::class_<KvPages>(m, "KvPages", "Keys and values of one conversation.")
      .def(
          "__init__",
          [](KvPages* self, size_t n_layers, size_t n_kv_heads, size_t head_size,
             const std::string& format, bool keys_only) {
            require(n_layers > 0 && n_kv_heads > 0 && head_size > 0, "an empty cache");
            new (self) KvPages(n_layers, n_kv_heads, head_size, kv_format(format), keys_only);
          },
          "n_layers"_a, "n_kv_heads"_a, "head_size"_a, "format"_a, "keys_only"_a = false)
      .def("reserve", &KvPages::reserve, "n_tokens"_a, release())
      .def_prop_ro("n_reserved", &KvPages::n_reserved);

  nb::class_<Norm>(m, "Norm", "engine.h")
      .def(
          "__init__",
          [](Norm* self, Address weight, float epsilon, Address bias, bool centred) {
            new (self) Norm{at<const float>(weight), epsilon, at<const float>(bias), centred};
          },
          nb::kw_only(), "weight"_a, "epsilon"_a, "bias"_a, "centred"_a, "bias: 0 for none.");

  nb::class_<LatentProjection>(m, "LatentProjection", "latent.h")
      .def(
          "__init__",
          [](LatentProjection* self, Engine& engine, const Linear* q_down, Address q_norm,
             const Linear& q_up, const Linear& kv_down, Address kv_norm, float norm_epsilon,
             const Linear& kv_up, size_t n_heads, size_t plain_size, size_t rope_size,
             size_t value_size) {
            const size_t kv_rank = kv_up.w.shape.n_in;
            require(n_heads > 0 && plain_size > 0 && value_size > 0 && rope_size > 0 &&
                        rope_size % 2 == 0,
                    "sizes of heads");
            require(q_up.w.shape.n_out == n_heads * (plain_size + rope_size) &&
                        kv_up.w.shape.n_out == n_heads * (plain_size + value_size) &&
                        kv_down.w.shape.n_out == kv_rank + rope_size,
                    "the heads do not fit the matrices");
            const size_t n_in = q_down ? q_down->w.shape.n_in : q_up.w.shape.n_in;
            require(n_in == kv_down.w.shape.n_in &&
                        (!q_down || (q_norm && q_down->w.shape.n_out == q_up.w.shape.n_in)),
                    "the matrices do not fit each other");
            new (self) LatentProjection{q_down ? std::optional(*q_down) : std::nullopt,
                                        at<const float>(q_norm),
                                        q_up,
                                        kv_down,
                                        at<const float>(kv_norm),
                                        norm_epsilon,
                                        HeadRows(n_heads, kv_rank, plain_size),
                                        HeadRows(n_heads, value_size, kv_rank),
                                        n_heads,
                                        rope_size};
            nb::gil_scoped_release unlocked;
            split_heads(engine, kv_up, n_heads, self->keys_up, self->values_up);
          },
          nb::kw_only(), "engine"_a, "q_down"_a.none(), "q_norm"_a, "q_up"_a, "kv_down"_a,
          "kv_norm"_a, "norm_epsilon"_a, "kv_up"_a, "n_heads"_a, "plain_size"_a, "rope_size"_a,
          "value_size"_a, "q_down: None where queries come of x itself; kv_up is not kept.");

  nb::class_<AttentionLayer>(m, "AttentionLayer", "attention.h")
      .def(
          "__init__",
          [](AttentionLayer* self, const Norm& norm, const Linear* qkv, const Linear& out,
             Address frequencies, size_t n_heads, size_t n_kv_heads, size_t head_size,
             size_t window, size_t rope_size, float rope_length, float score_scale,
             Address qkv_bias, Address out_bias, int head_norm, Address q_norm, Address k_norm,
             float head_norm_epsilon, float clamp, Address sinks, bool gated, float kept,
             size_t chunk, size_t temperature_step, float temperature_scale, float score_cap,
             const Norm* out_norm, std::shared_ptr<const LatentProjection> latent) {
            require(qkv || latent, "a layer of no attention");
            new (self) AttentionLayer{norm,
                                      qkv ? *qkv : Linear{},
                                      out,
                                      at<const float>(frequencies),
                                      out.w.shape.n_out,
                                      n_heads,
                                      n_kv_heads,
                                      head_size,
                                      window,
                                      chunk,
                                      rope_size,
                                      rope_length,
                                      score_scale,
                                      score_cap,
                                      at<const float>(qkv_bias),
                                      at<const float>(out_bias),
                                      static_cast<HeadNorm>(head_norm),
                                      at<const float>(q_norm),
                                      at<const float>(k_norm),
                                      head_norm_epsilon,
                                      clamp,
                                      at<const float>(sinks),
                                      gated,
                                      kept,
                                      temperature_step,
                                      temperature_scale,
                                      out_norm ? std::optional(*out_norm) : std::nullopt,
                                      std::move(latent)};
            const LatentProjection* of = self->latent.get();
            require(n_heads > 0 && n_kv_heads > 0 && n_heads % n_kv_heads == 0 &&
                        out.w.shape.n_in == n_heads * (of ? of->value_size() : head_size),
                    "the heads do not fit the matrices");
            require(of || (head_size % 2 == 0 && qkv->w.shape.n_out == self->n_qkv() &&
                           out.w.shape.n_out == qkv->w.shape.n_in),
                    "the heads do not fit the matrices");
            require(!of || (of->n_heads == n_heads && n_kv_heads == 1 &&
                            head_size == of->kept_size() && rope_size == of->rope_size &&
                            of->kv_down.w.shape.n_in == out.w.shape.n_out),
                    "the heads do not fit the latents");
            require(!of || (!qkv_bias && !out_bias && !head_norm && std::isinf(clamp) && !sinks &&
                            window == 0 && chunk == 0 && temperature_step == 0 && !gated),
                    "latents with what only grouped queries have");
            require(rope_size % 2 == 0 && rope_size <= head_size && (!rope_size || frequencies),
                    "rope_size is odd, above head_size, or of no frequencies");
            require(head_norm >= 0 && head_norm <= 3 && (!head_norm || (q_norm && k_norm)),
                    "no such norm of heads, or one without weights");
          },
          nb::kw_only(), "norm"_a, "qkv"_a.none(), "out"_a, "frequencies"_a, "n_heads"_a,
          "n_kv_heads"_a, "head_size"_a, "window"_a, "rope_size"_a, "rope_length"_a,
          "score_scale"_a, "qkv_bias"_a, "out_bias"_a, "head_norm"_a, "q_norm"_a, "k_norm"_a,
          "head_norm_epsilon"_a, "clamp"_a, "sinks"_a, "gated"_a = false, "kept"_a = 0.0f,
          "chunk"_a = 0, "temperature_step"_a = 0, "temperature_scale"_a = 0.0f,
          "score_cap"_a = 0.0f, "out_norm"_a.none() = nb::none(), "latent"_a.none() = nb::none(),
          "qkv: None where latent takes its place. Addresses of what a layer has not are 0; "
          "head_norm: 0 none, 1 before rope, 2 after it, "
          "3 of all heads together.");

  nb::class_<BoundAttention>(m, "Attention", "attention.h")
      .def(
          "__init__",
          [](BoundAttention* self, Engine& engine, const std::vector<AttentionLayer>& layers,
             size_t max_context, size_t max_sequences) {
            require(!layers.empty(), "no layers");
            require(max_sequences > 0, "max_sequences is 0");
            for (const AttentionLayer& layer : layers) {
              const AttentionLayer& like = layers.front();
              require(layer.n_hidden == like.n_hidden && layer.n_heads == like.n_heads &&
                          layer.n_kv_heads == like.n_kv_heads &&
                          layer.head_size == like.head_size && layer.gated == like.gated &&
                          same_latents(layer, like),
                      "layers of different sizes");
            }
            new (self) BoundAttention{
                {layers, Attention(engine, layers.front(), max_context, max_sequences)},
                engine,
                max_context,
                max_sequences};
          },
          "engine"_a, "layers"_a, "max_context"_a, "max_sequences"_a, nb::keep_alive<1, 2>())
      .def(
          "run",
          [](BoundAttention& self, size_t layer_id, KvPages& cache, size_t first, Address x,
             size_t n) {
            self.check(cache, first, n);
            nb::gil_scoped_release unlocked;
            self.operation.run(self.layer(layer_id), layer_id, cache, first, at<float>(x), n);
          },
          "layer_id"_a, "cache"_a, "first"_a, "x"_a, "n"_a)
      .def(
          "step",
          [](BoundAttention& self, size_t layer_id, const std::vector<GivenPlace>& given,
             Address x) {
            const std::vector<Place> places = self.places(given);
            nb::gil_scoped_release unlocked;
            self.operation.step(self.layer(layer_id), layer_id, places, at<float>(x));
          },
          "layer_id"_a, "places"_a, "x"_a, "places: a cache and a position of each token");

  nb::class_<DeltaLayer>(m, "DeltaLayer", "delta_net.h")
      .def(
          "__init__",
          [](DeltaLayer* self, const Norm& norm, const Linear& in, const Linear& out, Address rates,
             Address taps, Address decay_bias, Address log_decay, Address head_norm,
             float head_norm_epsilon, float kept, size_t n_key_heads, size_t n_heads,
             size_t key_size, size_t value_size, size_t n_taps) {
            new (self) DeltaLayer{norm,
                                  in,
                                  out,
                                  at<const float>(rates),
                                  at<const float>(taps),
                                  at<const float>(decay_bias),
                                  at<const float>(log_decay),
                                  at<const float>(head_norm),
                                  head_norm_epsilon,
                                  kept,
                                  in.w.shape.n_in,
                                  n_key_heads,
                                  n_heads,
                                  key_size,
                                  value_size,
                                  n_taps};
            require(n_key_heads > 0 && n_heads % n_key_heads == 0 && n_taps > 0 && key_size > 0 &&
                        value_size > 0 && in.w.shape.n_out == self->n_in() &&
                        out.w.shape.n_in == self->n_values() &&
                        out.w.shape.n_out == in.w.shape.n_in,
                    "the heads do not fit the matrices");
          },
          nb::kw_only(), "norm"_a, "in_"_a, "out"_a, "rates"_a, "taps"_a, "decay_bias"_a,
          "log_decay"_a, "head_norm"_a, "head_norm_epsilon"_a, "kept"_a, "n_key_heads"_a,
          "n_heads"_a, "key_size"_a, "value_size"_a, "n_taps"_a);

  nb::class_<BoundDeltaNet>(m, "DeltaNet", "delta_net.h")
      .def(
          "__init__",
          [](BoundDeltaNet* self, Engine& engine, const std::vector<DeltaLayer>& layers) {
            require(!layers.empty(), "no layers");
            for (const DeltaLayer& layer : layers) {
              const DeltaLayer& like = layers.front();
              require(layer.n_hidden == like.n_hidden && layer.n_key_heads == like.n_key_heads &&
                          layer.n_heads == like.n_heads && layer.key_size == like.key_size &&
                          layer.value_size == like.value_size && layer.n_taps == like.n_taps,
                      "layers of different sizes");
            }
            new (self) BoundDeltaNet{{layers, DeltaNet(engine, layers.front())}, engine};
          },
          "engine"_a, "layers"_a, nb::keep_alive<1, 2>())
      .def("run", &run_delta_net, "layer_id"_a, "window"_a, "maps"_a, "stops"_a, "x"_a, "n"_a,
           "stops: (after how many tokens, where to leave the window, and the maps).");

  nb::class_<LightningLayer>(m, "LightningLayer", "lightning.h")
      .def(
          "__init__",
          [](LightningLayer* self, const Norm& norm, const Linear& qkv, const Linear& gate,
             const Linear& out, Address remains, Address out_norm, float out_norm_epsilon,
             float kept, size_t n_heads, size_t head_size) {
            new (self) LightningLayer{norm,
                                      qkv,
                                      gate,
                                      out,
                                      at<const float>(remains),
                                      at<const float>(out_norm),
                                      out_norm_epsilon,
                                      kept,
                                      qkv.w.shape.n_in,
                                      n_heads,
                                      head_size};
            const size_t q_size = self->q_size(), n_hidden = self->n_hidden;
            require(q_size > 0 && qkv.w.shape.n_out == 3 * q_size && gate.w.shape.n_out == q_size &&
                        gate.w.shape.n_in == n_hidden && out.w.shape.n_in == q_size &&
                        out.w.shape.n_out == n_hidden,
                    "the heads do not fit the matrices");
          },
          nb::kw_only(), "norm"_a, "qkv"_a, "gate"_a, "out"_a, "remains"_a, "out_norm"_a,
          "out_norm_epsilon"_a, "kept"_a, "n_heads"_a, "head_size"_a);

  nb::class_<BoundLightning>(m, "Lightning", "lightning.h")
      .def(
          "__init__",
          [](BoundLightning* self, Engine& engine, const std::vector<LightningLayer>& layers) {
            require(!layers.empty(), "no layers");
            for (const LightningLayer& layer : layers) {
              const LightningLayer& like = layers.front();
              require(layer.n_hidden == like.n_hidden && layer.n_heads == like.n_heads &&
                          layer.head_size == like.head_size,
                      "layers of different sizes");
            }
            new (self) BoundLightning{{layers, Lightning(engine, layers.front())}, engine};
          },
          "engine"_a, "layers"_a, nb::keep_alive<1, 2>())
      .def("run", &run_lightning, "layer_id"_a, "maps"_a, "stops"_a, "x"_a, "n"_a,
           "stops: (after how many tokens, where to leave the maps).");

  nb::class_<Router>(m, "Router", "router.h")
      .def(
          "__init__",
          [](Router* self, Address weights, Address bias, Address choice_bias, bool sigmoid,
             bool renormalize, int n_active, size_t n_groups, size_t n_groups_active, float scale,
             Address preference, float spread, float jitter) {
            require(n_active >= 0, "n_active");
            require(jitter == 0 || n_active == 2, "a sparse mixer mixes two");
            require(n_groups > 0 && n_groups_active > 0 && n_groups_active <= n_groups, "groups");
            new (self) Router{at<const float>(weights),
                              at<const float>(bias),
                              at<const float>(choice_bias),
                              sigmoid,
                              renormalize,
                              n_active,
                              n_groups,
                              n_groups_active,
                              scale,
                              at<const float>(preference),
                              spread,
                              jitter};
          },
          nb::kw_only(), "weights"_a, "bias"_a, "choice_bias"_a, "sigmoid"_a, "renormalize"_a,
          "n_active"_a, "n_groups"_a, "n_groups_active"_a, "scale"_a, "preference"_a,
          "spread"_a = 0.0f, "jitter"_a = 0.0f, "Addresses of what a router has not are 0.");

  nb::class_<SharedExpert>(m, "SharedExpert", "experts.h")
      .def(
          "__init__",
          [](SharedExpert* self, const Linear& gate_up, const Linear& down, Address router) {
            require(gate_up.w.shape.n_out == 2 * down.w.shape.n_in &&
                        gate_up.w.shape.n_in == down.w.shape.n_out,
                    "gate and up do not fit down");
            new (self) SharedExpert{gate_up, down, at<const float>(router)};
          },
          nb::kw_only(), "gate_up"_a, "down"_a, "router"_a, "router: 0 for a weight of 1.");

  nb::class_<ExpertsLayer>(m, "ExpertsLayer", "experts.h")
      .def(
          "__init__",
          [](ExpertsLayer* self, const Norm& norm, const Router& router, Address d_in,
             Address d_inner, size_t n_hidden, size_t n_experts, size_t n_inner, float steepness,
             float shift, float limit, Address gate_up_bias, Address down_bias,
             const SharedExpert* shared, bool weigh_input, float cubic, bool gated,
             const Norm* out_norm, float kept) {
            const size_t n_active = router.n_active;
            require(
                n_experts == 0 ? n_active == 0 && shared : 0 < n_active && n_active <= n_experts,
                "n_active");
            require(n_experts % router.n_groups == 0, "groups");
            // A choice among groups with fewer experts than are used would use closed ones.
            require(router.n_groups == 1 ||
                        n_active <= n_experts / router.n_groups * router.n_groups_active,
                    "groups");
            require(!shared || Activation{steepness, cubic, shift, limit}.is_silu(),
                    "shared experts of another activation");
            require(!shared || shared->down.w.shape.n_out == n_hidden, "shared expert's size");
            new (self) ExpertsLayer{norm,
                                    router,
                                    at<const uint16_t>(d_in),
                                    at<const uint16_t>(d_inner),
                                    n_hidden,
                                    n_experts,
                                    n_inner,
                                    {steepness, cubic, shift, limit},
                                    at<const float>(gate_up_bias),
                                    at<const float>(down_bias),
                                    shared ? std::optional(*shared) : std::nullopt,
                                    out_norm ? std::optional(*out_norm) : std::nullopt,
                                    kept,
                                    gated,
                                    weigh_input};
          },
          nb::kw_only(), "norm"_a, "router"_a, "d_in"_a, "d_inner"_a, "n_hidden"_a, "n_experts"_a,
          "n_inner"_a, "steepness"_a, "shift"_a, "limit"_a, "gate_up_bias"_a, "down_bias"_a,
          "shared"_a.none(), "weigh_input"_a = false, "cubic"_a = 0.0f, "gated"_a = true,
          "out_norm"_a.none() = nb::none(), "kept"_a = 0.0f);

  nb::class_<BoundExperts>(m, "Experts", "experts.h")
      .def(
          "__init__",
          [](BoundExperts* self, Engine& engine, const std::vector<ExpertsLayer>& layers) {
            const auto has_experts = [](const ExpertsLayer& layer) { return layer.n_experts > 0; };
            const auto like = std::find_if(layers.begin(), layers.end(), has_experts);
            require(like != layers.end(), "no layers with experts");
            for (const ExpertsLayer& layer : layers) {
              require(layer.n_hidden == like->n_hidden &&
                          (layer.n_experts == 0 ||
                           (layer.n_experts == like->n_experts && layer.n_inner == like->n_inner &&
                            layer.n_active() == like->n_active())),
                      "layers of different sizes");
            }
            new (self) BoundExperts{{layers, Experts(engine, layers)}, engine, {}};
          },
          "engine"_a, "layers"_a, nb::keep_alive<1, 2>())
      .def(
          "route",
          [](BoundExperts& self, size_t layer_id, Address x, size_t n, Address weights,
             Address ids) {
            check_count(self.engine, n);
            self.operation.route(self.layer(layer_id), at<const float>(x), n, at<float>(weights),
                                 at<int64_t>(ids));
          },
          "layer_id"_a, "x"_a, "n"_a, "weights"_a, "ids"_a, release())
      .def(
          "foresee",
          [](BoundExperts& self, size_t layer_id, Address x, size_t n, Address weights,
             Address ids) {
            check_count(self.engine, n);
            self.operation.foresee(self.layer(layer_id), at<const float>(x), n, at<float>(weights),
                                   at<int64_t>(ids));
          },
          "layer_id"_a, "x"_a, "n"_a, "weights"_a, "ids"_a, release())
      .def(
          "take",
          [](BoundExperts& self, size_t layer_id, Address codes, Address scales, size_t n) {
            check_count(self.engine, n);
            self.operation.take(self.layer(layer_id), at<const int8_t>(codes),
                                at<const float>(scales), n);
          },
          "layer_id"_a, "codes"_a, "scales"_a, "n"_a, release())
      .def("run", &run_experts, "layer_id"_a, "ids"_a, "n"_a, "experts"_a, "weights"_a = 0)
      .def(
          "add",
          [](BoundExperts& self, size_t layer_id, Address weights, size_t n, Address x) {
            check_count(self.engine, n);
            self.operation.add(self.layer(layer_id), at<const float>(weights), n, at<float>(x));
          },
          "layer_id"_a, "weights"_a, "n"_a, "x"_a, release());

  nb::class_<BoundLayers>(m, "Layers", "layers.h")
      .def("__init__", &make_layers, "attention"_a, "experts"_a, "addresses"_a,
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
           "addresses: of the parts of each expert of each layer")
      .def(
          "run",
          [](BoundLayers& self, KvPages& cache, size_t first, Address x, size_t n) {
            self.attention.check(cache, first, n);
            nb::gil_scoped_release unlocked;
            return self.operation.run(cache, first, at<float>(x), n);
          },
          "cache"_a, "first"_a, "x"_a, "n"_a)
      .def(
          "step",
          [](BoundLayers& self, const std::vector<GivenPlace>& given, Address x) {
            const std::vector<Place> places = self.attention.places(given);
            nb::gil_scoped_release unlocked;
            return self.operation.step(places, at<float>(x));
          },
          "places"_a, "x"_a);

  nb::class_<BoundEnds>(m, "Ends", "ends.h")
      .def(
          "__init__",
          [](BoundEnds* self, Engine& engine, const Linear& embedding, const Norm& final_norm,
             const Linear& head) {
            require(embedding.w.shape.n_in == head.w.shape.n_in, "ends of different sizes");
            new (self) BoundEnds{Ends(engine, embedding, final_norm, head), engine,
                                 embedding.w.shape.n_out};
          },
          nb::kw_only(), "engine"_a, "embedding"_a, "final_norm"_a, "head"_a,
          nb::keep_alive<1, 2>())
      .def(
          "embed",
          [](BoundEnds& self, Address ids, size_t n, Address x) {
            const int64_t* tokens = at<const int64_t>(ids);
            const auto exists = [&](int64_t id) {
              return id >= 0 && static_cast<size_t>(id) < self.n_vocab;
            };
            require(std::all_of(tokens, tokens + n, exists), "no such token");
            self.operation.embed(tokens, n, at<float>(x));
          },
          "ids"_a, "n"_a, "x"_a, release())
      .def(
          "logits",
          [](BoundEnds& self, Address x, size_t n, Address scores) {
            check_count(self.engine, n);
            self.operation.logits(at<const float>(x), n, at<float>(scores));
          },
          "x"_a, "n"_a, "scores"_a, release());
}

}  // namespace lowmoe

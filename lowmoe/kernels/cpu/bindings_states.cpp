#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "lowmoe/kernels/cpu/bindings.h"
#include "lowmoe/kernels/cpu/bound.h"
#include "lowmoe/kernels/cpu/delta_net.h"
#include "lowmoe/kernels/cpu/lightning.h"

namespace lowmoe {

namespace {

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

}  // namespace

void bind_states(nb::module_& m) {
  using namespace nb::literals;

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
}

}  // namespace lowmoe

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "lowmoe/kernels/cpu/bindings.h"
#include "lowmoe/kernels/cpu/bound.h"
#include "lowmoe/kernels/cpu/experts.h"

namespace lowmoe {

namespace {

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

}  // namespace

void bind_experts(nb::module_& m) {
  using namespace nb::literals;
  using release = nb::call_guard<nb::gil_scoped_release>;

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
}

}  // namespace lowmoe

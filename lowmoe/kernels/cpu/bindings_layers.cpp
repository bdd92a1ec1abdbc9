#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <vector>

#include "lowmoe/kernels/cpu/bindings.h"
#include "lowmoe/kernels/cpu/bound.h"
#include "lowmoe/kernels/cpu/ends.h"
#include "lowmoe/kernels/cpu/layers.h"

namespace lowmoe {

namespace {

struct BoundEnds {
  Ends operation;
  const Engine& engine;
  size_t n_vocab;
};

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

}  // namespace

void bind_layers(nb::module_& m) {
  using namespace nb::literals;
  using release = nb::call_guard<nb::gil_scoped_release>;

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

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "lowmoe/kernels/cpu/bindings.h"
#include "lowmoe/kernels/cpu/encoder.h"

namespace lowmoe {

namespace {

template <class T, ssize_t... kShape>
using Array = nb::ndarray<T, nb::shape<kShape...>, nb::c_contig, nb::device::cpu>;
using Matrix = Array<const float, -1, -1>;
using Blocks = Array<const float, -1, -1, -1>;  // [Hadamard blocks][h][h]

void require(bool fine, const char* message) {
  if (!fine) throw nb::value_error(message);
}

// Null for an array that was not given.
const float* blocks_of(const std::optional<Blocks>& blocks, size_t n_in, size_t h) {
  if (!blocks.has_value()) return nullptr;
  require(blocks->shape(0) == n_in / h && blocks->shape(1) == h && blocks->shape(2) == h,
          "metric and factors must be [n_in / h, h, h]");
  return blocks->data();
}

void encode(const std::string& isa, int n_threads, const Matrix& weights,
            const Array<const float, -1>& d, size_t h, const Array<const int8_t, kTableSize>& table,
            float unit, const std::optional<Blocks>& metric, const std::optional<Blocks>& factors,
            float own_share, const std::vector<Array<uint8_t, -1>>& planes,
            const Array<double, -1, -1>& products) {
  EncoderTask task{};
  task.shape = {weights.shape(0), weights.shape(1)};
  const size_t n_in = task.shape.n_in;
  require(n_threads > 0, "threads must be at least 1");
  require(task.shape.n_out > 0 && n_in > 0, "weights must not be empty");
  require(d.shape(0) == n_in, "d must have a number for every column");
  require(h > 0 && h <= kMostBlockColumns && (h & (h - 1)) == 0 && n_in % h == 0,
          "h must be a power of two up to 128 that divides the columns");
  require(!planes.empty() && planes.size() <= layout::kMaxPlanes, "there must be 1 to 3 planes");
  require(metric.has_value() == factors.has_value() && (!metric.has_value() || h % 4 == 0),
          "metric and factors come together, for blocks of at least 4");
  require(products.shape(0) == task.shape.row_blocks() && products.shape(1) == 1 + planes.size(),
          "products must be [row blocks, 1 + planes]");
  task.weights = weights.data();
  task.d = d.data();
  task.h = h;
  std::memcpy(task.table, table.data(), sizeof task.table);
  for (const int8_t value : task.table) require(value >= -63 && value <= 63, "a value exceeds 63");
  task.unit = unit;
  task.n_planes = static_cast<int>(planes.size());
  task.metric = blocks_of(metric, n_in, h);
  task.factors = blocks_of(factors, n_in, h);
  task.own_share = own_share;
  for (size_t p = 0; p < planes.size(); p++) {
    require(planes[p].shape(0) == task.shape.plane_bytes(), "a plane must have plane_bytes");
    task.planes[p] = planes[p].data();
  }
  task.products = products.data();

  const Isa& chosen = isa_named(isa.c_str());
  Coded coded;
  {
    nb::gil_scoped_release others_may_run;
    coded = encode_matrix(chosen, task, n_threads);
  }
  require(coded != Coded::kNotFinite, "weights are not finite");
  require(coded != Coded::kTooLarge, "weights are too large for float16 scales");
}

}  // namespace

void bind_encoder(nb::module_& m) {
  m.def("encode", encode, nb::kw_only(), nb::arg("isa"), nb::arg("threads"), nb::arg("weights"),
        nb::arg("d"), nb::arg("h"), nb::arg("table"), nb::arg("unit"), nb::arg("metric").none(),
        nb::arg("factors").none(), nb::arg("own_share"), nb::arg("planes"), nb::arg("products"),
        "Fills planes, [plane_bytes] uint8 of zeros each, and products; see encoder.h.");
}

}  // namespace lowmoe

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "lowmoe/kernels/cpu/bindings.h"
#include "lowmoe/kernels/cpu/bound.h"
#include "lowmoe/kernels/cpu/engine.h"
#include "lowmoe/kernels/cpu/kv_cache.h"
#include "lowmoe/kernels/cpu/kv_pages.h"
#include "lowmoe/kernels/cpu/pool.h"
#include "lowmoe/kernels/cpu/probe.h"

namespace lowmoe {

namespace {

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

void bind_engine(nb::module_& m) {
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
}

}  // namespace lowmoe

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>
#include <vector>

#include "lowmoe/kernels/cpu/attention_parts.h"
#include "lowmoe/kernels/cpu/bindings.h"
#include "lowmoe/kernels/cpu/kv_cache.h"
#include "lowmoe/kernels/cpu/router.h"

namespace lowmoe {

namespace {

template <class T, class... Rank>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu, Rank...>;
template <class T>
using Row = Array<T, nb::ndim<1>>;
template <class T>
using Rows = Array<T, nb::ndim<2>>;

// A guard of pointers: what the kernels behind trust.
void require(bool met, const char* what) {
  if (!met) throw nb::value_error(what);
}

const VectorKernels& kernels(const std::string& isa) { return *isa_named(isa.c_str()).vector; }

void rms_norm(const std::string& isa, Row<const float> x, Row<const float> weight, float epsilon,
              Row<float> y) {
  require(weight.size() == x.size() && y.size() == x.size(), "x, weight and y differ in size");
  kernels(isa).rms_norm(x.data(), weight.data(), epsilon, x.size(), y.data());
}

void layer_norm(const std::string& isa, Row<const float> x, Row<const float> weight, float epsilon,
                Row<float> y) {
  require(weight.size() == x.size() && y.size() == x.size(), "x, weight and y differ in size");
  kernels(isa).layer_norm(x.data(), weight.data(), epsilon, x.size(), y.data());
}

void multiply_rows(const std::string& isa, Rows<const float> x, Rows<const uint8_t> rows,
                   Rows<float> y) {
  const size_t size = x.shape(1);
  require(rows.shape(1) == head_bytes(KvFormat::kInt8, size), "rows are no int8 heads of x's size");
  require(y.shape(0) == x.shape(0) && y.shape(1) == rows.shape(0), "y: every row for every token");
  kernels(isa).multiply_rows(x.data(), x.shape(0), rows.data(), rows.shape(1), size, rows.shape(0),
                             y.data(), y.shape(1));
}

void round_token(const std::string& isa, Row<const float> x, Row<const uint16_t> d,
                 size_t first_column, Row<int8_t> codes, Row<float> scales, Row<int32_t> sums) {
  const size_t n_in = d.size(), last = first_column + x.size();
  require(first_column % kScaleColumns == 0, "first_column is no multiple of 128");
  require(last == n_in || (last < n_in && last % kScaleColumns == 0),
          "x ends neither at a multiple of 128 nor with the last column");
  require(codes.size() == padded_columns(n_in), "codes: one for each padded column");
  require(scales.size() == scale_groups(n_in), "scales: one for each 128 columns");
  require(sums.size() * layout::kBlockColumns == codes.size(), "sums: one for each 64 columns");
  kernels(isa).round_token(x.data(), d.data(), first_column, x.size(),
                           {codes.data(), scales.data(), sums.data(), n_in});
}

void silu_multiply(const std::string& isa, Row<const float> gate, Row<const float> up,
                   Row<float> y) {
  require(up.size() == gate.size() && y.size() == gate.size(), "gate, up and y differ in size");
  kernels(isa).silu_multiply(gate.data(), up.data(), gate.size(), y.data());
}

float dot(const std::string& isa, Row<const float> a, Row<const float> b) {
  require(a.size() == b.size(), "a and b differ in size");
  return kernels(isa).dot(a.data(), b.data(), a.size());
}

void add_scaled(const std::string& isa, Row<const float> x, float scale, Row<float> y) {
  require(x.size() == y.size(), "x and y differ in size");
  kernels(isa).add_scaled(x.data(), scale, x.size(), y.data());
}

void step_state(const std::string& isa, Row<const float> query, Row<const float> key,
                Row<const float> value, float remains, float correction, bool corrects,
                Row<float> map, Row<float> out) {
  require(query.size() == key.size() && value.size() == out.size() &&
              map.size() == key.size() * value.size(),
          "map: a row for each number of key, a column for each of value");
  const StateStep token{query.data(), key.data(), value.data(), key.size(),
                        value.size(), remains,    correction,   corrects};
  kernels(isa).step_state(token, map.data(), map.data(), out.data());
}

void rotate(const std::string& isa, Row<float> head, Row<const float> cos, Row<const float> sin) {
  require(head.size() == 2 * cos.size() && head.size() == 2 * sin.size(),
          "cos and sin: one for each two of head");
  kernels(isa).rotate(head.data(), cos.data(), sin.data(), head.size());
}

KvFormat format_of(int number) {
  require(number >= 0 && number <= static_cast<int>(KvFormat::kInt8), "formats are 0, 1 and 2");
  return static_cast<KvFormat>(number);
}

void store_head(const std::string& isa, int format, Row<const float> head, Row<uint8_t> to) {
  require(to.size() == head_bytes(format_of(format), head.size()), "to: head_bytes of them");
  kernels(isa).store_head(format_of(format), head.data(), head.size(), to.data());
}

// What attend_part and attend_block ask of their caches alike.
void require_cached(KvFormat format, const Rows<const uint8_t>& keys,
                    const Rows<const uint8_t>& values, size_t size, size_t first, size_t last) {
  require(keys.shape(0) == values.shape(0) && keys.shape(1) == values.shape(1),
          "keys and values differ in shape");
  require(keys.shape(1) >= head_bytes(format, size), "a position has less than head_bytes");
  require(first <= last && last <= keys.shape(0), "no range of the positions");
}

void attend_part(const std::string& isa, int format, Rows<const float> q, Rows<const uint8_t> keys,
                 Rows<const uint8_t> values, size_t first, size_t last, Row<float> top,
                 Row<float> total, Rows<float> out, float cap) {
  const size_t n_queries = q.shape(0), size = q.shape(1);
  require_cached(format_of(format), keys, values, size, first, last);
  require(top.size() == n_queries && total.size() == n_queries, "top, total: one for each query");
  require(out.shape(0) == n_queries && out.shape(1) == size, "out and q differ in shape");
  std::vector<float> scratch(n_queries * (last - first));
  kernels(isa).attend_part(format_of(format), q.data(), n_queries, keys.data(), values.data(),
                           keys.shape(1), size, first, last, top.data(), total.data(), out.data(),
                           scratch.data(), cap);
}

void attend_block(const std::string& isa, int format, Array<const float, nb::ndim<3>> q,
                  Rows<const uint8_t> keys, Rows<const uint8_t> values, size_t first, size_t last,
                  size_t end, size_t window, Rows<float> top, Rows<float> total,
                  Array<float, nb::ndim<3>> out, float cap) {
  const size_t n_tokens = q.shape(0), n_queries = q.shape(1), size = q.shape(2);
  require_cached(format_of(format), keys, values, size, first, last);
  for (const auto& each : {top, total}) {
    require(each.shape(0) == n_tokens && each.shape(1) == n_queries,
            "top, total: one for each query of each token");
  }
  require(out.shape(0) == n_tokens && out.shape(1) == n_queries && out.shape(2) == size,
          "out and q differ in shape");
  require(n_tokens >= 1 && window >= 1, "no token, or one that does not see itself");
  std::vector<float> scratch(block_scratch_floats(n_tokens * n_queries, size));
  const size_t stride = keys.shape(1);
  kernels(isa).attend_block(
      format_of(format), {q.data(), n_queries * size, n_tokens, n_queries, end, window, cap},
      keys.data() + first * stride, values.data() + first * stride, stride, size, first, last,
      top.data(), total.data(), out.data(), scratch.data());
}

// Adds part (top, total, out) to another.  top, total: [rows]; out: [rows, size].
void merge_parts(Row<const float> top, Row<const float> total, Rows<const float> out,
                 Row<float> to_top, Row<float> to_total, Rows<float> to_out) {
  const size_t n_rows = out.shape(0), size = out.shape(1);
  require(to_out.shape(0) == n_rows && to_out.shape(1) == size, "parts differ in shape");
  require(top.size() == n_rows && total.size() == n_rows && to_top.size() == n_rows &&
              to_total.size() == n_rows,
          "top, total: one for each row");
  for (size_t row = 0; row < n_rows; row++) {
    merge_part(top.data()[row], total.data()[row], out.data() + row * size, size,
               to_top.data()[row], to_total.data()[row], to_out.data() + row * size);
  }
}

void route_each(Rows<const float> logits, bool renormalize, Rows<float> weights,
                Rows<int64_t> ids) {
  const size_t n_tokens = logits.shape(0), n_experts = logits.shape(1), n_active = ids.shape(1);
  require(n_active >= 1 && n_active <= n_experts, "n_active is not in 1..n_experts");
  require(weights.shape(0) == n_tokens && ids.shape(0) == n_tokens && weights.shape(1) == n_active,
          "weights and ids: n_active for each token");
  for (size_t t = 0; t < n_tokens; t++) {
    route_softmax(logits.data() + t * n_experts, n_experts, static_cast<int>(n_active), renormalize,
                  weights.data() + t * n_active, ids.data() + t * n_active);
  }
}

}  // namespace

void bind_vector(nb::module_& m) {
  m.def("rms_norm", rms_norm, "y = x / rms(x) * weight.");
  m.def("layer_norm", layer_norm, "y = (x - mean) / deviation * weight.");
  m.def("multiply_rows", multiply_rows, "rows: int8 heads, as store_head writes them; see isa.h.");
  m.def("round_token", round_token, "As quant/activations.py; d: [n_in] float16 as uint16.");
  m.def("silu_multiply", silu_multiply, "y = silu(gate) * up.");
  m.def("dot", dot, "The sum of a * b.");
  m.def("add_scaled", add_scaled, "y += scale * x.");
  m.def("step_state", step_state, "Takes a map [rows * columns] through one token, in place.");
  m.def("rotate", rotate, "Turns one head in place.");
  m.def(
      "head_bytes", [](int format, size_t size) { return head_bytes(format_of(format), size); },
      "Bytes of one stored head.");
  m.def("store_head", store_head, "Stores one head; formats: 0 float32, 1 float16, 2 int8.");
  using namespace nb::literals;
  m.def("attend_part", attend_part, "isa"_a, "format"_a, "q"_a, "keys"_a, "values"_a, "first"_a,
        "last"_a, "top"_a, "total"_a, "out"_a, "cap"_a = 0.0f,
        "q: [n_queries, size]; keys, values: [positions, stride] bytes; see isa.h.");
  m.def("attend_block", attend_block, "isa"_a, "format"_a, "q"_a, "keys"_a, "values"_a, "first"_a,
        "last"_a, "end"_a, "window"_a, "top"_a, "total"_a, "out"_a, "cap"_a = 0.0f,
        "q: [tokens, n_queries, size]; keys, values as for attend_part; see isa.h.");
  m.def("merge_parts", merge_parts, "Adds a part, (top, total, out), to another.");
  m.def("route_softmax", route_each, "logits: [T, E]; weights, ids: [T, K].");
}

}  // namespace lowmoe

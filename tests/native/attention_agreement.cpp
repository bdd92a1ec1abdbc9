#include <algorithm>
#include <initializer_list>
#include <limits>

#include "lowmoe/kernels/cpu/kv_cache.h"
#include "tests/native/agreement.h"

namespace lowmoe::agreement {

namespace {

constexpr KvFormat kFormats[] = {KvFormat::kFloat32, KvFormat::kFloat16, KvFormat::kInt8};
constexpr size_t kHeadSizes[] = {2, 6, 64, 80, 128};
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Keys and values as the scalar set stores them, and queries.
struct Cache {
  KvFormat format;
  size_t size, stride, n;
  Array<uint8_t> keys, values;

  Cache(Random& random, const Isa& scalar, KvFormat format, size_t size, size_t n)
      : format(format),
        size(size),
        stride(head_bytes(format, size)),
        n(n),
        keys(n * stride, 0, format == KvFormat::kFloat16 ? 2 : 4),
        values(n * stride, 0, format == KvFormat::kFloat16 ? 2 : 4) {
    const Array<float> head(size);
    for (size_t position = 0; position < n; position++) {
      random.fill(head, -2, 2);
      scalar.vector->store_head(format, head.data(), size, keys.data() + position * stride);
      random.fill(head, -1, 1);
      scalar.vector->store_head(format, head.data(), size, values.data() + position * stride);
    }
  }
};

struct Part {
  Array<float> top, total, out;

  Part(size_t n_rows, size_t size) : top(n_rows, kLowest), total(n_rows), out(n_rows * size) {}
};

// |q| <= 1 / sqrt(size) and |key| <= 2, so the magnitudes of a score's products add up to at most
// 2 sqrt(size), and each of two orders of summation is off by size + 3 roundings of that: product,
// sums and an int8 cache's scale. A score and the top move a weight's exponent, in both sets; exp
// itself is off by 4 roundings, as is each factor that joins the tiles of 64 positions; n weights
// of magnitude 1 times values of magnitude 1 are then added up.
void compare_parts(Check& check, const Part& found, const Part& wanted, size_t size, size_t n,
                   const std::string& name) {
  const double score =
      2 * std::sqrt(static_cast<double>(size)) * kRounding * (static_cast<double>(size) + 3) * 2;
  const double weight =
      2 * score + 2 * kRounding * (static_cast<double>(n) + 16 + 8 * (static_cast<double>(n) / 64));
  check.near(found.top, wanted.top, [=](size_t) { return score; }, "top of " + name);
  check.near(
      found.total, wanted.total, [&](size_t row) { return weight * wanted.total[row]; },
      "total of " + name);
  check.near(
      found.out, wanted.out, [&](size_t i) { return weight * wanted.total[i / size]; },
      "output of " + name);
}

void fill_queries(Random& random, const Array<float>& q, size_t size) {
  const float most = 1 / std::sqrt(static_cast<float>(size));
  random.fill(q, -most, most);
}

std::string name_of(const Cache& cache, size_t n_queries, size_t first, size_t last) {
  return std::to_string(n_queries) + " heads of " + std::to_string(cache.size) + ", format " +
         std::to_string(static_cast<int>(cache.format)) + ", positions " + std::to_string(first) +
         " to " + std::to_string(last);
}

void attend(const Isa& isa, const Cache& cache, const Array<float>& q, size_t n_queries,
            size_t first, size_t last, const Part& part) {
  const Array<float> scratch(n_queries * (last - first));
  isa.vector->attend_part(cache.format, q.data(), n_queries, cache.keys.data(), cache.values.data(),
                          cache.stride, cache.size, first, last, part.top.data(), part.total.data(),
                          part.out.data(), scratch.data(), 0.0f);
}

void compare_attend_part(const Isa& isa, const Isa& scalar) {
  Check check(isa, "attend_part");
  Random random(10);
  for (const KvFormat format : kFormats) {
    for (const size_t size : kHeadSizes) {
      for (const size_t n : {1, 2, 7, 64, 65, 200}) {
        const Cache cache(random, scalar, format, size, n);
        for (const size_t n_queries : {1, 2, 3, 4, 7, 12}) {
          const size_t first = n_queries % 2 ? 0 : n / 3;
          const Array<float> q(n_queries * size);
          fill_queries(random, q, size);
          const Part found(n_queries, size), wanted(n_queries, size);
          attend(isa, cache, q, n_queries, first, n, found);
          attend(scalar, cache, q, n_queries, first, n, wanted);
          compare_parts(check, found, wanted, size, n, name_of(cache, n_queries, first, n));
        }
      }
    }
  }
}

void compare_nothing_seen(const Isa& isa, const Isa& scalar) {
  Check check(isa, "attend_part, no positions");
  Random random(11);
  const Cache cache(random, scalar, KvFormat::kFloat16, 64, 4);
  const Array<float> q(3 * 64);
  const Part found(3, 64), wanted(3, 64);
  found.top[0] = found.total[1] = found.out[2] = 7;  // must be overwritten
  attend(isa, cache, q, 3, 2, 2, found);
  check.same(found.top, wanted.top, "top");
  check.same(found.total, wanted.total, "total");
  check.same(found.out, wanted.out, "output");
}

// Whatever is not a number must not vanish in a weight of 0 or a maximum.
void compare_nan(const Isa& isa, const Isa& scalar) {
  Check check(isa, "attend_part, one NaN among the keys");
  Random random(12);
  constexpr size_t kSize = 80, kPositions = 70;
  for (const KvFormat format : kFormats) {
    for (size_t position = 0; position < kPositions; position++) {
      const Cache cache(random, scalar, format, kSize, kPositions);
      const Array<float> head(kSize), q(2 * kSize);
      head[position] = std::nanf("");
      scalar.vector->store_head(format, head.data(), kSize,
                                cache.keys.data() + position * cache.stride);
      fill_queries(random, q, kSize);
      const Part found(2, kSize), wanted(2, kSize);
      attend(isa, cache, q, 2, 0, kPositions, found);
      std::fill(wanted.out.begin(), wanted.out.end(), std::nanf(""));
      check.same(found.out, wanted.out, name_of(cache, 2, position, position + 1));
    }
  }
}

struct Block {
  size_t n_tokens, n_queries, first, last, end, window;
};

void attend(const Isa& isa, const Cache& cache, const Array<float>& q, const Block& block,
            const Part& part) {
  const size_t q_stride = q.size() / block.n_tokens;
  const QueryBlock queries{q.data(),        q_stride,  block.n_tokens,
                           block.n_queries, block.end, block.window};
  const size_t n_rows = block.n_tokens * block.n_queries;
  const Array<float> scratch(block_scratch_floats(n_rows, cache.size));
  isa.vector->attend_block(cache.format, queries, cache.keys.data() + block.first * cache.stride,
                           cache.values.data() + block.first * cache.stride, cache.stride,
                           cache.size, block.first, block.last, part.top.data(), part.total.data(),
                           part.out.data(), scratch.data());
}

void compare_attend_block(const Isa& isa, const Isa& scalar) {
  Check check(isa, "attend_block, in two pages");
  Random random(13);
  constexpr Block kBlocks[] = {
      {1, 1, 0, 1, 1, SIZE_MAX},      {1, 3, 0, 70, 70, SIZE_MAX},    {5, 1, 0, 69, 65, SIZE_MAX},
      {8, 4, 64, 200, 193, SIZE_MAX}, {33, 2, 0, 200, 168, SIZE_MAX}, {40, 3, 0, 200, 161, 50},
      {16, 2, 10, 90, 75, 1},         {3, 8, 0, 130, 128, 64},
  };
  for (const KvFormat format : kFormats) {
    for (const size_t size : kHeadSizes) {
      const Cache cache(random, scalar, format, size, 200);
      for (const Block& block : kBlocks) {
        const size_t n_rows = block.n_tokens * block.n_queries;
        const Array<float> q(n_rows * size + block.n_tokens * 2);
        fill_queries(random, q, size);
        const Part found(n_rows, size), wanted(n_rows, size);
        Block one = block, other = block;
        one.last = other.first = (block.first + block.last) / 2;
        for (const Block& page : {one, other}) {
          attend(isa, cache, q, page, found);
          attend(scalar, cache, q, page, wanted);
        }
        compare_parts(check, found, wanted, size, block.last - block.first,
                      name_of(cache, n_rows, block.first, block.last));
      }
    }
  }
}

}  // namespace

void compare_attention(const Isa& isa, const Isa& scalar) {
  compare_attend_part(isa, scalar);
  compare_nothing_seen(isa, scalar);
  compare_nan(isa, scalar);
  compare_attend_block(isa, scalar);
}

}  // namespace lowmoe::agreement

// How many products of bytes does one core add up, if everything stays in registers?
//
// seconds_*(rounds) adds up kSums registers of products `rounds` times, once for each instruction
// set of the trellis kernels. Calling one that this processor has not ends the process.

#include <immintrin.h>

#include <chrono>

namespace {

constexpr int kSums = 12;  // enough that none waits for the one before it

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

extern "C" {

// 64 products in each of the sums.
[[gnu::target("avx512f,avx512vnni")]] double seconds_avx512(long rounds) {
  const __m512i values = _mm512_set1_epi8(3), codes = _mm512_set1_epi8(-5);
  __m512i sums[kSums] = {};
  const auto begin = std::chrono::steady_clock::now();
  for (long i = 0; i < rounds; i++) {
    for (auto& sum : sums) {
      sum = _mm512_dpbusd_epi32(sum, values, codes);
      asm volatile("" : "+v"(sum));  // so that no two rounds become one
    }
  }
  return seconds_since(begin);
}

// 32 products in each of the sums; avx2 needs three instructions for what avxvnni does in one.
[[gnu::target("avx2,avxvnni")]] double seconds_avxvnni(long rounds) {
  const __m256i values = _mm256_set1_epi8(3), codes = _mm256_set1_epi8(-5);
  __m256i sums[kSums] = {};
  const auto begin = std::chrono::steady_clock::now();
  for (long i = 0; i < rounds; i++) {
    for (auto& sum : sums) {
      sum = _mm256_dpbusd_avx_epi32(sum, values, codes);
      asm volatile("" : "+x"(sum));
    }
  }
  return seconds_since(begin);
}

[[gnu::target("avx2")]] double seconds_avx2(long rounds) {
  const __m256i values = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  __m256i sums[kSums] = {};
  const auto begin = std::chrono::steady_clock::now();
  for (long i = 0; i < rounds; i++) {
    for (auto& sum : sums) {
      const __m256i pairs = _mm256_maddubs_epi16(values, sum);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
      asm volatile("" : "+x"(sum));
    }
  }
  return seconds_since(begin);
}

}  // extern "C"
